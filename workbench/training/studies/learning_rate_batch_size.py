"""The loss over learning rate and batch size at a fixed number of examples:
its bowl, its plateau, and what the rules predict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.figures import figure, line
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.hyperparameters import best_settings, excess_loss, step_law
from workbench.subjects import Subject
from workbench.training.batch.batch_size import log_slope
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.pairs import check_pair
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE, scaled_lr
from workbench.training.sweep.fields import SweptInstrument
from workbench.training.sweep.objective import (
    Start,
    TrainingObjective,
    learning_rates,
    prepared_folder,
    swept,
)


def best_lr(cell: pd.DataFrame) -> tuple[float, float, bool]:
    """(learning rate, loss, inside) of one batch size: the parabola in ln lr through the best run and its
    neighbours.

    cell : columns lr, value. At an end of the grid the end itself is returned with inside False:
        the optimum may lie beyond.
    """
    good = cell[np.isfinite(cell.value)].sort_values("lr").reset_index(drop=True)
    if good.empty:
        return math.nan, math.nan, False
    at = int(good.value.idxmin())
    diverged_above = at == len(good) - 1 and cell.lr.max() > good.lr.max()
    if at == 0 or at == len(good) - 1:
        return float(good.lr[at]), float(good.value[at]), diverged_above
    x, y = np.log(good.lr[at - 1 : at + 1 + 1].to_numpy()), good.value[at - 1 : at + 1 + 1].to_numpy()
    a, b, c = np.polyfit(x - x[1], y, 2)
    if a <= 0:
        return float(good.lr[at]), float(good.value[at]), True
    shift = float(np.clip(-b / (2 * a), x[0] - x[1], x[2] - x[1]))
    return float(math.exp(x[1] + shift)), float(c + b * shift + a * shift * shift), True


def optima(table: pd.DataFrame) -> pd.DataFrame:
    """Best learning rate per batch size and seed-averaged loss there: batch_size, lr, value, inside."""
    mean = table.groupby(["batch_size", "lr"], as_index=False)[["value"]].mean()
    rows = [(batch, *best_lr(mean[mean.batch_size == batch])) for batch in sorted(set(mean.batch_size))]
    return pd.DataFrame(rows, columns=["batch_size", "lr", "value", "inside"])


def bowl_interval(
    frame: pd.DataFrame, within: float, resamples: int, level: float, seed: int
) -> dict[str, float]:
    """Bootstrap intervals of the bowl's optimum over runs:
    lr_low, lr_high, batch_low, batch_high (NaN when too few resamples have a bowl).
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = frame.iloc[rng.integers(len(frame), size=len(frame))]
        best = best_settings(drawn, "bowl", within).iloc[0]
        if not best.fallback:
            found.append((best.learning_rate, best.batch_tokens))
    if len(found) < resamples / 2:
        return dict.fromkeys(("lr_low", "lr_high", "batch_low", "batch_high"), math.nan)
    low, high = np.quantile(np.array(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        "lr_low": float(low[0]),
        "lr_high": float(high[0]),
        "batch_low": float(low[1]),
        "batch_high": float(high[1]),
    }


class LearningRateBatchSize(SweptInstrument):
    """Final loss over a grid of learning rates and batch sizes,
    every run given the same number of examples and a fully decayed rate.
    """

    summary_line = (
        "loss surface over learning rate and batch size, its fitted optimum with intervals, "
        "and what scaling rules predict"
    )

    examples: int = parameter(8192, "training examples of every run", ge=16, le=10**9, scale="log")
    learning_rate_low: float = parameter(3e-4, "lowest peak learning rate", gt=0, le=100, scale="log")
    learning_rate_high: float = parameter(3e-2, "highest peak learning rate", gt=0, le=100, scale="log")
    learning_rate_points: int = parameter(6, "learning rates, evenly spaced in the logarithm", ge=2, le=50)
    batch_sizes: tuple[int, ...] = parameter((8, 32, 128), "batch sizes (examples)", min_length=1)
    micro_batch: int = parameter(
        0, "examples at once (gradient accumulation); 0 takes the whole batch", ge=0, group="Training"
    )
    optimizer: Choice = OPTIMIZER.choice("adamw", "optimizer")
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("cosine", "learning-rate schedule", group="Training")
    warmup: float = parameter(0.1, "linear warm-up as a fraction of the steps", ge=0, lt=1, group="Training")
    weight_decay: float = parameter(0.01, "weight decay of matrices", ge=0, le=10, group="Training")
    start: Start = parameter(
        "random", "start every run from random weights or from the subject's", group="Training"
    )
    evaluate_limit: int = parameter(512, "validation examples that a run is judged by", ge=1, group="Data")
    within: float = parameter(
        0.05,
        "the bowl is fitted to runs within this fraction of the lowest loss",
        gt=0,
        le=1,
        group="Intervals",
    )
    level: float = parameter(0.9, "probability content of the intervals", gt=0.5, lt=1, group="Intervals")
    resamples: int = parameter(
        200, "bootstrap resamples of the bowl's interval", ge=2, le=10_000, group="Intervals"
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {
            "lr_low": "learning_rate_low",
            "lr_high": "learning_rate_high",
            "lr_points": "learning_rate_points",
        }

    @classmethod
    def result_class(cls) -> type[Result]:
        return SurfaceResult

    def check(self, on: Subject) -> None:
        learning_rates(self.learning_rate_low, self.learning_rate_high, self.learning_rate_points)
        check_pair(self.optimizer, self.schedule, self.learning_rate_high, self.weight_decay, self.warmup)
        on.split("train")
        on.split("validation")
        if max(self.batch_sizes) > self.examples or min(self.batch_sizes) < 1:
            raise BadInput(
                f"batch_sizes: {self.batch_sizes} must lie between 1 and examples ({self.examples})"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        fixed = {
            "examples": self.examples,
            "micro_batch": self.micro_batch,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "evaluate_limit": self.evaluate_limit,
        }
        objective = TrainingObjective(
            prepared_folder(on, self.workers), fixed, self.start, str(on.device), test=False
        )
        space = {
            "batch_size": list(dict.fromkeys(self.batch_sizes)),
            "lr": learning_rates(self.learning_rate_low, self.learning_rate_high, self.learning_rate_points),
            "seed": [self.seed + i for i in range(self.seeds)],
        }
        shape = shape_of(on)

        def preview(table: pd.DataFrame) -> None:
            if progress.watched and "value" in table:
                progress.preview(self.summarise(table, shape))

        table = swept(
            self,
            on,
            "surface",
            space,
            objective,
            progress,
            self.workers,
            self.storage,
            self.backend,
            on_change=preview,
        )
        return self.summarise(table, shape)

    def summarise(self, table: pd.DataFrame, shape: dict[str, float]) -> Result:
        """The result of the trials that are there: also the code path for a table of somebody else's runs."""
        done = table[table.state == "done"].copy() if "state" in table else table.copy()
        keep = [
            c
            for c in (
                "batch_size",
                "lr",
                "seed",
                "value",
                "diverged",
                "steps",
                "train_loss",
                "train_seconds",
                "state_bytes",
                "trial",
            )
            if c in done
        ]
        done = done[keep].reset_index(drop=True)
        done["value"] = pd.to_numeric(done.get("value", pd.Series(dtype=float)), errors="coerce")
        facts: dict[str, Any] = {
            "runs": len(done),
            "diverged_runs": int(done.diverged.astype(bool).sum()) if "diverged" in done else 0,
        }
        finite = done[np.isfinite(done.value)] if len(done) else done
        tables: dict[str, pd.DataFrame] = {}
        if len(finite):
            best = finite.iloc[int(np.argmin(finite.value.to_numpy()))]
            facts |= {
                "best_loss": float(best.value),
                "best_lr": float(best.lr),
                "best_batch_size": int(best.batch_size),
            }
            facts |= self._bowl(finite, shape)
            if shape.get("language"):
                facts["step_law_excess"] = float(
                    excess_loss(self._runs(finite, shape), step_law).excess.iloc[0]
                )
            tables["optima"] = optima(done)
            tables["predictions"] = predictions(tables["optima"], shape, self.examples)
            usable = tables["optima"][tables["optima"].inside]
            if len(usable) >= 3:
                slope = log_slope(usable.batch_size, usable.lr, self.level)
                facts |= {
                    "lr_batch_slope": slope["slope"],
                    "lr_batch_slope_low": slope["low"],
                    "lr_batch_slope_high": slope["high"],
                }
        return self.result(done, facts, tables=tables, partial=len(done) < len(table))

    def _runs(self, finite: pd.DataFrame, shape: dict[str, float]) -> pd.DataFrame:
        """One cell of the scaling package's run table; of a subject without tokens an example is the unit."""
        unit = shape.get("tokens_per_example", 1.0)
        return pd.DataFrame(
            {
                "params": shape.get("params", 1.0),
                "tokens": self.examples * unit,
                "learning_rate": finite.lr.astype(float),
                "batch_tokens": finite.batch_size.astype(float) * unit,
                "loss": finite.value.astype(float),
            }
        )

    def _bowl(self, finite: pd.DataFrame, shape: dict[str, float]) -> dict[str, Any]:
        frame = self._runs(finite, shape | {"tokens_per_example": 1.0})
        found = best_settings(frame, "bowl", self.within).iloc[0]
        plateau = finite[finite.value <= finite.value.min() * 1.01]
        facts: dict[str, Any] = {
            "bowl": not bool(found.fallback),
            "optimum_lr": float(found.learning_rate),
            "optimum_batch_size": float(found.batch_tokens),
            "plateau_share": len(plateau) / len(finite),
            "plateau_lr_ratio": float(plateau.lr.max() / plateau.lr.min()),
        }
        if not found.fallback:
            facts |= {"bowl_r_squared": float(found.r_squared)} | bowl_interval(
                frame, self.within, self.resamples, self.level, self.seed
            )
        return facts


def shape_of(on: Subject) -> dict[str, float]:
    """Parameters without embeddings and targets per example, for the laws that need them."""
    from torch import nn

    embedded = {
        id(p) for m in on.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    params = sum(p.numel() for p in on.model.parameters() if id(p) not in embedded)
    sample = {k: v[:64] for k, v in on.split("train").items()}
    return {
        "params": float(params),
        "tokens_per_example": on.task.items(sample) / len(next(iter(sample.values()))),
        "language": float(on.task.name == "causal-lm"),
    }


def predictions(found: pd.DataFrame, shape: dict[str, float], examples: int) -> pd.DataFrame:
    """Learning rates by rule at each measured batch size, anchored at the smallest batch:
    batch_size, rule, lr.
    """
    usable = found.dropna(subset=["lr"])
    if usable.empty:
        return pd.DataFrame(columns=["batch_size", "rule", "lr"])
    anchor = usable.iloc[int(np.argmin(usable.batch_size.to_numpy()))]
    rows = [
        (b, rule, scaled_lr(anchor.lr, b, anchor.batch_size, rule))
        for rule in ("sqrt", "linear")
        for b in usable.batch_size
    ]
    if shape.get("language"):
        lr, batch = step_law(shape["params"], examples * shape["tokens_per_example"])
        rows.append((batch / shape["tokens_per_example"], "step law", lr))
    return pd.DataFrame(rows, columns=["batch_size", "rule", "lr"])


def ticks(low: float, high: float) -> str | int:
    """Plotly's dtick of a logarithmic axis: 1, 2 and 5 of each decade where there is room."""
    return "D2" if high / low < 1e4 else 1


class SurfaceView(BaseModel):
    show: Literal["surface", "slices"] = Field(
        "surface", description="the surface, or the loss against learning rate for each batch size"
    )
    predictions: bool = Field(True, description="learning rates that the scaling rules predict")


class SurfaceResult(Result):
    def view_model(self) -> type[BaseModel] | None:
        return SurfaceView

    def figure(self, **view: Any) -> go.Figure:
        settings = SurfaceView(**view)
        if settings.show == "slices" or self.table.empty or self.table.batch_size.nunique() < 2:
            return self._slices()
        mean = self.table.groupby(["batch_size", "lr"], as_index=False)["value"].mean()
        grid = mean.pivot(index="lr", columns="batch_size", values="value").replace([np.inf, -np.inf], np.nan)
        fig = figure(
            "Loss over learning rate and batch size",
            x="batch size (examples)",
            y="learning rate",
            xaxis_type="log",
            yaxis_type="log",
        )
        fig.update_xaxes(tickvals=list(grid.columns), ticktext=[f"{batch:g}" for batch in grid.columns])
        fig.update_yaxes(dtick=ticks(grid.index.min(), grid.index.max()))
        low = float(np.nanmin(grid.to_numpy()))
        fig.add_trace(
            go.Heatmap(
                x=grid.columns,
                y=grid.index,
                z=np.minimum(grid.to_numpy() / low - 1, 0.5) * 100,
                coloraxis="coloraxis",
                name="runs",
                customdata=grid.to_numpy(),
                hovertemplate="batch %{x}, lr %{y:.2e}: loss %{customdata:.4f}<extra></extra>",
            )
        )
        fig.update_layout(coloraxis_colorbar_title_text="above best (%)", coloraxis_reversescale=True)
        found = self.tables.get("optima", pd.DataFrame(columns=["batch_size", "lr"])).dropna(subset=["lr"])
        line(fig, found.batch_size, found.lr, "best learning rate", mode="lines+markers")
        if settings.predictions and "predictions" in self.tables:
            for rule, part in self.tables["predictions"].groupby("rule", sort=False):
                line(
                    fig,
                    part.batch_size,
                    part.lr,
                    f"{rule} rule" if rule != "step law" else "step law",
                    mode="markers" if len(part) == 1 else "lines",
                )
        if self.facts.get("bowl"):
            at = self.facts
            errors = {}
            if math.isfinite(at.get("lr_low", math.nan)):
                errors = dict(
                    error_y=dict(
                        type="data",
                        symmetric=False,
                        array=[max(at["lr_high"] - at["optimum_lr"], 0)],
                        arrayminus=[max(at["optimum_lr"] - at["lr_low"], 0)],
                    )
                )
            fig.add_trace(
                go.Scatter(
                    x=[at["optimum_batch_size"]],
                    y=[at["optimum_lr"]],
                    mode="markers",
                    name="bowl optimum",
                    marker=dict(symbol="star", size=14, color="#D55E00", line=dict(color="white", width=1)),
                    **errors,
                )
            )
        return fig

    def _slices(self) -> go.Figure:
        fig = figure("Loss against learning rate", x="learning rate", y="loss (nats)", xaxis_type="log")
        if self.table.empty:
            return fig
        finite = self.table[np.isfinite(self.table.value)]
        asked = (
            (self.instrument.learning_rate_low, self.instrument.learning_rate_high)
            if isinstance(self.instrument, LearningRateBatchSize)
            else (math.inf, 0.0)
        )
        low, high = (
            min(asked[0], self.table.lr.min()),
            max(asked[1], self.table.lr.max()),
        )  # what is still to come has its place
        room = 0.05 * math.log10(high / low) + 0.02
        fig.update_xaxes(range=[math.log10(low) - room, math.log10(high) + room], dtick=ticks(low, high))
        for batch, part in finite.groupby("batch_size"):
            cells = part.groupby("lr").value.agg(["mean", "min", "max"]).reset_index()
            band = (cells["min"], cells["max"]) if part.groupby("lr").size().max() > 1 else None
            line(fig, cells.lr, cells["mean"], f"batch {batch}", band=band, mode="lines+markers")
        if len(finite):
            lowest = finite.groupby("batch_size").value.min()
            if finite.value.max() > 3 * lowest.min():
                fig.update_yaxes(type="log", dtick="D2", exponentformat="none")
            else:  # every batch size shows its minimum
                fig.update_yaxes(
                    range=[
                        float(lowest.min()) * 0.98,
                        float(min(finite.value.max(), 1.5 * lowest.max())) * 1.02,
                    ]
                )
        return fig
