"""Allocate: choose every layer's width from scores within a budget, quantize, and measure that beside
allocations of the same size that do not know which layer is sensitive.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.measures.reference import reference_of
from workbench.measures.size import size_of
from workbench.progress import Progress
from workbench.quantization.allocation.allocate_result import UNCOMPARED, AllocateResult
from workbench.quantization.allocation.allocation_scores import AllocationScores, ScoredResult
from workbench.quantization.allocation.budget import Answer, Budget, Problem, budget_of, fronted, solved
from workbench.quantization.allocation.integer_program import Allocation, allocate, front, with_interactions
from workbench.quantization.allocation.layer_times import layer_times
from workbench.quantization.allocation.settings import SWAPS, AllocationSettings
from workbench.quantization.allocation.solver import WIDTH_SOLVER
from workbench.quantization.allocation.width_cost import ideal_widths
from workbench.results import Result
from workbench.storage.forecast import duration
from workbench.subjects import Subject

Costs = NDArray[np.float64]  # (layers, widths)
#: Budgets that are about the model as a whole; with one of them costs are corrected by swapped-in blocks.
WHOLE = ("bits", "size", "target_kl", "milliseconds")
DISTANCES = tuple(f"{kind}{end}" for kind in ("kl", "distance") for end in ("", "_low", "_high"))
WORTH_SAYING = 5.0  # seconds
#: Whether scores come from the cache and go there; None outside of a run.
KEEPS: ContextVar[bool | None] = ContextVar("keeps scores", default=None)


class Allocate(AllocationSettings):
    """Give each layer its width: sensitivities -> integer program -> quantized subject, against uniform,
    random and reversed allocations.
    """

    changes_model: ClassVar[bool] = True

    budget: float = parameter(
        3.0,
        "average width of the codes (0: one of bits, size, target_kl and milliseconds is given)",
        ge=0,
        le=8,
        unit="bits",
        step=0.25,
        group="Other budgets",
    )
    bits: float = parameter(
        0.0,
        "budget of the layers: average bits a weight, scales and zero points counted (0: another budget)",
        ge=0,
        le=16,
        unit="bits",
    )
    size: str = parameter(
        "", "budget of the whole saved model, layers that stay and embeddings included: 80MB, 1.5GiB"
    )
    target_kl: float = parameter(
        0.0,
        "the smallest model that is predicted to stay within this divergence (0: another budget)",
        ge=0,
        unit="nats",
    )
    milliseconds: float = parameter(
        0.0,
        "budget of the layers' measured times, with `times` (0: another budget)",
        ge=0,
        unit="ms",
        group="Other budgets",
    )
    average: Literal["weights", "multiplications", "latency"] = parameter(
        "weights",
        "what the budget limits: bits of the weights (size); "
        "bits times multiplications (bit operations at one activation width: a layer counts for the "
        "tokens it sees); or the layers' measured times, up to that of all layers at the budget's width",
        group="Other budgets",
    )
    times: str = parameter(
        "",
        "CSV of times on the target device, with columns layer (a glob), width and milliseconds; "
        "for average latency and for milliseconds",
        group="Other budgets",
    )
    solver: Choice = WIDTH_SOLVER.choice("integer-program", group="Other budgets")
    draws: int = parameter(
        3,
        "random allocations to compare with (0: compare with none at all)",
        ge=0,
        le=50,
        group="Measurement",
    )
    test_examples: int = parameter(1024, "test examples at most", ge=1, unit="examples", group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return AllocateResult

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Another budget takes the place of the usual one, and asks for costs that add up to what is
        measured.
        """
        if not any(given.get(name) for name in WHOLE):
            return {}
        found: dict[str, Any] = {"budget": 0.0}
        if not given.get("sensitivity.interactions"):
            found["swaps"] = SWAPS
        if given.get("milliseconds"):
            found["average"] = "latency"
        return found

    def asks_beyond(self, on: Any) -> Iterator[str]:
        """The scores tell of calibration examples."""
        return (told for told in super().asks_beyond(on) if told.startswith("test"))

    def held_back(self) -> str:
        return "" if self.draws else UNCOMPARED

    def scorer(self) -> AllocationScores:
        """What the scores rest on; no budget is part of it."""
        unread = set() if self.swaps else {"swap_examples"}
        return AllocationScores(
            **{n: getattr(self, n) for n in AllocationScores.model_fields.keys() - unread}
        )

    def seconds(self, on: Subject, scores: ScoredResult, allocations: int) -> float:
        """What measuring takes, foretold."""
        return scores.measuring(allocations, min(self.test_examples, on.size("test")))

    def foretold_words(self, on: Subject) -> str:
        """The allocation as predicted, where its scores are kept already, and what measuring it takes."""
        self.check(on)
        scorer = self.scorer()
        if not scorer.stored(on):
            return "has no scores yet; workbench run allocation-scores makes them, then this is answered"
        scores = scorer.run(on, Progress())
        assert isinstance(scores, ScoredResult)
        problem = scores.problem()
        plan, size, limit = solved(problem, self.asked(), self.solver)
        count = 1 + len(self._rivals(problem, size, limit))
        words = duration(self.seconds(on, scores, count))
        return f"gives {Answer.of(problem, plan).words()}; measuring {count} allocations takes about {words}"

    def asked(self) -> Budget:
        return budget_of(
            budget=self.budget,
            bits=self.bits,
            size=self.size,
            target_kl=self.target_kl,
            milliseconds=self.milliseconds,
            average=self.average,
            times=self.times,
        )

    def check(self, on: Subject) -> None:
        asked = self.asked()
        if self.budget and not min(self.widths) <= self.budget <= max(self.widths):
            raise BadInput(
                f"budget: {self.budget:g} bits lies outside the widths {self.widths}; "
                "ask for something between them"
            )
        super().check(on)
        least = min(self.widths)  # of codes alone: known before anything is scored
        if asked.field == "bits":
            asked.reaches(least, "{:.4f}", "the codes of the smallest width take")
        if asked.field == "size":
            codes = {layer.name: least * layer.original.numel() / 8 for layer in on.layers(self.layers)}
            told = "embeddings and layers that stay take their place, and with the smallest width all takes"
            asked.reaches(size_of(on, instead=codes).bytes, "{:,.0f} bytes", told)
        if asked.field != "budget" and self.average == "multiplications":
            raise BadInput(
                f"average: multiplications says what `budget` counts, and {asked.field} is given; "
                "leave it out"
            )
        if asked.field in ("bits", "size", "target_kl") and self.average == "latency":
            raise BadInput(
                f"average: latency says what `budget` counts, and {asked.field} is given; leave it out, or "
                "give milliseconds"
            )
        if (self.average == "latency") != bool(self.times):
            raise BadInput(
                f"times: average {self.average} needs a CSV of measured times"
                if not self.times
                else f"times: average {self.average} takes none; leave it empty or set average latency"
            )
        if self.times:
            layer_times(self.times, on.layers(self.layers), self.widths)
        if self.swaps and getattr(self.sensitivity.options, "interactions", False):
            raise BadInput("swaps: costs of pairs of layers are not corrected by them; set swaps to 0")

    def key(self, on: Any) -> str:
        """As for every instrument, with what the file of times holds."""
        own, file = super().key(on), Path(self.times)
        return (
            hashlib.sha256(own.encode() + file.read_bytes()).hexdigest()[:24]
            if self.times and file.is_file()
            else own
        )

    def run(
        self,
        on: Any,
        progress: Progress | None = None,
        cache: bool = True,
        fresh: bool = False,
        memory: int | str | None = None,
    ) -> Result:
        """As for every instrument; the scores are kept, and taken, where this result is."""
        with scores_kept(cache):
            return super().run(on, progress, cache, fresh, memory)

    def _again(self, on: Any, count: int) -> Any:
        """The subject of a cached run, from the scores that it rested on."""
        with scores_kept(True):
            return super()._again(on, count)

    def _run(self, on: Subject, progress: Progress) -> Result:
        scores = self.scorer().run(on, progress, cache=bool(KEEPS.get()))
        assert isinstance(scores, ScoredResult)
        problem, joint = scores.problem(), scores.arrays.get("joint")
        best, size, limit = solved(problem, self.asked(), self.solver)
        plans = {str(self.solver).replace("-", " "): best}
        if joint is not None:  # from the additive optimum, so it costs no more than that
            plans = {"with interactions": with_interactions(joint, size, limit, best.choice.tolist())} | plans
        main = next(iter(plans))
        plans |= self._rivals(problem, size, limit)
        if (seconds := self.seconds(on, scores, len(plans))) > WORTH_SAYING:
            progress.say(f"measuring {len(plans)} allocations takes about {duration(seconds)}")
        reference_of(on, "test", self.test_examples, progress)
        dense = on.evaluated("test", self.test_examples)
        rows, chosen, subject = [], [], None
        experts, unseen = dict[str, pd.DataFrame](), dict[str, Any]()
        for name, plan in progress.track(list(plans.items()), "strategies"):
            copy = on if name == main and len(plans) == 1 else on.copy()
            bits = problem.named(plan.choice)
            result = self.quantizer(layer_bits=bits, test_examples=self.test_examples)._run(copy, Progress())
            if name == main:
                subject, experts = result.subject, result.tables
                unseen = {k: v for k, v in result.facts.items() if k == "unseen_experts"}
            rows.append(self._row(name, problem, plan, result, dense["loss"], joint))
            chosen += [{"strategy": name, "layer": layer, "width": width} for layer, width in bits.items()]
            del copy, result
        table = pd.DataFrame(rows)
        sensitivity = scores.table
        if "share" in sensitivity and "variance" in sensitivity:
            average = problem.code_bits(best.choice) if self.asked().field != "budget" else self.budget
            ideal = ideal_widths(sensitivity, len(problem.widths), average)
            sensitivity = sensitivity.drop(columns="share").assign(ideal_width=ideal)
        facts = self._facts(table, dense["loss"], problem, plans, best) | unseen
        tables = {
            "front": fronted(problem, front(problem.cost, size), self.average),
            "widths": pd.DataFrame(chosen),
            "sensitivity": sensitivity,
            "scored": scores.tables["scored"],
        }
        if "blocks" in scores.tables:
            tables["blocks"] = scores.tables["blocks"]
        made = self.result(table, facts, tables=tables | experts, subject=subject)
        assert isinstance(made, AllocateResult)
        if subject is not None and not made.compared:
            subject.held_back = UNCOMPARED
        return made

    def _row(
        self,
        name: str,
        problem: Problem,
        plan: Allocation,
        result: Result,
        dense: float,
        joint: NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        """A strategy as measured, beside what was predicted of it."""
        facts, rows = result.facts, problem.rows
        row: dict[str, Any] = {
            "strategy": name,
            "code_bits": problem.code_bits(plan.choice, self.average),
            "average_bits": facts["average_bits"],
            "bytes": size_of(result.subject).bytes,
            "cost": problem.damage(plan.choice),
            "loss": facts["loss"],
            "change": facts["loss"] - dense,
        }
        kept = ("accuracy", "perplexity", *DISTANCES)
        row |= {k: v for k, v in facts.items() if k in kept}
        if self.times:
            times = problem.times(self.times)
            row["milliseconds"] = float(times[rows, plan.choice].sum())
        if joint is not None:
            row["joint_cost"] = float(joint[rows[:, None], plan.choice[:, None], rows, plan.choice].sum())
        return row

    def _facts(
        self,
        table: pd.DataFrame,
        dense: float,
        problem: Problem,
        plans: Mapping[str, Allocation],
        best: Allocation,
    ) -> dict[str, Any]:
        first, main = table.iloc[0], next(iter(plans.values()))
        facts: dict[str, Any] = {"dense_loss": dense}
        facts |= {k: float(first[k]) for k in ("loss", "average_bits", "code_bits", "bytes")}
        facts["predicted_change"] = main.cost
        if main is best:
            facts["proven_bound"] = best.bound
        else:
            facts["additive_loss"] = float(table["loss"].iloc[1])
        measured = [name for name in DISTANCES if name in table]
        facts |= {name: float(first[name]) for name in measured}
        if problem.unit in measured and main is best:
            facts[f"predicted_{problem.unit}"] = problem.damage(best.choice)
        for name in ("uniform", "random", "reversed"):
            part = table[table["strategy"].str.startswith(name)]
            if len(part):
                facts |= {f"{name}_{k}": float(part[k].mean()) for k in ("loss", *measured[:1], "bytes")}
        return facts

    def _rivals(self, problem: Problem, size: Costs, limit: float) -> dict[str, Allocation]:
        """Allocations of the same size that do not know, or turn around, which layer is sensitive."""
        if not self.draws:
            return {}
        cost, rows = problem.cost, problem.rows
        plans = {"uniform": uniform_plan(cost, size, limit)}
        order = np.argsort(cost.mean(1))
        backwards = np.empty_like(cost)
        backwards[order] = cost[order[::-1]]
        random = np.random.default_rng(self.seed)
        rivals = {"reversed": backwards} | {
            f"random {k}": cost[random.permutation(len(cost))] for k in range(self.draws)
        }
        for name, changed in rivals.items():
            plan = allocate(changed, size, limit)
            plans[name] = Allocation(plan.choice, float(cost[rows, plan.choice].sum()), plan.size, -np.inf)
        return plans


@contextlib.contextmanager
def scores_kept(keeps: bool) -> Iterator[None]:
    """Inside, scores come from the cache and go there, or not; who says so first decides."""
    token = KEEPS.set(keeps if KEEPS.get() is None else KEEPS.get())
    try:
        yield
    finally:
        KEEPS.reset(token)


def uniform_plan(cost: Costs, size: Costs, budget: float) -> Allocation:
    """The widest width that fits for every layer; what is left over widens layers from the first on."""
    widths = cost.shape[1]
    rows = np.arange(len(cost))
    fitting = [k for k in range(widths) if size[:, k].sum() <= budget]
    if not fitting:  # times need not grow with the width: no one width fits, each layer's fastest does
        choice = size.argmin(1)
        return Allocation(choice, float(cost[rows, choice].sum()), float(size[rows, choice].sum()), -np.inf)
    choice = np.full(len(cost), fitting[-1], dtype=np.int64)
    for layer in rows:
        trial = choice.copy()
        trial[layer] = min(fitting[-1] + 1, widths - 1)
        if size[rows, trial].sum() <= budget:
            choice = trial
    return Allocation(choice, float(cost[rows, choice].sum()), float(size[rows, choice].sum()), -np.inf)
