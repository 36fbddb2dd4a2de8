"""Allocate: choose every layer's width by an integer program over measured sensitivities, quantize,
and compare.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.instruments import WEIGHTS, SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.allocation.integer_program import (
    Allocation,
    allocate,
    front,
    with_interactions,
)
from workbench.quantization.allocation.layer_sensitivity import candidates, check_alone
from workbench.quantization.allocation.width_cost import WIDTH_COST, Candidates, WidthCost
from workbench.quantization.quantize import Quantize
from workbench.quantization.quantize_result import choices
from workbench.quantization.quantized_layer import moments_for
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.results import Result
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

Costs = NDArray[np.float64]  # (layers, widths)


class AllocateResult(Result):
    """The Pareto front, the chosen widths and the compared strategies."""

    def figure(self, view: str = "front", **more: Any) -> go.Figure:
        from workbench.figures import figure, line, points

        if view == "widths":
            fig = figure("Width of each layer", "layer", "bits")
            for index, (name, part) in enumerate(self.tables["widths"].groupby("strategy", sort=False)):
                line(
                    fig,
                    part["layer"].to_numpy(),
                    part["width"].to_numpy(),
                    str(name),
                    mode="lines+markers",
                    index=index,
                )
            return fig
        if view == "strategies":
            fig = figure("Loss at one size", "strategy", "test loss (nats)")
            points(fig, self.table["strategy"].to_numpy(), self.table["loss"].to_numpy(), "measured")
            return fig
        fig = figure(
            "Predicted cost of the best allocation for each size",
            "average bits of the codes",
            "predicted loss change (nats)",
            yaxis_type="log",
        )
        found = self.tables["front"]
        line(
            fig, found["average_bits"].to_numpy(), found["cost"].to_numpy(), "optimum of the integer program"
        )
        points(
            fig,
            self.table["code_bits"].to_numpy(),
            self.table["cost"].to_numpy(),
            "strategies",
            text=list(self.table["strategy"]),
        )
        return fig

    def view_model(self) -> type[BaseModel] | None:
        return choices("AllocateView", view=("front", "widths", "strategies"))

    def widths_for(self, average_bits: float) -> dict[str, int]:
        """layer -> width on the front's point of at most `average_bits`:
        what `Quantize(layer_bits=...)` takes.
        """
        table = self.tables["front"]
        fitting = table[table["average_bits"] <= average_bits + 1e-9]
        if fitting.empty:
            raise BadInput(
                f"average_bits: {average_bits:g} is below the smallest allocation, "
                f"{table['average_bits'].min():g}"
            )
        chosen = fitting.iloc[-1]
        return {
            name: int(chosen[name])
            for name in table.columns
            if name not in ("average_bits", "size", "cost", "bound")
        }


class Allocate(SubjectInstrument):
    """Give each layer its width: sensitivities -> integer program -> quantized subject, against uniform,
    random and reversed allocations.
    """

    changes_model: ClassVar[bool] = True

    layers: str = parameter("blocks", "layers to quantize, comma-separated globs")
    budget: float = parameter(3.0, "average width of the codes", ge=1, le=8, unit="bits", step=0.25)
    average: Literal["weights", "multiplications", "latency"] = parameter(
        "weights",
        "what the budget limits: bits of the weights (size); "
        "bits times multiplications (bit operations at one activation width: a layer counts for the "
        "tokens it sees); or the layers' measured times, up to that of all layers at the budget's width",
    )
    times: str = parameter(
        "",
        "CSV of times on the target device, with columns layer (a glob), width and milliseconds; "
        "for average latency",
    )
    widths: list[int] = parameter([2, 3, 4, 8], "widths a layer may get", min_length=2, unit="bits")
    sensitivity: Choice = WIDTH_COST.choice("gauss-newton")
    symmetric: bool = parameter(
        False, "integers symmetric about zero, which at 2 bits leaves three of four values"
    )
    group_size: int = parameter(64, "weights of a group", ge=1, le=4096, scale="log", unit="weights")
    range: Literal["auto", "minmax", "mse"] = parameter("mse", "how scales are found")
    rounding: Choice = ROUNDING.choice("gptq")
    calibration_examples: int = parameter(
        64, "calibration examples of the inputs' second moments", ge=1, unit="examples"
    )
    predict_examples: int = parameter(64, "calibration examples of the sensitivities", ge=1, unit="examples")
    draws: int = parameter(3, "random allocations to compare with (0: compare with none at all)", ge=0, le=50)
    test_examples: int = parameter(1024, "test examples at most", ge=1, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return AllocateResult

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"examples": "calibration_examples"}

    def quantizer(self, bits: int = 4, layer_bits: Mapping[str, int] | None = None) -> Quantize:
        return Quantize(
            layers=self.layers,
            format={"name": "int", "bits": bits, "symmetric": self.symmetric},
            layer_bits=dict(layer_bits or {}),
            group_size=self.group_size,
            range=self.range,
            rounding=self.rounding,
            sequential=False,
            calibration_examples=self.calibration_examples,
            predict_examples=0,
            test_examples=self.test_examples,
            seed=self.seed,
        )

    def calibrates(self) -> dict[str, tuple[str, int]]:
        """The rounding's examples or those of the sensitivities, whichever are more."""
        return {WEIGHTS: ("calibration", max(self.calibration_examples, self.predict_examples))}

    def check(self, on: Subject) -> None:
        if not min(self.widths) <= self.budget <= max(self.widths):
            raise BadInput(
                f"budget: {self.budget:g} bits lies outside the widths {self.widths}; "
                "ask for something between them"
            )
        if bad := [width for width in self.widths if not 2 <= width <= 8]:
            raise BadInput(f"widths: {bad[0]} bits are not accepted; give widths from 2 to 8")
        if len(set(self.widths)) != len(self.widths):
            raise BadInput(f"widths: {self.widths} repeats a width")
        if (self.average == "latency") != bool(self.times):
            raise BadInput(
                f"times: average {self.average} needs a CSV of measured times"
                if not self.times
                else f"times: average {self.average} takes none; leave it empty or set average latency"
            )
        if self.times:
            layer_times(self.times, on.layers(self.layers), self.widths)
        if self.sensitivity.has("drawn targets") and on.task.loss_kind == "other":
            raise BadInput(
                f"sensitivity: {self.sensitivity} draws targets from the model's own distribution, "
                "which this custom loss does not define; use curvature"
            )
        check_alone(self.rounding)
        for width in self.widths:
            self.quantizer(bits=width).check(on)

    def key(self, on: Any) -> str:
        """As for every instrument, with what the file of times holds."""
        own, file = super().key(on), Path(self.times)
        return (
            hashlib.sha256(own.encode() + file.read_bytes()).hexdigest()[:24]
            if self.times and file.is_file()
            else own
        )

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        widths = sorted(self.widths)
        cost, errors, joint = self._costs(on, layers, widths, progress)
        weights = self._weights(on, layers, progress)
        counted = weights[:, None] * np.array(widths)[None]
        size = layer_times(self.times, layers, widths) if self.times else counted
        budget = float(np.interp(self.budget, widths, size.sum(0))) * (1 + 1e-12)
        best = allocate(cost, size, budget)
        plans = {"integer program": best}
        if joint is not None:  # from the additive optimum, so it costs no more than that
            plans = {
                "with interactions": with_interactions(joint, size, budget, best.choice.tolist())
            } | plans
        main, rows_of = next(iter(plans)), np.arange(len(layers))
        plans |= self._rivals(cost, size, budget, widths, weights)
        rows, chosen, subject = [], [], None
        experts, unseen = dict[str, pd.DataFrame](), dict[str, Any]()
        dense = on.evaluated("test", self.test_examples)
        for name, plan in progress.track(list(plans.items()), "strategies"):
            bits = {layer.name: widths[k] for layer, k in zip(layers, plan.choice, strict=True)}
            copy = on if name == main and len(plans) == 1 else on.copy()
            result = self.quantizer(layer_bits=bits)._run(copy, Progress())
            if name == main:
                subject, experts = result.subject, result.tables
                unseen = {k: v for k, v in result.facts.items() if k == "unseen_experts"}
            own = float(cost[rows_of, plan.choice].sum())
            code_bits = float(counted[rows_of, plan.choice].sum() / weights.sum())
            facts = result.facts
            rows.append(
                {
                    "strategy": name,
                    "code_bits": code_bits,
                    "average_bits": facts["average_bits"],
                    "cost": own,
                    "loss": facts["loss"],
                    "change": facts["loss"] - dense["loss"],
                }
                | {k: v for k, v in facts.items() if k in ("accuracy", "perplexity")}
            )
            if self.times:
                rows[-1]["milliseconds"] = plan.size
            if joint is not None:
                rows[-1]["joint_cost"] = float(
                    joint[rows_of[:, None], plan.choice[:, None], rows_of, plan.choice].sum()
                )
            chosen += [{"strategy": name, "layer": layer, "width": width} for layer, width in bits.items()]
        table = pd.DataFrame(rows)
        frontier = pd.DataFrame(
            [
                {
                    "average_bits": float(counted[rows_of, a.choice].sum() / weights.sum()),
                    "size": a.size,
                    "cost": a.cost,
                    "bound": a.bound,
                }
                | {layer.name: widths[k] for layer, k in zip(layers, a.choice, strict=True)}
                for a in front(cost, size)
            ]
        )
        first = table.iloc[0]
        facts = {"dense_loss": dense["loss"]} | {
            k: float(first[k]) for k in ("loss", "average_bits", "code_bits")
        }
        facts |= (
            {"predicted_change": plans[main].cost, "proven_bound": best.bound}
            if joint is None
            else {"predicted_change": plans[main].cost}
        )
        if joint is not None:
            facts["additive_loss"] = float(table["loss"].iloc[1])
        for name in ("uniform", "random", "reversed"):
            part = table[table["strategy"].str.startswith(name)]
            if len(part):
                facts[f"{name}_loss"] = float(part["loss"].mean())
        return self.result(
            table,
            facts | unseen,
            tables={"front": frontier, "widths": pd.DataFrame(chosen), "sensitivity": errors} | experts,
            subject=subject,
        )

    def _weights(self, on: Subject, layers: Sequence[Layer], progress: Progress) -> NDArray[np.float64]:
        """(layers,) how much a bit of each layer's width counts in the average width."""
        if self.average != "multiplications":
            return np.array([math.prod(layer.shape) for layer in layers], dtype=float)
        moments = moments_for(on, layers, self.calibration_examples, progress)
        return np.array(
            [math.prod(layer.shape[-2:]) * float(moments[layer.name].tokens.sum()) for layer in layers]
        )

    def _costs(
        self, on: Subject, layers: Sequence[Layer], widths: list[int], progress: Progress
    ) -> tuple[Costs, pd.DataFrame, Costs | None]:
        rows, deltas = candidates(
            on, layers, [self.quantizer(bits=w) for w in widths], self.calibration_examples, progress
        )
        table = pd.DataFrame([row for layer in layers for row in rows[layer.name]])
        found: WidthCost = self.sensitivity(
            Candidates(
                on, layers, widths, table, deltas, self.predict_examples, self.budget, self.seed, progress
            )
        )
        table = table.assign(cost=found.cost, **found.columns)
        return found.cost.reshape(len(layers), len(widths)), table, found.joint

    def _rivals(
        self, cost: Costs, size: Costs, budget: float, widths: list[int], weights: NDArray[np.float64]
    ) -> dict[str, Allocation]:
        """Allocations of the same size that do not know, or turn around, which layer is sensitive."""
        if not self.draws:
            return {}
        rows = np.arange(len(cost))
        plans = {"uniform": uniform_plan(cost, size, budget, widths)}
        order = np.argsort(cost.mean(1))
        backwards = np.empty_like(cost)
        backwards[order] = cost[order[::-1]]
        random = np.random.default_rng(self.seed)
        rivals = {"reversed": backwards} | {
            f"random {k}": cost[random.permutation(len(cost))] for k in range(self.draws)
        }
        for name, changed in rivals.items():
            plan = allocate(changed, size, budget)
            plans[name] = Allocation(plan.choice, float(cost[rows, plan.choice].sum()), plan.size, -np.inf)
        return plans


def layer_times(path: str, layers: Sequence[Layer], widths: Sequence[int]) -> Costs:
    """(layers, widths) milliseconds from a CSV with columns layer (a glob; the last row that matches wins),
    width and milliseconds.

    `BadInput` when the file cannot be read, lacks a column, holds a time that is not positive,
    or leaves a layer and width out.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, OverflowError) as error:
        raise BadInput(f"times: {path} cannot be read as CSV ({error})") from None
    if missing := {"layer", "width", "milliseconds"} - set(table.columns):
        raise BadInput(
            f"times: {path} lacks the columns {', '.join(sorted(missing))}; "
            f"it has {', '.join(map(str, table.columns))}"
        )
    values = np.array([number(text) for text in table["milliseconds"]], dtype=np.float64)
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        raise BadInput(
            f"times: {path} holds milliseconds that are not positive numbers, "
            f"the first in line {int(np.argmin(good)) + 2}"
        )
    found = np.full((len(layers), len(widths)), np.nan)
    for glob, width, value in zip(table["layer"], map(number, table["width"]), values, strict=True):
        for i, layer in enumerate(layers):
            if width in widths and fnmatchcase(layer.name, glob.strip()):
                found[i, list(widths).index(int(width))] = value
    if len(gaps := np.argwhere(np.isnan(found))):
        raise BadInput(
            f"times: {path} has no time of {layers[gaps[0][0]].name} at width {widths[gaps[0][1]]}; "
            f"every layer needs one at each of {list(widths)}"
        )
    return found


def number(text: str) -> float:
    """The number a cell writes; NaN for anything else."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def uniform_plan(cost: Costs, size: Costs, budget: float, widths: list[int]) -> Allocation:
    """The widest width that fits for every layer; what is left over widens layers from the first on."""
    fitting = [k for k in range(len(widths)) if size[:, k].sum() <= budget]
    choice = np.full(len(cost), fitting[-1], dtype=np.int64)
    rows = np.arange(len(cost))
    for layer in rows:
        trial = choice.copy()
        trial[layer] = min(fitting[-1] + 1, len(widths) - 1)
        if size[rows, trial].sum() <= budget:
            choice = trial
    return Allocation(choice, float(cost[rows, choice].sum()), float(size[rows, choice].sum()), -np.inf)
