"""Scores of every layer at every width, kept: any budget is answered from them without asking the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel

from workbench.axis import Choice
from workbench.measures.reference import kind_of
from workbench.measures.size import size_of
from workbench.progress import Progress
from workbench.quantization.allocation.budget import Answer, Problem, budget_of, fronted, solved
from workbench.quantization.allocation.integer_program import front
from workbench.quantization.allocation.layer_sensitivity import candidates
from workbench.quantization.allocation.settings import SWAPS, AllocationSettings, swaps_parameter
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.quantization.allocation.swapped import corrected, groups_of
from workbench.quantization.allocation.width_cost import Candidates, WidthCost
from workbench.quantization.quantize_result import choices
from workbench.quantization.quantized_layer import moments_for
from workbench.results import Result
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


class ScoredResult(Result):
    """A result that holds scores: it answers any budget, predicted, from its own tables."""

    #: The table with one row a layer and width; "" is the main one.
    scores: ClassVar[str] = ""

    def problem(self) -> Problem:
        table = self.tables[self.scores] if self.scores else self.table
        return Problem.of(table, float(self.facts["rest_bytes"]), str(self.facts.get("cost_unit", "")))

    def allocation(self, *, solver: str | Choice = "integer-program", **budget: Any) -> Answer:
        """The best allocation within one budget, predicted: `bits`, `size` ("80MB"), `target_kl`,
        `milliseconds` with `times`, or `budget` (bits of the codes) with its `average`.
        """
        problem = self.problem()
        plan, _, _ = solved(problem, budget_of(**budget), WIDTH_SOLVER.chosen(solver, "solver"))
        return Answer.of(problem, plan)


class AllocationScoresResult(ScoredResult):
    """Every layer at every width, and the front of what can be had for how many bytes."""

    def figure(self, view: str = "front", **more: Any) -> go.Figure:
        from workbench.figures import figure, line

        unit = {"kl": "predicted KL (nats)", "distance": "predicted distance"}.get(
            str(self.facts.get("cost_unit", "")), "predicted cost"
        )
        if view == "layers":
            fig = figure("Predicted cost of each layer", "layer", unit, yaxis_type="log")
            for index, (width, part) in enumerate(self.table.groupby("width")):
                layers, cost = part["layer"].to_numpy(), part["cost"].to_numpy()
                line(fig, layers, cost, f"{width} bits", mode="lines+markers", index=index)
            return fig
        fig = figure("What can be had for how many bytes", "size (MB)", unit, yaxis_type="log")
        found = self.tables["front"]
        line(fig, found["bytes"].to_numpy() / 1e6, found["cost"].to_numpy(), "best allocations")
        return fig

    def view_model(self) -> type[BaseModel] | None:
        return choices("AllocationScoresView", view=("front", "layers"))


class AllocationScores(AllocationSettings):
    """Score every layer at every width once; any budget in bits, bytes, divergence or time is then answered
    in under a second, predicted.
    """

    summary_line: ClassVar[str] = "scores of every layer at every width, for an allocation of any budget"

    swaps: int = swaps_parameter(SWAPS)

    @classmethod
    def result_class(cls) -> type[Result]:
        return AllocationScoresResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        widths = sorted(self.widths)
        began = time.perf_counter()
        moments = moments_for(on, layers, self.calibration_examples, progress)
        collected = time.perf_counter()
        rows, deltas = candidates(
            on, layers, [self.quantizer(bits=w) for w in widths], self.calibration_examples, progress
        )
        rounded = time.perf_counter()
        table = pd.DataFrame([row for layer in layers for row in rows[layer.name]])
        found: WidthCost = self.sensitivity(
            Candidates(on, layers, widths, table, deltas, self.predict_examples, self.seed, progress)
        )
        estimated = time.perf_counter()
        cost = np.asarray(found.cost, dtype=float).reshape(len(layers), len(widths))
        columns = dict(found.columns)
        tables = {}
        unit = self.unit(on)
        if self.swaps:
            weights = np.array([float(math.prod(layer.shape)) for layer in layers])
            made = corrected(
                on, layers, widths, deltas, cost, weights, self.swaps, self.swap_examples, progress
            )
            columns["uncorrected"] = cost.reshape(-1)
            cost, tables["blocks"] = made.cost, made.table
        tokens = [float(moments[layer.name].tokens.sum()) for layer in layers]
        table = table.assign(
            block=blocks_of(on, layers, len(widths)),
            work=np.repeat(
                [math.prod(x.shape[-2:]) * n for x, n in zip(layers, tokens, strict=True)], len(widths)
            ),
            cost=cost.reshape(-1),
            **columns,
        )
        first = {layer.name: rows[layer.name][0]["bytes"] for layer in layers}
        facts: dict[str, Any] = {"cost_unit": unit} if unit else {}
        facts |= {
            "layers": len(layers),
            "weights": int(table["weights"].iloc[:: len(widths)].sum()),
            "rest_bytes": size_of(on, instead=first).bytes - sum(first.values()),
            "collect_seconds": collected - began,
            "round_seconds": (rounded - collected) / len(widths),
            "estimate_seconds": estimated - rounded,
            "swap_seconds": time.perf_counter() - estimated,
        }
        problem = Problem.of(table, float(facts["rest_bytes"]), unit)
        tables["front"] = fronted(problem, front(problem.cost, problem.bytes))
        facts |= {
            "smallest_bytes": float(tables["front"]["bytes"].iloc[0]),
            "largest_bytes": float(tables["front"]["bytes"].iloc[-1]),
        }
        arrays = {} if found.joint is None else {"joint": found.joint}
        return self.result(table, facts, tables=tables, arrays=arrays)

    def unit(self, on: Subject) -> str:
        """What the costs add up to."""
        kind = kind_of(on.task)
        distributions = kind in ("language", "classification")
        if self.swaps or self.sensitivity.has("measured distance"):
            return "kl" if distributions else "distance"
        return "kl" if distributions and self.sensitivity.has("divergence") else ""


def blocks_of(on: Subject, layers: Sequence[Layer], widths: int) -> NDArray[np.str_]:
    """The block of each row."""
    home = {row: name for name, rows in groups_of(on, layers).items() for row in rows}
    return np.repeat([home[row] for row in range(len(layers))], widths)
