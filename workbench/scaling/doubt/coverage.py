"""Do 90 % intervals hold the truth 90 % of the time? Simulate, refit, count.

An interval recipe is only worth its measured coverage on the user's own grid of runs;
this is how it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.scaling.doubt.certificate import certify
from workbench.scaling.doubt.uncertainty import bootstrap, profile, refit
from workbench.scaling.fitting import Fit
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective, Problem, Resample
from workbench.scaling.solver import descend

Array = np.ndarray


def simulate(
    law: Law,
    truth: Mapping[str, float],
    columns: Mapping[str, Any],
    noise: float,
    datasets: int,
    seed: int = 0,
    space: Literal["log", "linear"] = "log",
    tails: float = np.inf,
) -> Array:
    """(datasets, rows) synthetic targets around a law: relative noise of sd `noise` in log space,
    absolute otherwise.

    `tails`: degrees of freedom of Student-t noise (scaled to the same sd), infinite for Gaussian.
    """
    rng = np.random.default_rng(seed)
    exact = law.predict(truth, columns)
    shape = (datasets, exact.size)
    draw = (
        rng.standard_normal(shape)
        if np.isinf(tails)
        else rng.standard_t(tails, shape) * np.sqrt((tails - 2) / tails)
    )
    return exact * np.exp(noise * draw) if space == "log" else exact + noise * draw


def coverage(
    law: Law,
    truth: Mapping[str, float],
    columns: Mapping[str, Any],
    noise: float,
    datasets: int = 200,
    resamples: int = 400,
    level: float = 0.9,
    objective: Objective | None = None,
    seed: int = 0,
    method: Literal["runs", "residuals", "profile"] = "runs",
    tails: float = np.inf,
    stop: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Share of synthetic data sets whose interval holds the true value, per free parameter.

    Columns: parameter, covered (share), error (binomial standard error), width (median, natural units),
    datasets.
    """
    objective = objective or Objective(space="log" if law.positive else "linear")
    targets = simulate(law, truth, columns, noise, datasets, seed, objective.space, tails)
    center = law.predict(truth, columns)
    whole = Problem(law, columns, center, objective)
    start = whole.working(truth)
    shift = (np.log(targets) if objective.space == "log" else targets) - whole.y
    theta, _, _ = refit(whole, Resample(shift=shift), start[None], stop)
    names = [p.name for p in law.free]
    held = np.zeros((datasets, len(names)), dtype=bool)
    widths = np.zeros((datasets, len(names)))
    done = 0
    for k in range(datasets):
        if stop is not None and stop():
            break
        problem = Problem(law, columns, targets[k], objective)
        value = float(problem.value(theta[k][None])[0])
        optima = pd.DataFrame([problem.natural(theta[k])], columns=names).assign(objective=value)
        found = Fit(
            law,
            problem,
            theta[k],
            value * objective.factor,
            certify(problem, theta[k]),
            optima,
            descend(problem, theta[k][None], steps=1),
        )
        if method == "profile":
            low, high = np.array([profile(found, n, level, points=25).interval for n in names]).T
        else:
            table = bootstrap(found, resamples, seed=seed * 100_003 + k, kind=method).interval(level)
            low, high = table.low.to_numpy(), table.high.to_numpy()
        exact = np.array([truth[n] for n in names])
        held[k] = (low <= exact) & (exact <= high)
        widths[k] = high - low
        done += 1
    share = held[:done].mean(0)
    return pd.DataFrame(
        {
            "parameter": names,
            "covered": share,
            "error": np.sqrt(share * (1 - share) / max(done, 1)),
            "width": np.median(widths[:done], axis=0),
            "datasets": done,
        }
    )
