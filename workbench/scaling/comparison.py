"""Which law, and how far does it reach: information criteria, cross-validation by compute,
held-out extrapolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from workbench.errors import BadInput
from workbench.scaling.fitting import Fit, columns_of, fit
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective

Array = np.ndarray


def log_likelihood(found: Fit) -> float:
    """Maximised log-likelihood of the residuals (natural log), scale included,
    comparable between laws on the same rows.

    Squares: Gaussian. Huber: the density proportional to exp(-rho(r) / s), whose normaliser is known in
    closed form, with the scale s at its maximum. Log-space fits are converted to the target's own units
    (the Jacobian -sum ln y).
    """
    r, n = found.residuals, found.problem.rows
    jacobian = -float(np.sum(found.problem.y)) if found.objective.space == "log" else 0.0
    if found.objective.kind == "squares":
        variance = max(float(np.mean(r**2)), 1e-300)
        return -0.5 * n * (np.log(2 * np.pi * variance) + 1.0) + jacobian
    d = found.objective.delta
    a = np.abs(r)
    clipped = np.minimum(a, d)
    total = float(np.sum(clipped * (a - 0.5 * clipped)))

    def negative(log_s: float) -> float:
        s = np.exp(log_s)
        log_center = 0.5 * np.log(2 * np.pi * s) + np.log(max(special.erf(d / np.sqrt(2 * s)), 1e-300))
        log_tails = np.log(2 * s / d) - d * d / (2 * s)
        return n * np.logaddexp(log_center, log_tails) + total / s

    guess = np.log(max(total / n, 1e-300))
    best = optimize.minimize_scalar(negative, bounds=(guess - 12, guess + 12), method="bounded")
    return -float(best.fun) + jacobian


def information(found: Fit) -> dict[str, float]:
    """AIC, AICc (Hurvich and Tsai, 1989) and BIC; parameters counted with the noise scale."""
    k, n = found.problem.size + 1, found.problem.rows
    ll = log_likelihood(found)
    correction = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf
    return {
        "log_likelihood": ll,
        "parameters": k,
        "aic": 2 * k - 2 * ll,
        "aicc": 2 * k - 2 * ll + correction,
        "bic": k * np.log(n) - 2 * ll,
    }


def compute_of(table: Any) -> Array:
    """FLOPs per run: the `flops` column, else 6 x params x tokens."""
    if "flops" in table:
        return np.asarray(table["flops"], dtype=np.float64)
    if "params" in table and "tokens" in table:
        return (
            6.0
            * np.asarray(table["params"], dtype=np.float64)
            * np.asarray(table["tokens"], dtype=np.float64)
        )
    raise BadInput("flops: cannot order the runs by compute; give a flops column, or params and tokens")


def _subset(table: Any, rows: Array, names: Sequence[str]) -> dict[str, Array]:
    return {c: np.asarray(table[c])[rows] for c in names}


def cross_validate(
    law: Law, runs: Any, folds: int = 5, objective: Objective | None = None, starts: int = 128, seed: int = 0
) -> pd.DataFrame:
    """Leave out one band of compute at a time (neighbouring runs share their fate, so random folds would
    flatter the law).

    One row per band: lowest and highest FLOPs, rows, mean signed and mean absolute relative error
    of the prediction.
    """
    table = getattr(runs, "table", runs)
    columns, target = columns_of(law, table)
    order = np.argsort(compute_of(table), kind="stable")
    compute = compute_of(table)
    if not 2 <= folds <= len(order):
        raise BadInput(f"folds: {folds} is not accepted, choose 2 to {len(order)} (the number of runs)")
    rows = []
    for band in np.array_split(order, folds):
        train = np.setdiff1d(order, band)
        if len(train) < len(law.free):
            raise BadInput(
                f"folds: with {folds} bands only {len(train)} runs remain for {len(law.free)} parameters; "
                "use more bands"
            )
        found = fit(
            law,
            _subset(columns | {law.target: target}, train, [*law.columns, law.target]),
            objective,
            starts,
            seed=seed,
        )
        error = found.predict(_subset(columns, band, law.columns)) / target[band] - 1
        rows.append(
            {
                "from_flops": compute[band].min(),
                "to_flops": compute[band].max(),
                "rows": len(band),
                "bias": error.mean(),
                "error": np.abs(error).mean(),
                "converged": found.certificate.converged,
            }
        )
    return pd.DataFrame(rows)


def held_out(
    law: Law,
    runs: Any,
    cutoffs: Sequence[float] | None = None,
    objective: Objective | None = None,
    starts: int = 128,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Fit below a compute cut-off, predict every run above it.

    One row per (cut-off, held-out run): cutoff, multiple (its FLOPs over the largest fitted run's),
    predicted, observed, error (signed, relative). Default cut-offs: five spread over the middle of the runs'
    compute range. Cut-offs that leave too few runs below are skipped; BadInput if that is all of them.
    """
    table = getattr(runs, "table", runs)
    columns, target = columns_of(law, table)
    compute = compute_of(table)
    if cutoffs is None:
        cutoffs = [float(c) for c in np.unique(np.quantile(compute, [0.4, 0.55, 0.7, 0.8, 0.9]))]
    rows = []
    for cutoff in cutoffs:
        below = np.flatnonzero(compute <= cutoff)
        above = np.flatnonzero(compute > cutoff)
        if len(below) <= len(law.free) or not len(above) or (stop is not None and stop()):
            continue
        found = fit(
            law,
            _subset(columns | {law.target: target}, below, [*law.columns, law.target]),
            objective,
            starts,
            seed=seed,
        )
        predicted = found.predict(_subset(columns, above, law.columns))
        rows.append(
            pd.DataFrame(
                {
                    "cutoff": cutoff,
                    "fitted": len(below),
                    "row": above,
                    "multiple": compute[above] / compute[below].max(),
                    "predicted": predicted,
                    "observed": target[above],
                    "error": predicted / target[above] - 1,
                    "converged": found.certificate.converged,
                }
            )
        )
    if not rows:
        raise BadInput(
            f"cutoffs: none leaves more than {len(law.free)} runs below and one above; move the cut-off into "
            f"{compute.min():.3g} ... {compute.max():.3g} FLOPs"
        )
    return pd.concat(rows, ignore_index=True)


def extrapolation(held: pd.DataFrame, edges: Sequence[float] = (1, 2, 4, 10, 30, 100, 1000)) -> pd.DataFrame:
    """Held-out error against the compute multiple: per bin rows, mean absolute,
    90th percentile and signed error.
    """
    bins = pd.cut(held.multiple, [*edges, np.inf], right=False)
    grouped = held.assign(size=held.error.abs()).groupby(bins, observed=True)
    result = grouped.agg(
        rows=("error", "size"),
        error=("size", "mean"),
        worst_tenth=("size", lambda e: e.quantile(0.9)),
        bias=("error", "mean"),
    )
    result.insert(0, "multiple", [f"{i.left:g} to {i.right:g}" for i in result.index])
    return result.reset_index(drop=True)


def compare(
    laws: Sequence[Law],
    runs: Any,
    objective: Objective | None = None,
    cutoff: float | None = None,
    folds: int = 5,
    starts: int = 256,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit several laws to the same rows: objective, R^2, AIC, BIC, compute-band error, extrapolation error,
    certificate.

    Sorted by cross-validation error. Laws whose columns are missing are left out; BadInput if none remains.
    """
    table = getattr(runs, "table", runs)
    rows = []
    for candidate in laws:
        if any(c not in table for c in (*candidate.columns, candidate.target)):
            continue
        if len(table[candidate.target]) <= len(candidate.free) + folds:
            continue
        found = fit(candidate, runs, objective, starts, seed=seed)
        bands = cross_validate(candidate, runs, folds, objective, starts // 2, seed)
        ahead = held_out(candidate, runs, [cutoff] if cutoff else None, objective, starts // 2, seed)
        facts = information(found)
        rows.append(
            {
                "law": candidate.name,
                "objective": found.objective_value,
                "r_squared": found.r_squared,
                "aic": facts["aic"],
                "aicc": facts["aicc"],
                "bic": facts["bic"],
                "band_error": float(np.average(bands.error, weights=bands.rows)),
                "held_out_error": float(ahead.error.abs().mean()),
                "certificate": found.certificate.text,
            }
        )
    if not rows:
        raise BadInput(
            f"laws: none of {', '.join(c.name for c in laws)} has all its columns in these runs, "
            "or there are too few rows"
        )
    return pd.DataFrame(rows).sort_values("band_error", ignore_index=True)
