"""Intervals for runs that are still to come: scatter of single runs, parameter spread, the law's own error.

A law fitted to small runs is a little wrong at large ones, by more than the resamples of its parameters say.
How much is measured on the runs themselves: the law is fitted below a ladder of compute cut-offs and its
errors beyond each are compared with the spread that was expected there (split-conformal prediction, Vovk et
al. 2005, Lei et al. 2018, with cut-offs in compute in the place of random splits).

The spread expected at a run of m times the compute of the largest fitted one is

    sqrt(s^2 + h^2 + (g s ln m)^2)

s: scatter of single runs, h: spread of the prediction over bootstrap refits, g = `DRIFT`: the drift of
a law's own error, in units of s per e-fold of compute. A band is that spread times the weighted quantile of
|error| / spread over the cut-offs (each counts the same), and never less than Student's quantile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.comparison import compute_of
from workbench.scaling.doubt.uncertainty import Bootstrap, bootstrap
from workbench.scaling.fitting import Fit, fit

Array = np.ndarray
#: Shares of the fitted runs, those of most compute, that lie beyond the cut-offs of the ladder.
LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
#: Chosen once on the published tables: see data/benchmarks/scaling.md for what other values give.
DRIFT = 1.5
#: Spare runs above the number of parameters that a fit below a cut-off needs.
SPARE = 3
#: Columns of the backtests; row: of the fitted runs.
BACKTESTS = ("cutoff", "row", "multiple", "error", "scatter", "refits")
STARTS = 48
REFITS = 60


def cut_off(compute: Array, share: float, least: int = 3) -> float | None:
    """The largest compute of a run beyond which at least `share` of the runs, and `least` of them, lie."""
    values = np.unique(compute)[::-1]
    for value in values[1:]:
        if np.count_nonzero(compute > value) >= max(share * len(compute), least):
            return float(value)
    return None


def scatter_of(found: Fit, compute: Array | None) -> float:
    """Standard deviation of single runs about the law, in the objective's space: the geometric mean of that
    of all runs and that of the quarter (at least 15) with most compute, whose scatter is usually smaller.
    """
    r, p = found.residuals, found.problem.size
    spent = len(r) / max(len(r) - p, 1)
    whole = np.sqrt(np.mean(r**2) * spent)
    if compute is None:
        return float(whole)
    largest = np.argsort(compute, kind="stable")[-max(15, len(r) // 4) :]
    return float(np.sqrt(whole * np.sqrt(np.mean(r[largest] ** 2) * spent)))


def _space(found: Fit, values: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.log(values) if found.objective.space == "log" else values


def expected_spread(scatter: Any, refits: Any, multiple: Any, drift: float = DRIFT) -> Array:
    """sqrt(s^2 + h^2 + (g s ln m)^2), see the module."""
    return np.sqrt(np.square(scatter) + np.square(refits) + np.square(drift * scatter * np.log(multiple)))


def weighted_quantile(values: Array, groups: Array, level: float) -> float:
    """The smallest value that a share `level` of the weight does not exceed; each group weighs the same."""
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(values)
    reached = np.cumsum((1.0 / sizes[index])[order])
    return float(values[order][min(int(np.searchsorted(reached, level * reached[-1])), len(order) - 1)])


@dataclass(frozen=True)
class PredictionIntervals:
    """Bands for new runs. `scatter`: of single runs, in the objective's space (relative for logarithms);
    `largest`: compute of the largest fitted run (nan when the runs have none); `backtests`: `BACKTESTS`,
    one row per held-out run of each cut-off of the ladder, in the objective's space;
    `answers`: parameters fitted below each cut-off, one row each, working coordinates; `drift`: of the law's
    own error, see the module.
    """

    fit: Fit
    drawn: Bootstrap | None
    scatter: float
    largest: float
    backtests: pd.DataFrame
    answers: Array
    drift: float = DRIFT

    def multiple(self, columns: Any) -> Array | float:
        """Compute over that of the largest fitted run, at least one."""
        if not np.isfinite(self.largest):
            return 1.0
        try:
            return np.maximum(compute_of(columns) / self.largest, 1.0)
        except BadInput:
            return 1.0

    def refits(self, columns: Any) -> Array:
        """(points,) standard deviation of the prediction over the bootstrap, in the objective's space."""
        if self.drawn is None:
            return np.zeros(1)
        h = _space(self.fit, self.drawn.predict(columns)).std(0)
        return np.where(np.isfinite(h), h, np.inf)

    def spread(self, columns: Any) -> Array:
        """(points,) expected standard deviation of observation minus prediction, in the objective's space."""
        return expected_spread(self.scatter, self.refits(columns), self.multiple(columns), self.drift)

    def factor(self, level: float = 0.9) -> float:
        """Half-width of a band in units of its spread."""
        from scipy import stats  # slow to import

        dof = max(self.fit.problem.rows - self.fit.problem.size, 1)
        least = float(stats.t.ppf(0.5 + level / 2, dof))
        if not len(self.backtests):
            return least
        past = self.backtests
        spread = expected_spread(past.scatter, past.refits, past.multiple, self.drift)
        scores = (np.abs(past.error) / np.maximum(spread, 1e-300)).to_numpy()
        return max(least, weighted_quantile(scores, past.cutoff.to_numpy(), level))

    def band(self, columns: Any, level: float = 0.9) -> pd.DataFrame:
        """predicted, low, high for new runs, in the target's own units."""
        if not 0 < level < 1:
            raise BadInput(f"level: {level} is not accepted, give a share between 0 and 1")
        predicted = np.ravel(self.fit.predict(columns))
        half = np.broadcast_to(self.factor(level) * self.spread(columns), predicted.shape)
        if self.fit.objective.space == "log":
            with np.errstate(over="ignore"):
                low, high = predicted * np.exp(-half), predicted * np.exp(half)
        else:
            low, high = predicted - half, predicted + half
        return pd.DataFrame({"predicted": predicted, "low": low, "high": high})


def prediction_intervals(
    found: Fit,
    runs: Any,
    drawn: Bootstrap | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    calibrate: bool = True,
) -> PredictionIntervals:
    """Calibrate bands on the fitted `runs` (the rows of `found`, in their order, with compute where there is
    any). With too few runs below any cut-off, or without `calibrate`, `backtests` is empty and the bands rest
    on the expected spread; without compute they hold scatter and parameter spread alone.
    """
    table = getattr(runs, "table", runs)
    empty = pd.DataFrame({c: np.zeros(0) for c in BACKTESTS})
    try:
        compute = compute_of(table)
    except BadInput:
        return PredictionIntervals(
            found, drawn, scatter_of(found, None), np.nan, empty, np.zeros((0, len(found.theta)))
        )
    problem = found.problem
    rows: list[pd.DataFrame] = []
    answers: list[Array] = []
    data = dict(problem.columns) | {found.law.target: problem.target}
    for share in LADDER if calibrate else ():
        cutoff = cut_off(compute, share)
        if cutoff is None or any(float(part.cutoff.iloc[0]) == cutoff for part in rows):
            continue
        below, above = compute <= cutoff, compute > cutoff
        if below.sum() < problem.size + SPARE or (stop is not None and stop()):
            break
        known = {c: v[below] for c, v in data.items()}
        try:
            part = fit(found.law, known, found.objective, STARTS, seed=seed, stop=stop)
            refits = bootstrap(part, REFITS, seed, stop=stop, patience=0)  # a spread needs no last digits
        except BadInput:  # undefined on so few runs
            break
        beyond = {c: v[above] for c, v in data.items()} | {"flops": compute[above]}
        inner = PredictionIntervals(
            part,
            refits,
            scatter_of(part, compute[below]),
            float(compute[below].max()),
            empty,
            np.zeros((0, 0)),
        )
        error = _space(part, part.predict(beyond)) - _space(part, beyond[found.law.target])
        rows.append(
            pd.DataFrame(
                {
                    "cutoff": cutoff,
                    "row": np.flatnonzero(above),
                    "multiple": inner.multiple(beyond),
                    "error": np.where(np.isfinite(error), error, np.inf),
                    "scatter": inner.scatter,
                    "refits": np.broadcast_to(inner.refits(beyond), error.shape),
                }
            )
        )
        answers.append(part.theta)
    return PredictionIntervals(
        found,
        drawn,
        scatter_of(found, compute),
        float(compute.max()),
        pd.concat(rows, ignore_index=True) if rows else empty,
        np.array(answers) if answers else np.zeros((0, len(found.theta))),
    )
