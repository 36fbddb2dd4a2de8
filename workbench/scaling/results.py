"""Results of the scaling instruments: tables of curves prepared while running,
and the view that draws them.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.errors import BadInput
from workbench.results import Result, format_fact
from workbench.scaling import figures
from workbench.scaling.comparison import compute_of
from workbench.scaling.doubt.prediction import PredictionIntervals
from workbench.scaling.fitting import Fit
from workbench.scaling.law_figures import band_figure
from workbench.scaling.planning import Draws

Array = np.ndarray


class FitView(BaseModel):
    """What to draw of a fit."""

    view: Literal["fit", "residuals", "isoflop", "contour", "held out", "laws", "draws", "profile"] = Field(
        "fit",
        description=(
            "the law with the runs, residuals, IsoFLOP curves, contours, held-out error, "
            "several laws as a band, correlated parameters, profiles"
        ),
    )


class PlanView(BaseModel):
    """What to draw of a plan."""

    view: Literal["frontier", "over-training", "trajectory"] = Field(
        "frontier",
        description="size and tokens against budget, the price of a smaller model, loss against tokens",
    )


def curve_tables(
    found: Fit,
    coming: PredictionIntervals,
    runs: pd.DataFrame,
    level: float,
    groups: int = 6,
    points: int = 60,
) -> dict[str, pd.DataFrame]:
    """What the figures draw: the law along tokens for up to six sizes (with bands for new runs),
    along sizes for up to six budgets, and over a grid.

    `curves`: group, x, loss, low, high; `isoflop_curves`: flops, params, loss, low, high; `contour`: params,
    tokens, loss. The law's other columns are held at their median.
    """
    law = found.law
    other = {c: float(np.median(runs[c])) for c in law.columns if c not in ("params", "tokens", "flops")}

    def band(columns: dict[str, Any]) -> dict[str, Array]:
        made = coming.band(other | columns, level)
        return {"loss": made.predicted.to_numpy(), "low": made.low.to_numpy(), "high": made.high.to_numpy()}

    tables: dict[str, pd.DataFrame] = {}
    axis = next(c for c in ("tokens", "flops", "params", *law.columns) if c in law.columns)
    low, high = runs[axis].min(), runs[axis].max()
    x = np.geomspace(low / 1.5, high * 1.5, points) if low > 0 else np.linspace(low, high, points)
    if axis != "tokens" or "params" not in law.columns:
        medians = {c: np.full(points, float(np.median(runs[c]))) for c in law.columns if c != axis}
        tables["curves"] = pd.DataFrame({"group": np.nan, "x": x, **band(medians | {axis: x})})
    else:
        every = np.unique(runs.params)
        sizes = np.unique(np.quantile(every, np.linspace(0, 1, min(groups, len(every))), method="nearest"))
        parts = [
            pd.DataFrame({"group": n, "x": x, **band({"params": np.full(points, n), "tokens": x})})
            for n in sizes
        ]
        tables["curves"] = pd.concat(parts, ignore_index=True)
        compute = compute_of(runs)
        n = np.geomspace(every[0] / 2, every[-1] * 2, points)
        budgets = np.geomspace(compute.min(), compute.max(), groups)
        parts = [
            pd.DataFrame({"flops": c, "params": n, **band({"params": n, "tokens": c / (6 * n)})})
            for c in budgets
        ]
        tables["isoflop_curves"] = pd.concat(parts, ignore_index=True)
        sides = np.geomspace(n[0], n[-1], 40), np.geomspace(low / 2, high * 2, 40)
        grid_n, grid_d = (g.ravel() for g in np.meshgrid(*sides))
        surface = Draws(law, found.theta[None]).loss(other | {"params": grid_n, "tokens": grid_d})[0]
        tables["contour"] = pd.DataFrame({"params": grid_n, "tokens": grid_d, "loss": surface})
    tables["curves"]["axis"] = axis
    return tables


class ScalingFitResult(Result):
    """A fitted law: `table` holds parameters with intervals;
    `tables` runs, optima, influence, held_out, extrapolation, comparison, ...
    """

    def view_model(self) -> type[BaseModel]:
        return FitView

    def figure(self, view: str = "fit", **more: Any) -> go.Figure:
        makers = {
            "fit": figures.fit_figure,
            "residuals": figures.residual_figure,
            "isoflop": figures.isoflop_figure,
            "contour": figures.contour_figure,
            "held out": figures.held_out_figure,
            "laws": band_figure,
            "draws": figures.draws_figure,
            "profile": figures.profile_figure,
        }
        if view not in makers:
            raise BadInput(f"view: {view!r} is not accepted, it should be one of {', '.join(makers)}")
        return makers[view](self)

    def summary(self) -> str:
        shown = [
            f"{k} {format_fact(v)}"
            for k, v in self.facts.items()
            if k not in ("law", "certificate", "converged", "note") and isinstance(v, int | float)
        ]
        return (
            f"{self.instrument.name()} {self.facts['law']}: {', '.join(shown)}; {self.facts['certificate']}"
        )


class ScalingPlanResult(Result):
    """A plan: `table` holds quantity, estimate, low, high;
    `tables` frontier, over_training, trajectory, advice, isoflop_bias, ...
    """

    def view_model(self) -> type[BaseModel]:
        return PlanView

    def figure(self, view: str = "frontier", **more: Any) -> go.Figure:
        makers = {
            "frontier": figures.frontier_figure,
            "over-training": figures.over_training_figure,
            "trajectory": figures.trajectory_figure,
        }
        if view not in makers:
            raise BadInput(f"view: {view!r} is not accepted, it should be one of {', '.join(makers)}")
        return makers[view](self)
