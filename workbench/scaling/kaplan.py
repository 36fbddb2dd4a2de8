"""The whole Kaplan recipe: constants from small runs, then a large run's loss curve at any batch size before
it starts.

Kaplan et al. 2020, secs. 5 and 6; estimated in steps as in Su et al. 2024
("Unraveling the Mystery of Scaling Laws"):

1. Constant-loss contours: runs of one size at several batch sizes reach a loss L after S = Smin + Emin / B
   steps, so Bcrit(L) = Emin / Smin (McCandlish et al. 2018), and over many L: Bcrit = B* / L^(1/alpha_b).
2. Every logged point becomes a minimum-steps point, Smin = S / (1 + Bcrit(L) / B), and
   L = (Nc / N)^alpha_n + (Sc / Smin)^alpha_s is fitted to them.
3. A planned run solves both relations together: Bcrit depends on the loss that is being predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.fitting import Fit, fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.hyperparameters import critical_batch, minimum_steps

Array = np.ndarray
NEEDED = ("params", "batch_tokens", "step", "loss")


@dataclass(frozen=True)
class KaplanRecipe:
    """Constants of the recipe. `contours`: params, loss, smin, emin, critical, r_squared; `critical`: fit
    of Bcrit(L); `steps`: fit of L(N, Smin)."""

    contours: pd.DataFrame
    critical: Fit
    steps: Fit

    def critical_batch(self, loss: Any) -> Array:
        """Critical batch size in tokens at a loss."""
        return self.critical.predict({"loss": loss})

    def predict(self, params: float, batch_tokens: float, steps: Any) -> Array:
        """Loss after each of `steps` for a model of `params` parameters trained with `batch_tokens` per step.

        Bisection on L = (Nc/N)^an + (Sc (1 + Bcrit(L)/B) / S)^as, whose right side falls as L grows.
        """
        s = np.asarray(steps, dtype=np.float64)
        floor = (self.steps.params["Nc"] / params) ** self.steps.params["alpha_n"]
        low, high = np.full(s.shape, floor), np.full(s.shape, 100.0 + floor)
        for _ in range(80):
            middle = 0.5 * (low + high)
            effective = minimum_steps(s, np.full(s.shape, batch_tokens), self.critical_batch(middle))
            above = self.steps.predict({"params": np.full(s.shape, params), "steps": effective}) > middle
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return 0.5 * (low + high)


def contours(curves: Any, losses: Array) -> pd.DataFrame:
    """Constant-loss contours: for every size and loss that at least three batch sizes reach,
    S = smin + emin / B.
    """
    table = _checked(curves)
    rows = []
    for params, group in table.groupby("params", sort=True):
        for loss in np.sort(np.asarray(losses, dtype=np.float64))[::-1]:
            reached = [(batch, _first(run, loss)) for batch, run in group.groupby("batch_tokens", sort=True)]
            reached = [(b, s) for b, s in reached if np.isfinite(s)]
            if len(reached) < 3:
                continue
            batch, steps = np.array(reached, dtype=np.float64).T
            found = critical_batch(batch, steps)
            rows.append((params, loss, found["smin"], found["emin"], found["critical"], found["r_squared"]))
    if not rows:
        raise BadInput(
            "losses: no loss is reached by three batch sizes of one model size; "
            "choose losses that the runs pass, or add batch sizes"
        )
    return pd.DataFrame(rows, columns=["params", "loss", "smin", "emin", "critical", "r_squared"])


def _first(run: pd.DataFrame, loss: float) -> float:
    """Step at which a curve first passes a loss, between logged points on log-log lines;
    inf when never, or from the start.
    """
    run = run.sort_values("step")
    y, s = np.minimum.accumulate(run.loss.to_numpy()), run.step.to_numpy()
    i = int(np.searchsorted(-y, -loss))
    if i == 0 or i == len(y):
        return np.inf
    share = np.log(y[i - 1] / loss) / np.log(y[i - 1] / y[i])
    return float(np.exp(np.log(s[i - 1]) + share * np.log(s[i] / s[i - 1])))


def kaplan_recipe(
    curves: Any, losses: Array | None = None, after_step: float = 1.0, points: int = 2000, seed: int = 0
) -> KaplanRecipe:
    """Fit the recipe to logged training curves.

    curves: one row per logged point with params, batch_tokens, step (>= 1), loss. losses: contour levels
    (default: 12 over the range every size passes). after_step: drop the warm-up before it. points: at most
    this many points enter the last fit. BadInput for missing columns,
    fewer than three batch sizes or fewer than three contour levels.
    """
    table = _checked(curves)
    table = table[table.step >= max(after_step, 1.0)]
    if table.batch_tokens.nunique() < 3:
        raise BadInput(
            f"batch_tokens: {table.batch_tokens.nunique()} different sizes, "
            "at least 3 are needed for the critical batch size"
        )
    if losses is None:
        ends = table.groupby(["params", "batch_tokens"]).loss.agg(["min", "max"])
        losses = np.geomspace(ends["max"].min() * 0.98, ends["min"].min() * 1.02, 12)
    lines = contours(table, losses)
    if lines.loss.nunique() < 3:
        raise BadInput(
            "losses: fewer than three contour levels are reached by three batch sizes; "
            "train longer or choose other levels"
        )
    critical = fit(
        law("critical-batch-loss"), {"loss": lines.loss, "batch_tokens": lines.critical}, starts=64, seed=seed
    )
    if len(table) > points:
        table = table.sample(points, random_state=seed)
    effective = minimum_steps(
        table.step.to_numpy(),
        table.batch_tokens.to_numpy(),
        critical.predict({"loss": table.loss.to_numpy()}),
    )
    steps = fit(
        law("kaplan-steps"), {"params": table.params, "steps": effective, "loss": table.loss}, seed=seed
    )
    return KaplanRecipe(lines, critical, steps)


def _checked(curves: Any) -> pd.DataFrame:
    table = getattr(curves, "table", curves)
    missing = [c for c in NEEDED if c not in table]
    if missing:
        raise BadInput(f"columns: {', '.join(missing)} missing; training curves need {', '.join(NEEDED)}")
    return pd.DataFrame({c: np.asarray(table[c], dtype=np.float64) for c in NEEDED}).dropna()
