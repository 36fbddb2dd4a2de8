"""One matrix under one format: its histogram with the grid on it, and its errors, fast enough to follow a slider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.quantization.anatomy import decibel, kurtosis
from workbench.quantization.formats import named
from workbench.quantization.grid import fit
from workbench.quantization.transforms import Transform, power_of_two

if TYPE_CHECKING:
    import plotly.graph_objects as go

BINS = 161


@dataclass(frozen=True)
class Look:
    """What the picture shows. Histogram over weight / scale; errors as shares of energy; `bits` with scales counted."""

    centres: Tensor
    share: Tensor
    grid: Tensor
    bits: float
    weight_error: float
    output_error: float
    sqnr: float
    spread: float  # largest over root mean square magnitude, in the coordinates that are rounded
    kurtosis: float


@torch.no_grad()
def look(weight: Tensor, gram: Tensor, format: str, granularity: str = "auto", group_size: int = 64, rotate: bool = False, rule: str = "auto") -> Look:
    """Nearest rounding of a matrix (out, in) with the inputs' second moment (in, in); `rotate` puts a block Hadamard on the inputs first.

    `BadInput` for a format or granularity that does not exist.
    """
    chosen = named(format)
    width = weight.shape[1]
    transform = Transform(signs=torch.ones(width, device=weight.device), block=power_of_two(width)) if rotate else None
    moved, seen = (weight, gram) if transform is None else (transform.weight(weight), transform.gram(gram))
    grid = fit(moved, chosen, granularity, group_size, rule)
    gap = grid.round(moved) - moved
    scale, zero = grid.columns(width)
    units = moved / scale if zero is None else moved / scale + zero
    element = chosen.element
    low, high = 1.1 * min(element.lowest, 0.0), 1.1 * element.highest
    if chosen.scale == "none":
        low, high = float(units.min()), float(units.max())
    share = torch.histc(units, BINS, low, high) / units.numel()
    half = (high - low) / BINS / 2
    weight_error = float(gap.square().sum() / moved.square().sum().clamp_min(1e-30))
    output_error = float(((gap @ seen) * gap).sum() / ((moved @ seen) * moved).sum().clamp_min(1e-30))
    values = element.values() if element.bits <= 8 else torch.zeros(0)
    return Look(torch.linspace(low + half, high - half, BINS), share, values, grid.bytes(tuple(weight.shape)) * 8 / weight.numel(), weight_error, output_error,
                decibel(1.0, weight_error), float(moved.abs().max() / moved.square().mean().sqrt().clamp_min(1e-30)), kurtosis(moved))  # fmt: skip


def look_figure(found: Look, title: str) -> go.Figure:
    """Histogram of the weights in units of their scale, with the format's values as ticks below it."""
    from workbench.figures import color, figure

    fig = figure(title, "weight / scale", "share of weights", bargap=0)
    fig.add_bar(x=found.centres.numpy(), y=found.share.numpy(), name="weights", marker_color=color(0))
    if len(found.grid):
        fig.add_scatter(x=found.grid.numpy(), y=torch.zeros(len(found.grid)).numpy(), name="values of the format", mode="markers",
                        marker=dict(symbol="line-ns-open", size=14, color=color(1)))  # fmt: skip
    return fig
