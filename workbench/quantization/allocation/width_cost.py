"""What a layer's width costs: sensitivities, each a formula for a table of layers and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.axis import Axis, Options, parameter
from workbench.curvature.estimators.gauss_newton import gauss_newton_scores
from workbench.progress import Progress
from workbench.quantization.allocation.integer_program import log_variance
from workbench.quantization.allocation.layer_sensitivity import (
    alone,
    measured_alone,
    top_eigenvalues,
    traces,
)
from workbench.subjects import Layer, Subject

#: `entry(candidates, options)` gives a `WidthCost`. The trait "drawn targets" says that it needs a loss whose
#: targets can be drawn, "divergence" that its cost is a prediction of the divergence in nats, and "measured
#: distance" that it compares what two models answer.
WIDTH_COST = Axis(
    "width-cost",
    "what a width costs: 1/2 d.Gd of its rounding error d with Gauss-Newton's matrix, or the Hessian's; "
    "mean trace or top eigenvalue of H x |d|^2; "
    "mean trace x variance x 4^-width; output error; measured change; divergence with noise in the layer",
    found_in="workbench.quantization.allocation",
    home="allocate.sensitivity",
)
Found = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Candidates:
    """Every layer at every width.

    table : one row a layer and width, layers first;  deltas : layer name -> weight changes, one a width
    examples : calibration examples of the estimate
    """

    on: Subject
    layers: Sequence[Layer]
    widths: Sequence[int]
    table: pd.DataFrame
    deltas: Mapping[str, Sequence[Tensor]]
    examples: int
    seed: int
    progress: Progress

    def squared_errors(self) -> pd.Series:
        """|d|^2 of every row."""
        return pd.Series(
            [float(d.float().square().sum()) for layer in self.layers for d in self.deltas[layer.name]]
        )


@dataclass(frozen=True)
class WidthCost:
    """cost : nats, one a row of the table;  columns : what is shown beside it
    joint : (layers, widths, layers, widths) cost of every two changes together, or None
    """

    cost: NDArray[np.float64]
    columns: Mapping[str, Any] = field(default_factory=dict)
    joint: NDArray[np.float64] | None = None


class Pairs(Options):
    probes: int = parameter(4, "targets drawn for each example", ge=2, le=1000)
    interactions: bool = parameter(False, "count what every two layers cost together as well")


@WIDTH_COST.add(
    "gauss-newton",
    formula="1/2 d.G d, G the generalised Gauss-Newton matrix",
    source="Martens 2020, section 9; Deng et al. 2025, CLADO",
    needs="gradients",
    options=Pairs,
    traits=("drawn targets", "divergence"),
)
def gauss_newton(given: Candidates, options: Pairs) -> WidthCost:
    scores = gauss_newton_scores(
        given.on,
        given.layers,
        given.deltas,
        examples=given.examples,
        samples=options.probes,
        seed=given.seed,
        progress=given.progress,
    )
    squares = np.square(scores).reshape(len(scores), -1)
    joint = np.einsum("sia,sjb->iajb", scores, scores) if options.interactions else None
    return WidthCost(squares.sum(0), {"cost_error": squares.std(0, ddof=1) * len(squares) ** 0.5}, joint)


@WIDTH_COST.add(
    "curvature", formula="max(1/2 d.H d, 0)", source="LeCun, Denker and Solla 1990", needs="gradients"
)
def curvature(given: Candidates, options: Options) -> WidthCost:
    predicted = alone(given.on, given.layers, given.deltas, examples=given.examples, progress=given.progress)
    seconds = [max(second, 0.0) for layer in given.layers for _, second in predicted[layer.name]]
    return WidthCost(np.array(seconds))


class Probes(Options):
    probes: int = parameter(4, "random probes of the trace", ge=2, le=1000)


class Parts(Options):
    probes: int = parameter(4, "shares of the data that each give a top eigenvalue", ge=2, le=1000)


def estimated(
    given: Candidates, estimate: Callable[..., Found], probes: int, measure: str
) -> dict[str, pd.Series]:
    """`measure` of each layer's Hessian block and its error, a value a row."""
    generator = torch.Generator().manual_seed(given.seed)
    found = estimate(given.on, given.layers, probes, given.examples, generator, progress=given.progress)
    names = given.table["layer"]
    return {
        measure: pd.Series([found[name][0] for name in names]),
        f"{measure}_error": pd.Series([found[name][1] for name in names]),
    }


@WIDTH_COST.add(
    "trace",
    formula="1/2 (Tr H / n) |d|^2",
    source="Dong et al. 2020, HAWQ-V2, eq. 5",
    needs="gradients",
    options=Probes,
)
def trace(given: Candidates, options: Probes) -> WidthCost:
    columns = estimated(given, traces, options.probes, "trace")
    size = columns["trace"].clip(lower=0) / given.table["weights"]
    return WidthCost((0.5 * size * given.squared_errors()).to_numpy(), columns)


@WIDTH_COST.add(
    "eigenvalue",
    formula="1/2 (|mean lambda| + std lambda) |d|^2",
    source="Dong et al. 2019, HAWQ; Shen et al. 2020, Q-BERT, section 3.1",
    needs="gradients",
    options=Parts,
)
def eigenvalue(given: Candidates, options: Parts) -> WidthCost:
    columns = estimated(given, top_eigenvalues, options.probes, "eigenvalue")
    size = columns["eigenvalue"].abs() + columns["eigenvalue_error"]
    return WidthCost((0.5 * size * given.squared_errors()).to_numpy(), columns)


@WIDTH_COST.add(
    "variance",
    formula="1/2 (Tr H / n) n var(w) 4^-b",
    source="the high-resolution approximation, Gersho and Gray 1992",
    needs="gradients",
    options=Probes,
)
def variance(given: Candidates, options: Probes) -> WidthCost:
    columns = estimated(given, traces, options.probes, "trace")
    weights = given.table["weights"]
    size = columns["trace"].clip(lower=0) / weights
    size = size.clip(lower=1e-3 * size.max())  # a trace that noise made zero has no logarithm
    columns["variance"] = pd.Series(
        [float(layer.weight.detach().float().var()) for layer in given.layers for _ in given.widths]
    )
    noise = weights * columns["variance"] * 4.0 ** -given.table["width"]
    return WidthCost((0.5 * size * noise).to_numpy(), columns | {"share": size})


def ideal_widths(table: pd.DataFrame, widths: int, average: float) -> NDArray[np.float64]:
    """One a row: the real-valued width of its layer at this average, where `variance` gave the cost."""
    first = table.iloc[::widths]
    return log_variance(first["share"], first["variance"], first["weights"], average).repeat(widths)


@WIDTH_COST.add(
    "output", formula="|d X|^2 / |W X|^2", source="Hubara et al. 2021, layer-wise error", needs="inputs"
)
def output(given: Candidates, options: Options) -> WidthCost:
    return WidthCost(given.table["output_error"].to_numpy())


@WIDTH_COST.add("measured", formula="L(w + d) - L(w)", source="the definition", needs="inputs")
def measured(given: Candidates, options: Options) -> WidthCost:
    before = given.on.evaluate("calibration", batch_size=8, limit=given.examples)["loss"]
    changes = [
        change
        for layer in given.progress.track(given.layers, "measuring each layer")
        for change in measured_alone(
            given.on, layer, given.deltas[layer.name], before, "calibration", given.examples
        )
    ]
    return WidthCost(np.array(changes))
