"""Fit a law to runs: many starts, one batch, and a result that says how far it can be trusted.

>>> import numpy as np
>>> from workbench.scaling.formulas.lawbook import law
>>> n, d = np.meshgrid(np.logspace(7, 9, 5), np.logspace(9, 11, 5))
>>> data = {"params": n.ravel(), "tokens": d.ravel()}
>>> truth = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
>>> found = fit(law("chinchilla"), data | {"loss": law("chinchilla").predict(truth, data)})
>>> found.certificate.converged, bool(abs(found.params["alpha"] - 0.35) < 1e-6)
(True, True)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput, notice
from workbench.scaling.doubt.certificate import Certificate, certify
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective, Problem
from workbench.scaling.projection import Projection, sample_starts
from workbench.scaling.solver import Solutions, descend, distinct, polish

Array = np.ndarray
DEFAULT_STARTS = 512
#: Further steps for candidates whose objective is at most so many times the best and that are not at rest:
#: a curved valley takes a thousand.
POLISHING = ((1.5, 120), (1.001, 4000))


@dataclass
class Fit:
    """A fitted law. `params`: natural values, fixed ones included; `objective_value`:
    as reported (see `Objective`).

    `optima`: every distinct certified local minimum within a factor 1.5 of the best objective, best first, as
    natural values plus `objective`. `theta`: working coordinates (p,) of the free parameters.
    """

    law: Law
    problem: Problem
    theta: Array
    objective_value: float
    certificate: Certificate
    optima: pd.DataFrame
    starts: Solutions = field(repr=False)

    @property
    def params(self) -> dict[str, float]:
        free = dict(
            zip((p.name for p in self.law.free), self.problem.natural(self.theta).tolist(), strict=True)
        )
        return {p.name: free.get(p.name, self.law.fixed.get(p.name, np.nan)) for p in self.law.parameters}

    @property
    def objective(self) -> Objective:
        return self.problem.objective

    def predict(self, columns: Any) -> Array:
        """Predicted target at new points (columns broadcast together)."""
        return self.law.predict(self.params, columns)

    @property
    def residuals(self) -> Array:
        """(rows,) prediction minus observation, in the objective's space."""
        return self.problem.residuals(self.theta[None])[0]

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def r_squared(self) -> float:
        """1 - residual over total sum of squares of the target, in the target's own units."""
        predicted = self.predict(self.problem.columns)
        y = self.problem.target
        return float(1.0 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2))


def columns_of(law: Law, runs: Any, target: str | None = None) -> tuple[dict[str, Array], Array]:
    """The law's columns and its target from Runs, a DataFrame or a mapping of arrays;
    every row must be finite.

    BadInput names the missing column, or the row and column of a value that is not a number.
    """
    table = getattr(runs, "table", runs)
    target = target or law.target
    missing = [c for c in (*law.columns, target) if c not in table]
    if missing:
        have = ", ".join(str(c) for c in table)
        raise BadInput(
            f"law {law.name}: needs column {', '.join(missing)}; "
            f"the runs have {have} (map names with columns=)"
        )
    columns = {c: np.asarray(table[c], dtype=np.float64) for c in (*law.columns, target)}
    lengths = {len(v) for v in columns.values()}
    if len(lengths) != 1:
        raise BadInput(f"columns of different lengths: { {k: len(v) for k, v in columns.items()} }")
    for name, values in columns.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise BadInput(f"{name}: row {row} is {values[row]}, expected a number; drop or fill the row")
    return {c: columns[c] for c in law.columns}, columns[target]


def fit(
    law: Law,
    runs: Any,
    objective: Objective | None = None,
    starts: int | Array | Mapping[str, Sequence[float]] = DEFAULT_STARTS,
    weights: Array | None = None,
    seed: int = 0,
    project: bool | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fit:
    """Minimise the objective from many starts.

    runs: Runs, DataFrame or mapping of equally long arrays. starts: how many Sobol points; or a full grid as
    ``{parameter: natural values}``; or an array (s, p) of natural values. project: solve linear parameters
    of every start by variable projection (default: for sampled starts). weights: (rows,) >= 0.

    BadInput for missing columns, values that are not numbers, and fewer rows than free parameters.
    """
    objective = objective or Objective(space="log" if law.positive else "linear")
    columns, target = columns_of(law, runs)
    count = len(target) if weights is None else int(np.count_nonzero(weights))
    if count < len(law.free):
        raise BadInput(
            f"runs: {count} rows cannot determine the {len(law.free)} parameters of law {law.name} "
            f"({', '.join(p.name for p in law.free)}); add runs, fix parameters or take a smaller law"
        )
    if count == len(law.free):
        notice(
            f"law {law.name}: as many parameters as rows ({count}); "
            "the fit can be exact and says nothing about error"
        )
    problem = Problem(law, columns, target, objective)
    project = isinstance(starts, int) if project is None else project
    theta = _starts(law, starts, seed)
    if project:
        theta = Projection(problem).complete(theta)
    return solve(problem, theta, weights, stop)


def solve(
    problem: Problem, theta: Array, weights: Array | None = None, stop: Callable[[], bool] | None = None
) -> Fit:
    """Descend from every start (s, p), polish the distinct ends, certify the best."""
    coarse = descend(problem, theta, weights, steps=60, tolerance=1e-7, stop=stop)
    if not np.isfinite(coarse.value).any():
        raise BadInput(
            f"law {problem.law.name}: undefined (not a number) at every start; "
            "check units and parameter ranges"
        )
    candidates = distinct(coarse, 1e-2)
    fine = polish(problem, coarse.theta[candidates], weights, stop=stop)
    for times, steps in POLISHING:
        go_on = np.flatnonzero(~fine.settled & (fine.value <= times * np.min(fine.value) + 1e-30))
        if len(go_on):
            fine = fine.replaced(go_on, polish(problem, fine.theta[go_on], weights, steps=steps, stop=stop))
    apart = distinct(fine, 1e-4)
    near = [i for i in apart if fine.value[i] <= 1.5 * fine.value[apart[0]] + 1e-30]
    near = [i for i in near if i == apart[0] or certify(problem, fine.theta[i], weights).converged]
    law, factor = problem.law, problem.objective.factor
    optima = pd.DataFrame(problem.natural(fine.theta[near]), columns=[p.name for p in law.free])
    optima["objective"] = fine.value[near] * factor
    best = fine.theta[apart[0]]
    minimum = float(fine.value[apart[0]])
    reached = float(np.mean(coarse.value <= minimum * (1 + 1e-3) + 1e-18))
    certificate = certify(
        problem, best, weights, starts=len(theta), reached=reached, other_optima=len(near) - 1
    )
    return Fit(law, problem, best, minimum * factor, certificate, optima, coarse)


def _starts(law: Law, starts: int | Array | Mapping[str, Sequence[float]], seed: int) -> Array:
    if isinstance(starts, int):
        if starts < 1:
            raise BadInput(f"starts: {starts} is not accepted, at least 1 is needed")
        return sample_starts(law, starts, seed)
    if isinstance(starts, Mapping):
        missing = [p.name for p in law.free if p.name not in starts]
        if missing:
            raise BadInput(
                f"starts: no values for {', '.join(missing)}; give a list for every free parameter"
            )
        starts = np.array(list(itertools.product(*(starts[p.name] for p in law.free))), dtype=np.float64)
    values = np.atleast_2d(np.asarray(starts, dtype=np.float64))
    if values.shape[1] != len(law.free):
        raise BadInput(
            f"starts: {values.shape[1]} values per start, law {law.name} has {len(law.free)} free parameters"
        )
    return np.stack([p.to_working(values[:, i]) for i, p in enumerate(law.free)], axis=1)
