"""IsoFLOP curves: parabolas through each compute budget's runs (approach 2), and how far they can be wrong.

Hoffmann et al. 2022, approach 2: per budget a parabola of loss in ln N gives N*, and a line through ln N*
over ln C the exponent. The loss is not a parabola, so the answer is biased even without noise unless
the sizes straddle the optimum evenly; :func:`parabola_bias` shows by how much on the user's own grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.formulas.laws import Law
from workbench.scaling.planning import Draws, compute_optimal

Array = np.ndarray


def budgets_of(flops: Array, tolerance: float = 0.15) -> Array:
    """Group number of every run: runs belong to one budget while sorted neighbours differ by less than
    `tolerance` in ln C.
    """
    order = np.argsort(flops, kind="stable")
    jumps = np.diff(np.log(flops[order])) > tolerance
    group = np.empty(len(flops), dtype=np.int64)
    group[order] = np.concatenate([[0], np.cumsum(jumps)])
    return group


def optima(
    runs: Any, size: str = "params", window: int | None = 7, tolerance: float = 0.15, target: str = "loss"
) -> pd.DataFrame:
    """Per budget: n_opt, d_opt and loss at the bottom of a parabola in ln N through the `window` runs around
    the lowest one.

    Columns flops, n_opt, d_opt, loss, curvature, runs, inside (the optimum lies between the smallest
    and the largest size of the window; fit exponents to those rows only). Budgets with fewer than three
    sizes, or whose parabola opens downwards, are left out. BadInput if none remains.
    """
    table = getattr(runs, "table", runs)
    n, y = np.asarray(table[size], dtype=np.float64), np.asarray(table[target], dtype=np.float64)
    flops = (
        np.asarray(table["flops"], dtype=np.float64)
        if "flops" in table
        else 6.0 * n * np.asarray(table["tokens"], dtype=np.float64)
    )
    group = budgets_of(flops, tolerance)
    rows = []
    for g in range(group.max() + 1):
        index = np.flatnonzero(group == g)
        index = index[np.argsort(n[index], kind="stable")]
        if len(np.unique(n[index])) < 3:
            continue
        if window is not None and len(index) > window:
            lowest = int(np.argmin(y[index]))
            begin = int(np.clip(lowest - window // 2, 0, len(index) - window))
            index = index[begin : begin + window]
        x = np.log(n[index])
        middle = x.mean()
        c2, c1, c0 = np.polyfit(x - middle, y[index], 2)
        if c2 <= 0:
            continue
        at = -c1 / (2 * c2)
        best = np.exp(at + middle)
        budget = float(np.exp(np.log(flops[index]).mean()))
        rows.append(
            (
                budget,
                best,
                budget / (6.0 * best),
                c0 - c1**2 / (4 * c2),
                c2,
                len(index),
                bool(x.min() <= at + middle <= x.max()),
            )
        )
    if not rows:
        raise BadInput(
            f"{size}: no compute budget has three sizes around a minimum; "
            "IsoFLOP needs several model sizes at (nearly) equal FLOPs"
        )
    return pd.DataFrame(rows, columns=["flops", "n_opt", "d_opt", "loss", "curvature", "runs", "inside"])


def exponent(
    pairs: Any, weights: Array | None = None, y: str = "n_opt", x: str = "flops"
) -> dict[str, float]:
    """Line through ln y over ln x: exponent, coefficient, standard error of the exponent, and R^2.

    weights: (rows,), multiplying the squared residuals; none for ordinary least squares.
    At least two budgets are needed.
    """
    lx, ly = np.log(np.asarray(pairs[x], dtype=np.float64)), np.log(np.asarray(pairs[y], dtype=np.float64))
    if len(np.unique(lx)) < 2:
        raise BadInput("flops: an exponent needs at least two different budgets")
    w = np.ones_like(lx) if weights is None else np.asarray(weights, dtype=np.float64)
    center = np.average(lx, weights=w)
    mean = np.average(ly, weights=w)
    sxx = np.sum(w * (lx - center) ** 2)
    slope = float(np.sum(w * (lx - center) * (ly - mean)) / sxx)
    residual = ly - mean - slope * (lx - center)
    dof = max(len(lx) - 2, 1)
    error = float(np.sqrt(np.sum(w * residual**2) / dof / sxx))
    total = float(np.sum(w * (ly - mean) ** 2))
    return {
        "exponent": slope,
        "coefficient": float(np.exp(mean - slope * center)),
        "error": error,
        "r_squared": 1.0 - float(np.sum(w * residual**2)) / total if total > 0 else 1.0,
    }


def envelope(
    curves: pd.DataFrame, flops: str = "flops", loss: str = "loss", bins: int = 30, run: str = "run"
) -> pd.DataFrame:
    """Approach 1: the lowest loss that any run has reached per compute bin.
    Columns flops, loss, params, tokens, run.
    """
    log_c = np.log(curves[flops].to_numpy())
    edges = np.linspace(log_c.min(), log_c.max() + 1e-9, bins + 1)
    which = np.clip(np.digitize(log_c, edges) - 1, 0, bins - 1)
    lowest = curves.assign(_bin=which).sort_values(loss).groupby("_bin", as_index=False).first()
    keep = [c for c in (flops, loss, "params", "tokens", run) if c in lowest]
    return lowest.sort_values(flops)[keep].reset_index(drop=True)


def parabola_bias(
    law: Law,
    params: Mapping[str, float],
    sizes: Any,
    flops: Any,
    at: float,
    window: int | None = None,
    noise: float = 0.0,
    repeats: int = 1,
    seed: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Run approach 2 on noise-free (or noisy) losses of a known law on the user's own grid,
    and compare with the law itself.

    sizes, flops: (runs,) the user's grid. at: budget at which N* is extrapolated. One row per repeat: true
    and estimated exponent, N* and their ratio, and `loss_excess`: relative extra loss from training the wrong
    size at that budget; `wasted`: share of the budget that the wrong size wastes.
    """
    sizes, flops = np.asarray(sizes, dtype=np.float64), np.asarray(flops, dtype=np.float64)
    tokens = flops / (6.0 * sizes)
    draws = Draws.from_params(law, params)
    clean = draws.loss({**(fixed or {}), "params": sizes, "tokens": tokens})[0]
    truth = compute_optimal(draws, at, fixed=fixed)
    low, high = (compute_optimal(draws, at * f, fixed=fixed)["params"] for f in (0.5, 2.0))
    true_exponent = np.log(high / low) / np.log(4.0)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(repeats):
        loss = clean * np.exp(noise * rng.standard_normal(len(clean)))
        pairs = optima({"params": sizes, "flops": flops, "loss": loss}, window=window)
        line = exponent(pairs[pairs.inside] if pairs.inside.sum() >= 2 else pairs)
        guess = line["coefficient"] * at ** line["exponent"]
        reached = float(
            draws.loss(
                {**(fixed or {}), "params": np.array([guess]), "tokens": np.array([at / (6 * guess)])}
            )[0, 0]
        )
        rows.append(
            (
                true_exponent,
                line["exponent"],
                truth["params"],
                guess,
                guess / truth["params"],
                reached / truth["loss"] - 1,
                _wasted(draws, at, reached, fixed),
            )
        )
    return pd.DataFrame(
        rows, columns=["true_exponent", "exponent", "true_params", "params", "ratio", "loss_excess", "wasted"]
    )


def _wasted(draws: Draws, at: float, reached: float, fixed: Mapping[str, float] | None) -> float:
    """Share of the budget that would have been enough for the reached loss at the best size."""
    low, high = np.log(at) - 5.0, np.log(at)
    for _ in range(40):
        middle = 0.5 * (low + high)
        if compute_optimal(draws, float(np.exp(middle)), fixed=fixed)["loss"] <= reached:
            high = middle
        else:
            low = middle
    return float(1.0 - np.exp(high) / at)
