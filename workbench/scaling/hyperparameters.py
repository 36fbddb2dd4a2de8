"""Learning rate and batch size: fit the laws of the best ones,
judge an advice by the loss it would have cost, critical batches.

A *cell* is one model trained for one token count, with a grid of learning rates and batch sizes.
Batch sizes are in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.doubt.uncertainty import bootstrap
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.objective import Objective

Array = np.ndarray
REQUIRED = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
#: A run whose loss exceeds its cell's best by more than this factor diverged: never part of a fit.
DIVERGED = 1.2


def _cells(runs: Any) -> list[tuple[tuple[Any, Any], pd.DataFrame]]:
    """Runs grouped by (params, tokens) and by architecture where width and depth are given."""
    table = getattr(runs, "table", runs)
    missing = [c for c in REQUIRED if c not in table]
    if missing:
        raise BadInput(
            f"columns: {', '.join(missing)} missing; learning-rate and batch laws need {', '.join(REQUIRED)}"
        )
    extra = [c for c in ("width", "depth", "cell") if c in table]
    frame = pd.DataFrame({c: table[c] for c in (*REQUIRED, *extra)})
    keys = ["params", "tokens", *extra]
    return [((key[0], key[1]), cell) for key, cell in frame.groupby(keys, sort=True, dropna=False)]


def best_settings(
    runs: Any, estimator: Literal["bowl", "plateau", "argmin"] = "bowl", within: float | None = None
) -> pd.DataFrame:
    """Best learning rate and batch size of every cell.

    "argmin": the best grid run. "plateau": geometric mean of the runs within `within` (default 0.05 %)
    of the cell's lowest loss. "bowl": minimum of a quadratic in (ln lr, ln batch) through the runs within
    `within` (default 2 %), cells whose quadratic has no minimum inside the grid fall back to the plateau
    and are marked. Diverged and non-finite runs never count.
    Columns params, tokens, learning_rate, batch_tokens, loss, runs, used, fallback, r_squared.
    """
    rows = []
    for (n, d), cell in _cells(runs):
        finite = cell[np.isfinite(cell.loss)]
        good = finite[finite.loss <= DIVERGED * finite.loss.min()]
        lowest = good.loss.min()
        plateau = good[
            good.loss <= lowest * (1 + (0.0005 if within is None or estimator == "bowl" else within))
        ]
        lr, batch = np.exp(np.log(plateau[["learning_rate", "batch_tokens"]].to_numpy()).mean(0))
        loss, fallback, r2 = lowest, False, np.nan
        used = len(plateau)
        if estimator == "argmin":
            top = good.loc[good.loss.idxmin()]
            lr, batch, used = top.learning_rate, top.batch_tokens, 1
        elif estimator == "bowl":
            near = good[good.loss <= lowest * (1 + (0.02 if within is None else within))]
            found = _bowl(near) if len(near) >= 8 else None
            if found is None:
                fallback = True
            else:
                lr, batch, loss, r2 = found
                used = len(near)
        rows.append((n, d, float(lr), float(batch), float(loss), len(cell), used, fallback, r2))
    return pd.DataFrame(
        rows,
        columns=[
            "params",
            "tokens",
            "learning_rate",
            "batch_tokens",
            "loss",
            "runs",
            "used",
            "fallback",
            "r_squared",
        ],
    )


def _bowl(near: pd.DataFrame) -> tuple[float, float, float, float] | None:
    x, y = np.log(near.learning_rate.to_numpy()), np.log(near.batch_tokens.to_numpy())
    mx, my = x.mean(), y.mean()
    u, v = x - mx, y - my
    design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    if np.linalg.matrix_rank(design) < 6:
        return None
    c, *_ = np.linalg.lstsq(design, near.loss.to_numpy(), rcond=None)
    hessian = np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    at = -np.linalg.solve(hessian, c[1:3])
    if not (x.min() - 0.5 <= at[0] + mx <= x.max() + 0.5 and y.min() - 0.5 <= at[1] + my <= y.max() + 0.5):
        return None
    residual = near.loss.to_numpy() - design @ c
    r2 = 1 - residual.var() / near.loss.to_numpy().var()
    return float(np.exp(at[0] + mx)), float(np.exp(at[1] + my)), float(c[0] + 0.5 * c[1:3] @ at), float(r2)


def fit_step_law(settings: pd.DataFrame) -> dict[str, Any]:
    """Log-linear laws of best settings (Li et al. 2025, eq. 1):
    lr = c N^-x D^y and batch = c D^y, as two `Fit`s.
    """
    if settings[["params", "tokens"]].nunique().min() < 2:
        raise BadInput(
            "cells: at least two sizes and two token counts are needed for the exponents of a learning-rate "
            "law"
        )
    squares = Objective("squares", "log")
    return {
        "learning_rate": fit(law("step-law-lr"), settings, squares, starts=32),
        "batch_tokens": fit(law("step-law-batch"), settings, squares, starts=32),
    }


Advice = Callable[[float, float], tuple[float, float]]


def step_law(params: float, tokens: float) -> tuple[float, float]:
    """Published Step Law: lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens
    (Li et al., 2025; N without embeddings).
    """
    return 1.79 * params**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def open_euro_llm(params: float, tokens: float) -> tuple[float, float]:
    """Learning rate 0.371 N^-0.417 D^0.086 and batch size in tokens, 9.9e-5 N^0.145 D^0.460 sequences of
    4,096 (OpenEuroLLM 2026, dense English models of 48 M to 1.7 B).
    """
    return 0.371 * params**-0.417 * tokens**0.086, 4096 * 9.9e-5 * params**0.145 * tokens**0.460


def deepseek_law(params: float, tokens: float) -> tuple[float, float]:
    """DeepSeek's laws in compute: lr = 0.3118 C^-0.125, batch = 0.2920 C^0.3271 tokens (Bi et al., 2024),
    C = 6 N D.
    """
    compute = 6.0 * params * tokens
    return 0.3118 * compute**-0.125, 0.2920 * compute**0.3271


#: Published advice beside Step Law's: who says so -> learning rate and batch tokens.
PUBLISHED_ADVICE = {"OpenEuroLLM (published)": open_euro_llm, "DeepSeek (published)": deepseek_law}


def advice_of(laws: dict[str, Any]) -> Advice:
    """Advice from laws fitted by `fit_step_law`."""

    def advise(params: float, tokens: float) -> tuple[float, float]:
        point = {"params": params, "tokens": tokens}
        return float(laws["learning_rate"].predict(point)), float(laws["batch_tokens"].predict(point))

    return advise


def excess_loss(runs: Any, advice: Advice) -> pd.DataFrame:
    """Relative loss above each cell's best, of the grid run nearest (in ln lr, ln batch) to the advice.

    Columns params, tokens, advised_lr, advised_batch, learning_rate, batch_tokens, excess
    (NaN where that run diverged to nan).
    """
    rows = []
    for (n, d), cell in _cells(runs):
        lr, batch = advice(n, d)
        distance = np.log(cell.learning_rate / lr) ** 2 + np.log(cell.batch_tokens / batch) ** 2
        nearest = cell.loc[distance.idxmin()]
        rows.append(
            (n, d, lr, batch, nearest.learning_rate, nearest.batch_tokens, nearest.loss / cell.loss.min() - 1)
        )
    return pd.DataFrame(
        rows,
        columns=[
            "params",
            "tokens",
            "advised_lr",
            "advised_batch",
            "learning_rate",
            "batch_tokens",
            "excess",
        ],
    )


def critical_batch(
    batch_size: Array,
    steps: Array,
    overhead: float = 0.2,
    reference: float = 0.0,
    resamples: int = 0,
    level: float = 0.9,
    seed: int = 0,
) -> dict[str, float]:
    """Steps to a fixed loss = smin + emin / B, fitted in log space; McCandlish et al. (2018), eq. 2.11.

    critical: emin / smin, where steps and examples are both twice their minimum. at_overhead: the largest
    batch that costs at most `overhead` more examples than the batch `reference` does (0: than the smallest
    batch), overhead x critical + (1 + overhead) x reference (Zhang et al. 2024, whose reference is
    256). Batch sizes in any one unit. With `resamples` also critical_low, critical_high, at_overhead_low
    and at_overhead_high, of probability `level`, by a bootstrap of the points
    (at 7 points of 5 % scatter 90 % intervals covered the truth 94 times in 100).
    """
    batch_size, steps = np.asarray(batch_size, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if len(np.unique(batch_size)) < 3:
        raise BadInput(
            "batch_size: at least three different batch sizes are needed for a critical batch size"
        )
    fitted = fit(
        law("batch-hyperbola"),
        {"batch_size": batch_size, "steps": steps},
        Objective("squares", "log"),
        starts=64,
    )
    p = fitted.params
    found = {
        "smin": p["smin"],
        "emin": p["emin"],
        "critical": p["emin"] / p["smin"],
        "r_squared": fitted.r_squared,
    }
    if resamples:
        drawn = bootstrap(fitted, resamples, seed).table
        low, high = np.quantile(drawn.emin / drawn.smin, [(1 - level) / 2, (1 + level) / 2])
        found |= {"critical_low": float(low), "critical_high": float(high)}
    found |= {
        k.replace("critical", "at_overhead"): overhead * found[k] + (1 + overhead) * reference
        for k in list(found)
        if k.startswith("critical")
    }
    return found


def steps_and_examples(loss_target_critical: float, smin: float, batch: Array) -> tuple[Array, Array]:
    """Steps and examples at a batch size on the hyperbola (S/smin - 1)(E/emin - 1) = 1
    (McCandlish et al. 2018, eq. 2.7).
    """
    batch = np.asarray(batch, dtype=np.float64)
    steps = smin * (1.0 + loss_target_critical / batch)
    return steps, steps * batch


def minimum_steps(steps: Array, batch: Array, critical: Array) -> Array:
    """Steps that the same progress would have taken at an infinite batch, S / (1 + B_crit / B)
    (Kaplan et al. 2020, eq. 5.4).
    """
    return np.asarray(steps, dtype=np.float64) / (
        1.0 + np.asarray(critical, dtype=np.float64) / np.asarray(batch, dtype=np.float64)
    )


def speedup(baseline: Any, tokens: Array, loss: Array, seed: int = 0) -> pd.DataFrame:
    """How many tokens the baseline optimizer would need for the loss another one reached,
    over the tokens it used.

    Wen et al. (2025): the baseline's L(D) = E + B D^-beta is fitted at end-of-schedule losses and inverted.
    Columns tokens, loss, baseline_tokens, speedup; inf where the loss lies below the baseline's fitted floor,
    NaN-free. `extrapolated` marks baseline token counts outside the measured range.
    """
    found = fit(law("power-data"), baseline, seed=seed)
    p = found.params
    gap = np.asarray(loss, dtype=np.float64) - p["E"]
    with np.errstate(all="ignore"):
        needed = np.where(gap > 0, (p["B"] / np.where(gap > 0, gap, 1.0)) ** (1.0 / p["beta"]), np.inf)
    measured = found.problem.columns["tokens"]
    tokens = np.asarray(tokens, dtype=np.float64)
    return pd.DataFrame(
        {
            "tokens": tokens,
            "loss": loss,
            "baseline_tokens": needed,
            "speedup": needed / tokens,
            "extrapolated": (needed > measured.max()) | (needed < measured.min()),
        }
    )
