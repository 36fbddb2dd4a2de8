"""Layer by layer: what a rounding or a pruning should cost by the quadratic expansion, what it does cost,
and how far the expansion holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from pydantic import BaseModel
from torch import Tensor

from workbench.axis import parameter
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Stopped
from workbench.curvature.studies.settings import CurvatureInstrument
from workbench.curvature.studies.sharpness import moved_loss_and_gradient
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest symmetric b-bit integers with one scale per output row (..., out, in):
    scale = max|w| / (2^(b-1) - 1).
    """
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / most
    return (weight / scale).round().clamp(-most, most) * scale


def thinned(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with the smallest `sparsity` share of its entries (by magnitude, over the whole tensor)
    set to zero.
    """
    count = int(sparsity * weight.numel())
    kept = weight.flatten().clone()
    kept[weight.abs().flatten().argsort(stable=True)[:count]] = 0
    return kept.view_as(weight)


def validity_radius(
    predict: Callable[[float], float], measure: Callable[[float], float], noise: float, largest: float = 64.0
) -> float:
    """The scale s of a change up to which measured(s) / predicted(s) stays within [1/2, 2],
    by doubling or halving from 1, then bisection.

    Differences below `noise` (the loss's rounding) count as agreement.
    `inf` when it holds beyond `largest`, 0 when it never holds down to 1 / largest.
    """

    def holds(scale: float) -> bool:
        predicted, measured = predict(scale), measure(scale)
        if abs(predicted - measured) <= noise:
            return True
        return predicted * measured > 0 and 0.5 <= measured / predicted <= 2

    if holds(1.0):
        low = 1.0
        while holds(2 * low):
            low *= 2
            if low >= largest:
                return math.inf
        high = 2 * low
    else:
        high = 1.0
        while not holds(high / 2):
            high /= 2
            if high <= 1 / largest:
                return 0.0
        low = high / 2
    for _ in range(4):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return math.sqrt(low * high)


class QuadraticPrediction(CurvatureInstrument):
    """Loss change of rounding or pruning each layer alone:
    predicted (g.d + 1/2 d.Hd) beside measured, with the validity radius.
    """

    summary_line = (
        "predicted beside measured loss change of rounding / pruning each layer, "
        "with the prediction's validity radius"
    )

    layers: str = parameter("blocks", "layers by glob: blocks, * or patterns such as *.query", min_length=1)
    change: Literal["round", "prune"] = parameter(
        "round", "nearest rounding to `bits`, or magnitude pruning to `sparsity`"
    )
    bits: int = parameter(4, "bits of the rounding", only_with="change=round", ge=2, le=16)
    sparsity: float = parameter(
        0.5, "share of weights that the pruning removes", only_with="change=prune", gt=0, lt=1
    )
    radius: bool = parameter(
        True, "also find the scale of each change at which prediction and measurement differ by a factor of 2"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return PredictionResult

    def check(self, on: Subject) -> None:
        super().check(on)
        on.layers(self.layers)

    def _run(self, on: Subject, progress: Progress) -> Result:
        rows: list[dict[str, Any]] = []
        joint: dict[str, float] = {}
        with self.open(on, progress.quiet()) as operator:
            try:
                self._study(operator, progress, rows, joint)
            except Stopped:
                progress.partial = True
        table = pd.DataFrame(
            rows,
            columns=[
                "layer",
                "parameters",
                "change_norm",
                "first",
                "second",
                "predicted",
                "measured",
                "radius",
            ],
        )
        facts: dict[str, Any] = {"layers": len(table), **joint}
        if len(table) > 2:
            from scipy import stats  # slow to import

            facts["rank_correlation"] = float(
                stats.spearmanr(table["predicted"], table["measured"]).statistic
            )
            facts["within_factor_2"] = float(
                np.mean((table["measured"] / table["predicted"]).between(0.5, 2))
            )
            if self.radius:
                facts["median_radius"] = float(table["radius"].median())
        return self.result(table, facts)

    def _study(
        self,
        operator: CurvatureOperator,
        progress: Progress,
        rows: list[dict[str, Any]],
        joint: dict[str, float],
    ) -> None:
        delta = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        for place, s, weight in zip(operator.places, operator.slices, operator.weights, strict=True):
            seen = weight.detach().mT if place.transposed else weight.detach()
            changed = (
                rounded(seen, self.bits) if self.change == "round" else thinned(seen, self.sparsity)
            ) - seen
            delta[s] = (changed.mT if place.transposed else changed).reshape(-1)
        progress.show("prediction", 0, 2)
        gradient, loss = operator.gradient()
        both = operator.matvec(delta)
        progress.show("prediction", 1, 2)
        alone = operator.block_matmat(delta[None])[0]
        progress.show("prediction", 2, 2)
        base, _ = moved_loss_and_gradient(operator, torch.zeros_like(delta), gradient=False)
        noise = 20 * float(torch.finfo(operator.dtype).eps) * max(abs(base), 1.0)
        for name, s in progress.track(
            list(zip(operator.names, operator.slices, strict=True)), "measured layer by layer"
        ):
            own = torch.zeros_like(delta)
            own[s] = delta[s]
            first = float(torch.dot(gradient[s].double(), delta[s].double()))
            second = 0.5 * float(torch.dot(alone[s].double(), delta[s].double()))

            def predict(scale: float, first: float = first, second: float = second) -> float:
                return scale * first + scale**2 * second

            def measure(scale: float, own: Tensor = own) -> float:
                return moved_loss_and_gradient(operator, own * scale, gradient=False)[0] - base

            measured = measure(1.0)
            radius = validity_radius(predict, measure, noise) if self.radius else math.nan
            rows.append(
                {
                    "layer": name,
                    "parameters": s.stop - s.start,
                    "change_norm": float(torch.linalg.vector_norm(delta[s])),
                    "first": first,
                    "second": second,
                    "predicted": first + second,
                    "measured": measured,
                    "radius": radius,
                }
            )
        first, second = (
            float(torch.dot(gradient.double(), delta.double())),
            0.5 * float(torch.dot(both.double(), delta.double())),
        )

        def measure_joint(scale: float) -> float:
            return moved_loss_and_gradient(operator, delta * scale, gradient=False)[0] - base

        joint |= {
            "loss": loss,
            "joint_predicted": first + second,
            "joint_first": first,
            "joint_measured": measure_joint(1.0),
        }
        if self.radius:
            joint["joint_radius"] = validity_radius(
                lambda scale: scale * first + scale**2 * second, measure_joint, noise
            )


class PredictionView(BaseModel):
    show: Literal["predicted beside measured", "validity radius"] = parameter(
        "predicted beside measured", "what is drawn"
    )


class PredictionResult(Result):
    """Predicted against measured loss change, or the validity radius by layer."""

    def view_model(self) -> type[BaseModel]:
        return PredictionView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.curvature.studies.drawings import layers_figure
        from workbench.figures import figure, points

        fields = self.instrument.model_dump()
        what = (
            f"{fields['bits']}-bit rounding"
            if fields["change"] == "round"
            else f"{fields['sparsity']:.0%} magnitude pruning"
        )
        if view.get("show") == "validity radius" and len(self.table):
            return layers_figure(
                self.table.assign(radius=self.table["radius"].replace(math.inf, 64.0)),
                "radius",
                "validity radius (in units of the change)",
                "How far the prediction holds, by layer",
            )
        fig = figure(
            f"Loss change of {what}, one layer at a time", x="predicted loss change", y="measured loss change"
        )
        if len(self.table):
            points(
                fig, self.table["predicted"], self.table["measured"], "layers", text=list(self.table["layer"])
            )
            ends = [
                float(self.table[["predicted", "measured"]].min().min()),
                float(self.table[["predicted", "measured"]].max().max()),
            ]
            fig.add_scatter(
                x=ends,
                y=ends,
                mode="lines",
                name="equal",
                line=dict(color="rgba(128,128,128,0.9)", dash="dash", width=1),
            )
        return fig
