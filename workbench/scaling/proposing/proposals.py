"""Which run to make next: candidates weighed by what they would teach about a target, per unit of cost.

    proposer = Proposer(runs, ("chinchilla", "kaplan"), target="params=7e9, tokens=1.4e11",
                        pool="params=1e7:1e9:9, tokens=1e9:1e11:9")
    asked = proposer.ask(3, budget=1e20)
        # asked.table: the runs and what each would teach; asked.note: why no more
    proposer.tell({"params": 1e8, "tokens": 2e9, "loss": 3.1})
        # a run that was made: foretold beside observed, and everything is fitted again

The laws are stacked on held-out compute (`doubt.stacking`), each with draws of its parameters; the expected
fall of the target's variance is that of `proposing.learning`. Runs in a batch are chosen one after the other,
each with those before it taken as made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.scaling.comparison import compute_of
from workbench.scaling.doubt.prediction import PredictionIntervals
from workbench.scaling.doubt.stacking import Stack, scale_of, stack
from workbench.scaling.formulas.lawbook import LAW, law
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective
from workbench.scaling.proposing.cells import points
from workbench.scaling.proposing.learning import Beliefs
from workbench.scaling.runs import Runs

Array = np.ndarray
Rule = Literal["per cost", "total"]
#: Columns that count a model's size.
SIZES = ("params", "non_embedding_params", "active_params", "average_params")
#: A run that narrows the interval by a smaller share teaches nothing that anybody sees.
LEAST = 0.01
#: Intervals narrower than this (relative, or in the target's unit) are rounding.
EXACT = 1e-8


@dataclass(frozen=True)
class Asked:
    """Proposed runs.

    table : one row a run, in order: its `predicted` loss, the candidate's columns, `candidate` (its row in
        the pool), `cost`, `spent` (up to and with it), `narrows` (share of the target's interval that it is
        expected to take away), `low`, `high`, `half_width` (the target's interval after it, as expected; of
        a region the mean)
    pool : the candidates with `cost`, `fall` (of the target's variance, in the space that is fitted),
        `narrows`, `per_cost` (fall over cost), `predicted`
    target : the cells with `predicted`, `low`, `high` now, and `low_after`, `high_after` with the runs made
    half_width : of the target's interval now
    note : why no (further) run is proposed; "" when all that were asked for are
    """

    table: pd.DataFrame
    pool: pd.DataFrame
    target: pd.DataFrame
    half_width: float
    note: str


class Proposer:
    """Proposes runs (`ask`) and learns from those that were made (`tell`).

    runs : Runs, or what `load_runs` opens; laws : by name or formula, the first one has to converge
    target : a cell or a region, pool : candidates; in words (`cells`), a file, a DataFrame or a mapping
    budget, worth : a run of cost c is worth it when it narrows the interval by the share worth x c / budget
    level : of every interval; progress : tells how far the fits are, and stops them

    BadInput when a law is unknown, a column is missing, all candidates are of one size, or the first law's
    fit is no minimum.
    """

    def __init__(
        self,
        runs: Any,
        laws: Sequence[str],
        target: Any,
        pool: Any,
        objective: Objective | None = None,
        level: float = 0.9,
        worth: float = 0.05,
        starts: int = 128,
        resamples: int = 200,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if not 0 < level < 1:
            raise BadInput(f"level: {level} is not accepted, give a share between 0 and 1")
        self.runs = Runs.open(runs)
        self.laws = _named(laws)
        self.target = completed(points(target, "target"), self.laws[0], self.runs, "target")
        self.pool = priced(completed(points(pool, "pool"), self.laws[0], self.runs, "pool"))
        self.objective, self.level, self.worth = objective, level, worth
        self.starts, self.resamples, self.seed, self.progress = starts, resamples, seed, progress
        self._refuse_one_size()
        self._fit()

    def ask(
        self, count: int = 1, budget: float | None = None, width: float | None = None, rule: Rule = "per cost"
    ) -> Asked:
        """Up to `count` runs that together cost at most `budget` (default: the dearest candidate's cost).

        rule "per cost": the largest expected fall of variance over cost; "total": the largest fall that the
        budget allows. width: propose no more once the interval's half-width is expected to be this.
        """
        if count < 1:
            raise BadInput(f"count: {count} is not accepted, ask for at least 1 run")
        cost = self.pool.cost.to_numpy()
        budget = float(cost.max()) if budget is None else float(budget)
        if not budget > 0:
            raise BadInput(f"budget: {budget} is not accepted, it must be positive")
        now, cells, candidates = self.beliefs, self._cells, self._candidates
        band = self.stack.band(self.target, self.level)
        half = self._half_widths(band)
        scatter = now.scatter()
        first = before = float(now.variance()[cells].mean()) + scatter  # of a new run, in the cells' mean
        free = np.ones(len(cost), dtype=bool)
        taught, rows, note, spent = None, [], "", 0.0
        for _ in range(count):
            falls = np.minimum(now.falls(cells, candidates).mean(0), before - scatter)
            narrows = _narrowing(falls, before)
            if taught is None:
                taught = self.pool.assign(fall=falls, narrows=narrows, per_cost=falls / cost)
                taught["predicted"] = self.stack.middle(self.pool)
            left = float((half * np.sqrt(before / first)).mean()) if first > 0 else 0.0
            note = self._enough(left, width)
            if note:
                break
            fits = free & (cost <= budget - spent)
            earns = fits & (narrows >= np.maximum(self.worth * cost / budget, LEAST))
            if not earns.any():
                note = _not_worth(narrows, cost, fits, budget)
                break
            chosen = int(np.argmax(np.where(earns, falls / cost if rule == "per cost" else falls, -1.0)))
            spent += float(cost[chosen])
            free[chosen] = False
            share = float(narrows[chosen])
            now = now.after(int(candidates[chosen]), self.seed)
            before -= float(falls[chosen])
            rows.append(
                {"predicted": taught.predicted[chosen]}
                | self._row(chosen, spent, share, band, np.sqrt(before / first))
            )
        assert taught is not None
        shrunk = np.sqrt(before / first) if first > 0 else 1.0
        middle, size = self._middle(band), half * shrunk
        target = self.target.assign(
            predicted=band.predicted,
            low=band.low,
            high=band.high,
            low_after=self.stack.natural(middle - size),
            high_after=self.stack.natural(middle + size),
        )
        return Asked(pd.DataFrame(rows), taught, target, float(half.mean()), note)

    def tell(self, made: Any) -> pd.DataFrame:
        """Add runs that were made and fit again. Returns what was foretold: predicted, low, high, observed,
        inside; one row a run.
        """
        new = Runs.open(made)
        name = self.stack.members[0].fit.law.target
        missing = [c for c in (*self.laws[0].columns, name) if c not in new.table]
        if missing:
            raise BadInput(f"runs: those that were made need column {', '.join(missing)}")
        foretold = self.stack.band(new.table, self.level)
        observed = new.table[name].to_numpy(dtype=np.float64)
        together = pd.concat([self.runs.table, new.table], ignore_index=True)
        columns = [c for c in self.runs.table if not together[c].isna().any()]
        self.runs = Runs.from_table(together[columns], name=self.runs.name)
        self._fit()
        inside = (foretold.low <= observed) & (observed <= foretold.high)
        return foretold.assign(observed=observed, inside=inside)

    def _refuse_one_size(self) -> None:
        for column in SIZES:
            if column in self.laws[0].columns and self.pool[column].nunique() == 1:
                raise BadInput(
                    f"pool: every candidate has {column} {self.pool[column].iloc[0]:.4g}, so that none can "
                    "teach how the loss depends on size and there is no plan; give several sizes "
                    f"({column}=1e7:1e9:5)"
                )

    def _fit(self) -> None:
        lacking = {
            other.name: f"{field} has no column {', '.join(missing)}"
            for other in self.laws[1:]
            for field, table in (("target", self.target), ("pool", self.pool))
            if (missing := [c for c in other.columns if c not in table])
        }
        used = [other for other in self.laws if other.name not in lacking]
        first = self.laws[0]
        made = stack(
            [other for other in used if other.target == first.target],
            self.runs,
            self.objective or Objective(space="log" if first.positive else "linear"),
            self.starts,
            self.resamples,
            self.seed,
            first.name,
            self.progress,
        )
        self.stack = Stack(
            made.members, made.weights, made.scores, made.held_out, {**lacking, **made.left_out}
        )
        everywhere = pd.concat([self.target, self.pool], ignore_index=True)
        self.beliefs = beliefs_of(self.stack, everywhere, self.level)
        self._cells = np.arange(len(self.target))
        self._candidates = np.arange(len(self.target), len(everywhere))

    def _middle(self, band: pd.DataFrame) -> Array:
        return (self.stack.space(band.low.to_numpy()) + self.stack.space(band.high.to_numpy())) / 2

    def _half_widths(self, band: pd.DataFrame) -> Array:
        return (self.stack.space(band.high.to_numpy()) - self.stack.space(band.low.to_numpy())) / 2

    def _enough(self, half: float, width: float | None) -> str:
        if half <= EXACT:
            return "no run is worth its cost: the target is known to rounding"
        if width is not None and half <= width:
            return f"no further run: the interval's half-width is {half:.3g}, {width:.3g} was asked for"
        return ""

    def _row(
        self, chosen: int, spent: float, share: float, band: pd.DataFrame, shrunk: float
    ) -> dict[str, Any]:
        middle, half = self._middle(band).mean(), self._half_widths(band).mean() * shrunk
        ends = self.stack.natural(np.array([middle - half, middle + half]))
        return {
            **{str(name): value for name, value in self.pool.iloc[chosen].items()},
            "candidate": chosen,
            "spent": spent,
            "narrows": share,
            "low": float(ends[0]),
            "high": float(ends[1]),
            "half_width": float(half),
        }


def completed(table: pd.DataFrame, first: Law, runs: Runs, field: str) -> pd.DataFrame:
    """Points with the law's columns that all runs agree on; BadInput for another one that is missing."""
    for column in first.columns:
        if column in table:
            continue
        if column not in runs.table or runs.table[column].nunique() > 1:
            raise BadInput(
                f"{field}: needs column {column} of law {first.name}; write it as in "
                f"'{column}=1e9' (or {column}=1e8:1e10:5)"
            )
        table = table.assign(**{column: float(runs.table[column].iloc[0])})
    return table


def _named(names: Sequence[str]) -> list[Law]:
    """Each law once; a formula is called by its text."""
    made = {name: law(name) for name in dict.fromkeys(map(str, names))}
    return [one if one.name in LAW else replace(one, name=name) for name, one in made.items()]


def _narrowing(falls: Array, variance: float) -> Array:
    """Share of an interval's width that goes with these falls of the variance."""
    if not variance > 0:
        return np.zeros_like(falls)
    return 1 - np.sqrt(np.clip(1 - falls / variance, 0, 1))


def _not_worth(narrows: Array, cost: Array, fits: Array, budget: float) -> str:
    if not fits.any():
        return f"no further run: none that is left fits what is left of the budget of {budget:.3g}"
    best = int(np.argmax(np.where(fits, narrows, -1.0)))
    return (
        "no further run is worth its cost: the most telling one narrows the interval by "
        f"{100 * narrows[best]:.2g} % for {100 * cost[best] / budget:.2g} % of the budget"
    )


def priced(pool: pd.DataFrame) -> pd.DataFrame:
    """With `cost`: the column of that name, or training FLOPs."""
    if "cost" in pool:
        cost = pd.to_numeric(pool["cost"], errors="coerce").to_numpy(dtype=np.float64)
        bad = np.flatnonzero(~(np.isfinite(cost) & (cost > 0)))
        if len(bad):
            raise BadInput(
                f"pool: cost of row {bad[0]} is {pool['cost'].iloc[bad[0]]!r}, expected a number above 0"
            )
        return pool.assign(cost=cost)
    try:
        return pool.assign(cost=compute_of(pool))
    except BadInput:
        raise BadInput("pool: no cost; add a column cost, or flops, or params and tokens") from None


def beliefs_of(stacked: Stack, columns: pd.DataFrame, level: float = 0.9) -> Beliefs:
    """What the plausible laws of a stack say of points: draws of the parameters, scatter, and the slope that
    a law may be wrong by beyond the largest run, each in the scale of the law's calibrated band.
    """
    chosen = list(stacked.plausible)
    members = [stacked.members[k] for k in chosen]
    weights = stacked.weights[chosen] / stacked.weights[chosen].sum()
    made = [_roots(m, stacked, columns) * scale_of(m, level) for m in members]
    tallest = max(len(r) for r in made)
    roots = np.stack([np.pad(r, ((0, tallest - len(r)), (0, 0))) for r in made])
    noise = np.array([m.scatter * scale_of(m, level) for m in members])
    means = np.stack([stacked.space(np.ravel(m.fit.predict(columns))) for m in members])
    return Beliefs.of(roots, noise, means, weights)


def _roots(member: PredictionIntervals, stacked: Stack, columns: pd.DataFrame) -> Array:
    """(draws + 1, points): whose squares sum to what `member.spread` holds beside the scatter."""
    drift = member.drift * member.scatter * np.log(np.broadcast_to(member.multiple(columns), len(columns)))
    if member.drawn is None:
        return drift[None]
    drawn = stacked.space(member.drawn.predict({str(c): columns[c] for c in columns}))
    drawn = drawn[np.isfinite(drawn).all(1)]
    if not len(drawn):
        raise BadInput(f"law {member.fit.law.name}: undefined at a candidate or the target on every resample")
    return np.vstack([(drawn - drawn.mean(0)) / np.sqrt(len(drawn)), drift])
