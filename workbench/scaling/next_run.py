"""The `next-run` instrument: which run to make next, by what it would teach about a target."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.axis import Choice, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.comparison import compute_of
from workbench.scaling.doubt.law_band import law_tables
from workbench.scaling.formulas.lawbook import LAW, law
from workbench.scaling.law_figures import band_figure
from workbench.scaling.objective import OBJECTIVE
from workbench.scaling.proposing.cells import points
from workbench.scaling.proposing.figures import pool_figure, target_figure
from workbench.scaling.proposing.proposals import Asked, Proposer, Rule, completed, priced
from workbench.scaling.runs import Runs
from workbench.scaling.scaling_fit import ScalingFit

#: Sides of the grid of candidates that is made when none are given.
SIDE = 12


class NextRunView(BaseModel):
    """What to draw of proposed runs."""

    view: Literal["pool", "target", "laws"] = Field(
        "pool",
        description="what each candidate would teach against its cost, the target's interval, the laws",
    )


class NextRunResult(Result):
    """Proposed runs: `table` holds them in order; `tables` pool, target, laws, law_band, runs."""

    def view_model(self) -> type[BaseModel]:
        return NextRunView

    def figure(self, view: str = "pool", **more: Any) -> go.Figure:
        makers = {"pool": pool_figure, "target": target_figure, "laws": band_figure}
        if view not in makers:
            raise BadInput(f"view: {view!r} is not accepted, it should be one of {', '.join(makers)}")
        return makers[view](self)


class NextRun(Instrument):
    """Which run to make next: by how much each candidate is expected to narrow the interval of the loss at a
    target, per unit of cost, over several laws and their parameters.
    """

    on: ClassVar[Literal["subject", "runs"]] = "runs"

    target: str = parameter(
        "",
        "what is to be known: a cell or a region, such as 'params=7e9, tokens=1e11:1e12:3'; "
        "empty: ten times the compute of the largest run",
    )
    pool: str = parameter(
        "",
        "runs that could be made: 'params=1e7:1e9:9, tokens=1e9:1e11:9', or a file with such columns and "
        "maybe cost; empty: a grid over the sizes and tokens of the runs, up to the budget",
    )
    budget: float | None = parameter(
        None,
        "what the proposed runs may cost together (FLOPs, or what cost counts); default: a third of the "
        "target's compute, or the dearest candidate of a pool with costs of its own",
        gt=0,
    )
    batch: int = parameter(1, "runs to propose at once", ge=1, le=1000)
    rule: Rule = parameter(
        "per cost", "the largest fall of variance per cost, or the largest in total", group="Choice"
    )
    worth: float = parameter(
        0.05,
        "share of the interval that the whole budget must be worth; a run pro rata",
        ge=0,
        lt=1,
        group="Choice",
    )
    width: float | None = parameter(
        None,
        "propose no more once the interval's half-width (relative, for losses) is expected to be this",
        gt=0,
        group="Choice",
    )
    law: Choice = LAW.choice("chinchilla")
    against: tuple[str, ...] = parameter(
        ("kaplan", "over-training", "power-compute"),
        "other laws that may be right, weighed on held-out compute",
    )
    objective: Choice = OBJECTIVE.choice("huber", group="Fit")
    lowest_per_cell: bool = parameter(
        False,
        "of runs that differ only in what the law does not see (learning rate, seed), take the lowest loss",
        group="Fit",
    )
    starts: int = parameter(
        128, "starting points of each law's search", ge=1, le=100_000, scale="log", group="Fit"
    )
    resamples: int = parameter(
        200, "draws of each law's parameters", ge=20, le=20_000, scale="log", group="Fit"
    )
    level: float = parameter(0.9, "probability content of every interval", gt=0, lt=1, group="Fit")

    @classmethod
    def result_class(cls) -> type[Result]:
        return NextRunResult

    def code(self) -> str:
        """Also the code of the laws that are called by name."""
        called = [LAW.chosen(name, "against").entry for name in self.against]
        return code_version(type(self), [entry.value for entry in (*entries_in(self), *called)])

    def key(self, on: Any) -> str:
        """Also what the files hold that the fields name."""
        held = [
            hashlib.sha256(Path(text).read_bytes()).hexdigest()
            for text in (self.target, self.pool)
            if "=" not in text and text and Path(text).is_file()
        ]
        return hashlib.sha256(json.dumps([super().key(on), held]).encode()).hexdigest()[:24]

    def check(self, on: Any) -> None:
        """`BadInput` for a missing column, an unknown law, a pool or target that cannot be read."""
        for other in self.against:
            law(other)
        self._kept(on)
        self.goal(on)
        priced(self.candidates(on))

    def goal(self, on: Any) -> pd.DataFrame:
        """The target's cells."""
        if self.target:
            return completed(points(self.target, "target"), law(self.law), on, "target")
        table = on.table
        largest = table.iloc[int(compute_of(table).argmax())]
        grown = {c: float(largest[c]) * 10**0.5 for c in ("params", "tokens") if c in table}
        if len(grown) < 2:
            raise BadInput("target: is empty and the runs have no params and tokens; write 'flops=1e22'")
        others = {c: float(largest[c]) for c in law(self.law).columns if c in table and c != "flops"}
        return points(pd.DataFrame([others | grown]), "target")

    def spends(self, on: Any) -> float | None:
        """The budget; without one a third of the target's compute, or what the dearest candidate costs."""
        if self.budget is not None:
            return self.budget
        if self.pool and "cost" in points(self.pool, "pool"):
            return None
        goal = self.goal(on)
        return float(goal.flops.min()) / 3 if "flops" in goal else None

    def candidates(self, on: Any) -> pd.DataFrame:
        """The pool; without one, a grid of sizes and tokens from the runs' smallest to three times their
        largest, what the budget allows of it.
        """
        if self.pool:
            return completed(points(self.pool, "pool"), law(self.law), on, "pool")
        table, budget = on.table, self.spends(on)
        if not {"params", "tokens"} <= set(table) or budget is None:
            raise BadInput(
                "pool: is empty and the runs have no params and tokens; write 'flops=1e18:1e20:20'"
            )
        axes = ", ".join(
            f"{c}={table[c].min():.6g}:{3 * table[c].max():.6g}:{SIDE}" for c in ("params", "tokens")
        )
        grid = points(axes, "pool")
        grid = grid[compute_of(grid) <= budget].reset_index(drop=True)
        if not len(grid):
            raise BadInput(
                f"budget: {budget:.3g} FLOPs are less than any run between the smallest and three times the "
                "largest takes; raise it or give a pool"
            )
        return grid

    def _kept(self, on: Any) -> Runs:
        """The runs that are fitted; BadInput for a column that the law needs and they lack."""
        chooser = ScalingFit(law=self.law, lowest_per_cell=self.lowest_per_cell, against=())
        chooser.check(on)
        return on.where(chooser.kept(on))

    def _run(self, on: Runs, progress: Progress) -> Result:
        names = [str(self.law), *(name for name in self.against if name != str(self.law))]
        chosen = law(self.law)
        kept = self._kept(on)
        proposer = Proposer(
            kept,
            names,
            self.goal(on),
            self.candidates(on),
            self.objective("log" if chosen.positive else "linear"),
            self.level,
            self.worth,
            self.starts,
            self.resamples,
            self.seed,
            progress,
        )
        asked = proposer.ask(self.batch, self.spends(on), self.width, self.rule)
        left_out = pd.DataFrame(list(proposer.stack.left_out.items()), columns=["law", "certificate"])
        tables = {
            "pool": asked.pool,
            "target": asked.target,
            "laws": pd.concat([proposer.stack.table, left_out.assign(weight=0.0)], ignore_index=True),
            "runs": kept.table,
        }
        tables |= law_tables(proposer.stack, kept.table, self.level) | {"laws": tables["laws"]}
        return self.result(asked.table, self._facts(asked, proposer), tables=tables)

    def _facts(self, asked: Asked, proposer: Proposer) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "proposed": len(asked.table),
            "candidates": len(asked.pool),
            "half_width": asked.half_width,
        }
        if len(asked.table):
            last = asked.table.iloc[-1]
            facts |= {"half_width_after": float(last.half_width), "cost": float(last.spent)}
        if len(asked.target) == 1:
            facts |= {c: float(asked.target[c].iloc[0]) for c in ("predicted", "low", "high")}
        facts["laws"] = proposer.stack.said
        if proposer.stack.held_out == 0:
            facts["weights"] = "equal: too few runs to hold any out"
        if proposer.stack.left_out:
            facts["left_out"] = ", ".join(proposer.stack.left_out)
        if asked.note:
            facts["note"] = asked.note
        return facts
