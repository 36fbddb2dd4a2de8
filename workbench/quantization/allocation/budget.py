"""What an allocation chooses among, and what it is to keep to: bits, bytes of the saved model, divergence or
time. Everything here is arithmetic on stored scores: no model is asked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.quantization.allocation.integer_program import Allocation
from workbench.quantization.allocation.layer_times import LayerName, layer_times
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.storage.forecast import bytes_of, in_words

Table = NDArray[np.float64]  # (layers, widths)
#: A budget is met to the last bit of a sum of doubles.
SLACK = 1 + 1e-12


@dataclass(frozen=True)
class Problem:
    """Every layer at every width, with what it costs and takes.

    cost : (layers, widths), what the sum is predicted to do to the model;  unit : "kl", "distance" or "" when
        `cost` is no prediction of what a whole model's answers do
    bytes : (layers, widths), scales and zero points counted;  rest : bytes of everything else that is saved
    weights, tokens : (layers,), a layer's weights, and the tokens that each of its matrices sees
    work : (layers,), multiplications of the calibration examples
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    cost: Table
    bytes: Table
    weights: NDArray[np.float64]
    work: NDArray[np.float64]
    rest: float
    unit: str = ""

    @classmethod
    def of(cls, table: pd.DataFrame, rest: float, unit: str) -> Problem:
        """From a table with one row a layer and width, layers first."""
        layers = tuple(dict.fromkeys(table["layer"].astype(str)))
        shape = (len(layers), -1)
        first = table.iloc[:: len(table) // len(layers)]
        return cls(
            layers,
            tuple(int(width) for width in table["width"].iloc[: len(table) // len(layers)]),
            table["cost"].to_numpy(dtype=float).reshape(shape),
            table["bytes"].to_numpy(dtype=float).reshape(shape),
            first["weights"].to_numpy(dtype=float),
            first["work"].to_numpy(dtype=float),
            rest,
            unit,
        )

    @property
    def rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.layers))

    @functools.cached_property
    def codes(self) -> Table:
        """(layers, widths) bits of the codes alone."""
        return self.weights[:, None] * np.array(self.widths)[None]

    def times(self, path: str) -> Table:
        return layer_times(path, [LayerName(name) for name in self.layers], self.widths)

    def total_bytes(self, choice: NDArray[np.int64]) -> float:
        """Of the whole saved model."""
        return self.rest + float(self.bytes[self.rows, choice].sum())

    def bits(self, choice: NDArray[np.int64]) -> float:
        """A weight of the layers, scales and zero points counted."""
        return 8 * float(self.bytes[self.rows, choice].sum()) / float(self.weights.sum())

    def code_bits(self, choice: NDArray[np.int64], average: str = "weights") -> float:
        """Average width of the codes, each layer by its weights or its multiplications."""
        counted = self.work if average == "multiplications" else self.weights
        return float((counted * np.array(self.widths)[choice]).sum() / counted.sum())

    def damage(self, choice: NDArray[np.int64]) -> float:
        """The predicted one of the whole model: the sum over its layers."""
        return float(self.cost[self.rows, choice].sum())

    def named(self, choice: NDArray[np.int64]) -> dict[str, int]:
        return {name: self.widths[k] for name, k in zip(self.layers, choice, strict=True)}


@dataclass(frozen=True)
class Budget:
    """What an allocation keeps to.

    field : budget (bits of the codes), bits (scales and zero points counted), size (bytes of the whole
        model), target_kl or milliseconds;  value : how much
    average : what `budget` counts;  times : a file of times
    """

    field: str
    value: float
    average: str = "weights"
    times: str = ""

    def limit(self, problem: Problem) -> tuple[Table, float]:
        """(layers, widths) what is limited, and its limit; `BadInput` where nothing stays within it."""
        if self.field == "budget":
            size = problem.codes
            if self.average == "multiplications":
                size = problem.work[:, None] * np.array(problem.widths)[None]
            if self.average == "latency":
                size = problem.times(self.times)
            return size, float(np.interp(self.value, problem.widths, size.sum(0))) * SLACK
        if self.field == "milliseconds":
            size = problem.times(self.times)
            least = float(size.min(1).sum())
            self.reaches(least, "{:.6g}", "the fastest width of every layer takes")
            return size, self.value * SLACK
        least = float(problem.bytes.min(1).sum())
        if self.field == "bits":
            weights = float(problem.weights.sum())
            told = "with scales and zero points the smallest width of every layer takes"
            self.reaches(8 * least / weights, "{:.4f}", told)
            return problem.bytes, self.value * weights / 8 * SLACK
        rest = in_words(problem.rest)
        told = f"embeddings and layers that stay take {rest}, and with the smallest widths all takes"
        self.reaches(problem.rest + least, "{:,.0f} bytes", told)
        return problem.bytes, (self.value - problem.rest) * SLACK

    def reaches(self, least: float, written: str, told: str) -> None:
        """`BadInput` when less is given than has to be."""
        if least > self.value * SLACK:
            raise BadInput(
                f"{self.field}: {written.format(self.value)} cannot be met: {told} {written.format(least)}; "
                "give as much or more, a smaller width among widths, or a larger group_size"
            )


def solved(problem: Problem, budget: Budget, solver: Choice | None = None) -> tuple[Allocation, Table, float]:
    """The cheapest allocation within the budget, what is limited, and its limit. For a target of divergence
    the smallest model that is predicted to stay below it; its own bytes are then the limit.
    """
    solve = solver or WIDTH_SOLVER.chosen("integer-program")
    if budget.field != "target_kl":
        size, limit = budget.limit(problem)
        return solve(problem.cost, size, limit), size, limit
    if problem.unit != "kl":
        raise BadInput(
            "target_kl: these scores do not predict a divergence; give swaps 4 or more, which measure some "
            "blocks, on a subject whose outputs are distributions"
        )
    least = float(problem.cost.min(1).sum())
    if least > budget.value * SLACK:
        raise BadInput(
            f"target_kl: {budget.value:.6g} cannot be met: with the best width of every layer {least:.3g} is "
            "predicted; give as much or more, or a larger width among widths"
        )
    found = solve(problem.bytes, problem.cost, budget.value * SLACK)
    bytes_ = float(problem.bytes[problem.rows, found.choice].sum())
    return (
        Allocation(found.choice, problem.damage(found.choice), bytes_, -np.inf),
        problem.bytes,
        bytes_ * SLACK,
    )


def budget_of(
    *,
    budget: float = 0.0,
    bits: float = 0.0,
    size: str | float = "",
    target_kl: float = 0.0,
    milliseconds: float = 0.0,
    average: str = "weights",
    times: str = "",
) -> Budget:
    """The one budget that is given (what is zero or empty is not); `BadInput` for none, and for two."""
    told = {
        "budget": budget,
        "bits": bits,
        "size": size,
        "target_kl": target_kl,
        "milliseconds": milliseconds,
    }
    given = {name: value for name, value in told.items() if value}
    if len(given) > 1:
        (one, first), (two, second) = list(given.items())[:2]
        raise BadInput(
            f"{two}: {second} is given beside {one} {first}; an allocation keeps to one budget, leave one out"
        )
    if not given:
        raise BadInput(f"budget: none is given; give one of {', '.join(told)}")
    ((name, value),) = given.items()
    number = float(bytes_of(value, "size")) if name == "size" else float(value)
    return Budget(name, number, average if name == "budget" else "weights", times)


def budget_in(text: str) -> dict[str, Any]:
    """A budget as somebody writes it: "80MB", "4.5 bits", "KL 0.05" or "12 ms" -> what `budget_of` takes."""
    found = re.fullmatch(r"\s*(?:(kl)\s*)?([\d.,]+(?:e-?\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = (found[1] or found[3]).lower() if found else ""
    name = {"bits": "bits", "bit": "bits", "kl": "target_kl", "nats": "target_kl", "ms": "milliseconds"}.get(
        unit
    )
    if found is None or name is None:
        if found is None or not found[3]:
            raise BadInput(f"budget: {text!r} is none; write 80MB, 4.5 bits, KL 0.05 or 12 ms")
        bytes_of(text, "budget")
        return {"size": text.strip()}
    try:
        return {name: float(found[2])}
    except ValueError:
        raise BadInput(f"budget: {found[2]!r} is no number; write 80MB, 4.5 bits, KL 0.05 or 12 ms") from None


@dataclass(frozen=True)
class Answer:
    """An allocation, predicted.

    widths : layer -> width, what `Quantize(layer_bits=...)` takes
    bits : a weight of these layers, scales and zero points counted;  code_bits : of the codes alone
    bytes : of the whole saved model;  predicted : what its answers are predicted to do, in `unit`
    """

    widths: dict[str, int]
    bits: float
    code_bits: float
    bytes: float
    predicted: float
    unit: str
    plan: Allocation

    @classmethod
    def of(cls, problem: Problem, plan: Allocation) -> Answer:
        choice = plan.choice
        return cls(
            problem.named(choice),
            problem.bits(choice),
            problem.code_bits(choice),
            problem.total_bytes(choice),
            problem.damage(choice),
            problem.unit,
            plan,
        )

    def words(self) -> str:
        damage = {"kl": "KL", "distance": "distance"}.get(self.unit, "cost")
        return (
            f"{in_words(self.bytes)}, {self.bits:.2f} bits a weight with scales and zero points "
            f"({self.code_bits:.2f} without), predicted {damage} {self.predicted:.3g}"
        )


def fronted(problem: Problem, plans: Sequence[Allocation], average: str = "weights") -> pd.DataFrame:
    """One row a point of the front, the layers' widths beside it."""
    return pd.DataFrame(
        [
            {
                "code_bits": problem.code_bits(plan.choice, average),
                "average_bits": problem.bits(plan.choice),
                "bytes": problem.total_bytes(plan.choice),
                "size": plan.size,
                "cost": plan.cost,
                "bound": plan.bound,
            }
            | problem.named(plan.choice)
            for plan in plans
        ]
    )
