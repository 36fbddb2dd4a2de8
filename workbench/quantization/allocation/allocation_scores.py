"""Scores of every layer at every width, kept: any budget is answered from them without asking the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.measures.reference import batch_of, kind_of
from workbench.measures.size import size_of
from workbench.progress import Progress
from workbench.quantization.allocation.budget import Answer, Problem, budget_of, fronted, solved
from workbench.quantization.allocation.integer_program import front
from workbench.quantization.allocation.layer_sensitivity import candidates
from workbench.quantization.allocation.settings import SWAPS, AllocationSettings, swaps_parameter
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.quantization.allocation.swapped import corrected, groups_of
from workbench.quantization.allocation.width_cost import Candidates, WidthCost
from workbench.quantization.quantized_layer import moments_for
from workbench.results import Result, choices
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


#: Columns of the front that are no layer's width.
ABOUT = ("code_bits", "average_bits", "bytes", "size", "cost", "bound")


class ScoredResult(Result):
    """A result that holds scores: it answers any budget, predicted, from its own tables."""

    #: The table with one row a layer and width; "" is the main one.
    scores: ClassVar[str] = ""

    def problem(self) -> Problem:
        if "scored" not in self.tables:
            raise BadInput(
                "result: it was made by an earlier version and holds no sizes; run allocation-scores again"
            )
        table = self.tables[self.scores] if self.scores else self.table
        about = self.tables["scored"].iloc[0]
        return Problem.of(table, float(about["rest_bytes"]), str(about["unit"]))

    def measuring(self, allocations: int, examples: int) -> float:
        """Seconds that it takes to round so many allocations and ask each about so many examples, by what the
        scores took.
        """
        about = self.tables["scored"].iloc[0]
        return allocations * float(about["round_seconds"] + examples * about["forward_seconds"])

    @property
    def widths_column(self) -> str:
        """The front's column of the codes' average width; of a result of an earlier version, its only one."""
        return "code_bits" if "code_bits" in self.tables["front"] else "average_bits"

    def widths_for(self, code_bits: float) -> dict[str, int]:
        """layer -> width on the front's point whose codes take at most this many bits on average:
        what `Quantize(layer_bits=...)` takes. For another budget see `allocation`.
        """
        table = self.tables["front"]
        bits = table[self.widths_column]
        fitting = table[bits <= code_bits + 1e-9]
        if fitting.empty:
            raise BadInput(f"code_bits: {code_bits:g} is below the smallest allocation, {bits.min():g}")
        chosen = fitting.iloc[-1]
        return {name: int(chosen[name]) for name in table.columns if name not in ABOUT}

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
        from workbench.figures import by_layer, figure, line

        unit = {"kl": "predicted KL (nats)", "distance": "predicted distance"}.get(
            self.problem().unit, "predicted cost"
        )
        if view == "layers":
            wide = self.table.pivot(index="layer", columns="width", values="cost")
            names = list(dict.fromkeys(self.table["layer"]))
            costs = {f"{width} bits": wide[width].loc[names] for width in wide}
            return by_layer("Predicted cost of each layer", names, costs, unit, log=True)
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
        swapped = time.perf_counter()
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
        rest = size_of(on, instead=first).bytes - sum(first.values())
        tables["scored"] = pd.DataFrame(
            [
                {
                    "unit": unit,
                    "rest_bytes": rest,
                    "round_seconds": (rounded - collected) / len(widths),
                    "forward_seconds": forward_seconds(on),
                }
            ]
        )
        problem = Problem.of(table, rest, unit)
        tables["front"] = fronted(problem, front(problem.cost, problem.bytes))
        facts = {
            "layers": len(layers),
            "weights": int(table["weights"].iloc[:: len(widths)].sum()),
            "smallest_bytes": float(tables["front"]["bytes"].iloc[0]),
            "largest_bytes": float(tables["front"]["bytes"].iloc[-1]),
            "rest_bytes": rest,
            "collect_seconds": collected - began,
            "round_seconds": rounded - collected,
            "estimate_seconds": estimated - rounded,
            "swap_seconds": swapped - estimated,
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


@torch.no_grad()
def forward_seconds(on: Subject, examples: int = 8) -> float:
    """Seconds that an answer to one calibration example takes, several at once."""
    batch = next(on.batches("calibration", batch_of(on, "calibration"), examples))
    began = time.perf_counter()
    on.task.output(on.model, batch)
    return (time.perf_counter() - began) / len(next(iter(batch.values())))


def blocks_of(on: Subject, layers: Sequence[Layer], widths: int) -> NDArray[np.str_]:
    """The block of each row."""
    home = {row: name for name, rows in groups_of(on, layers).items() for row in rows}
    return np.repeat([home[row] for row in range(len(layers))], widths)
