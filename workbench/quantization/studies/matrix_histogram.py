"""One matrix under one format: its histogram with the grid on it, and its errors,
fast enough to follow a slider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.quantization.noise import decibel, kurtosis
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.transform.coordinates import Transform
from workbench.quantization.transform.hadamard_orders import widest

if TYPE_CHECKING:
    import plotly.graph_objects as go

BINS = 161


@dataclass(frozen=True)
class Look:
    """What the picture shows. Histogram over weight / scale; errors as shares of energy;
    `bits` with scales counted.
    """

    centres: Tensor
    share: Tensor
    grid: Tensor
    bits: float
    weight_error: float
    output_error: float
    sqnr: float
    spread: float  # largest over root mean square magnitude, in the coordinates that are rounded
    kurtosis: float


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) and its inputs' second moment (in, in), in the coordinates that are rounded,
    with what no format changes.
    """

    weight: Tensor
    gram: Tensor
    energy: float  # of the weights
    output_energy: float
    spread: float
    kurtosis: float


@torch.no_grad()
def prepared(weight: Tensor, gram: Tensor, rotate: bool = False) -> Matrix:
    """What `look` asks of a layer, computed once; `rotate` puts a Hadamard matrix on the inputs first."""
    if rotate:
        width = weight.shape[1]
        transform = Transform(signs=torch.ones(width, device=weight.device), block=widest(width))
        weight, gram = transform.weight(weight), transform.gram(gram)
    energy = float(weight.square().sum())
    spread = float(weight.abs().max()) / max((energy / weight.numel()) ** 0.5, 1e-30)
    return Matrix(
        weight, gram, max(energy, 1e-30), max(output_energy(weight, gram), 1e-30), spread, kurtosis(weight)
    )


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W G W^T): the mean squared norm of the outputs of a weight (out, in)
    whose inputs have the second moment G (in, in).
    """
    return float(torch.dot((weight @ gram).flatten(), weight.flatten()))


@torch.no_grad()
def look(
    matrix: Matrix, format: str, granularity: str = "auto", group_size: int = 64, rule: str = "auto"
) -> Look:
    """Nearest rounding of the whole matrix: its errors are exact, on the inputs of `matrix.gram`.

    `BadInput` for a format or granularity that does not exist.
    """
    chosen, weight = named(format), matrix.weight
    grid = fit(weight, chosen, granularity, group_size, rule)
    gap = grid.round(weight).sub_(weight)
    scale, zero = grid.columns(weight.shape[1])
    units = weight / scale if zero is None else (weight / scale).add_(zero)
    element = chosen.element
    low, high = 1.1 * min(element.lowest, 0.0), 1.1 * element.highest
    if chosen.scale == "none":
        low, high = float(units.min()), float(units.max())
    share = torch.histc(units, BINS, low, high) / units.numel()
    half = (high - low) / BINS / 2
    weight_error = float(gap.square().sum()) / matrix.energy
    values = element.values() if element.bits <= 8 else torch.zeros(0)
    return Look(
        torch.linspace(low + half, high - half, BINS),
        share,
        values,
        grid.bytes(tuple(weight.shape)) * 8 / weight.numel(),
        weight_error,
        output_energy(gap, matrix.gram) / matrix.output_energy,
        decibel(1.0, weight_error),
        matrix.spread,
        matrix.kurtosis,
    )


def look_figure(found: Look, title: str) -> go.Figure:
    """The picture of a `Look`."""
    return histogram_figure(found.centres.numpy(), found.share.numpy(), found.grid.numpy(), title)


def histogram_figure(centres: NDArray[Any], share: NDArray[Any], grid: NDArray[Any], title: str) -> go.Figure:
    """Histogram of the weights in units of their scale, with the format's values as ticks below it."""
    from workbench.figures import color, figure

    fig = figure(title, "weight / scale", "share of weights")
    # one filled path: a browser draws it several times as fast as a bar for each bin
    fig.add_scatter(
        x=centres,
        y=share,
        name="weights",
        mode="lines",
        line=dict(shape="hvh", width=1, color=color(0)),
        fill="tozeroy",
        fillcolor=color(0, 0.6),
    )
    if len(grid):
        fig.add_scatter(
            x=grid,
            y=np.zeros(len(grid)),
            name="values of the format",
            mode="markers",
            marker=dict(symbol="line-ns-open", size=14, color=color(1)),
        )
    return fig


def spread_figure(matrices: Mapping[str, Matrix]) -> go.Figure:
    """What a rotation is for: root mean square of each input feature, and largest weight that meets it,
    both largest first, by label.
    """
    from workbench.figures import figure, line

    fig = figure(
        "Spread over the input features",
        "input features, largest first",
        "share of the largest",
        yaxis_type="log",
    )
    for label, matrix in matrices.items():
        for what, values in (
            ("inputs", matrix.gram.diagonal().clamp_min(0).sqrt()),
            ("weights", matrix.weight.abs().amax(0)),
        ):
            ordered = values.sort(descending=True).values
            line(
                fig,
                np.arange(1, len(ordered) + 1),
                (ordered / ordered[0].clamp_min(1e-30)).clamp_min(1e-6).cpu().numpy(),
                f"{what}, {label}",
                mode="lines",
            )
    return fig
