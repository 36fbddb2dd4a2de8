"""The `learning-rate-range` instrument: one short run whose learning rate grows until the loss does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.axis import Choice, parameter
from workbench.figures import figure, line, rule
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.pairs import check_pair
from workbench.training.schedule.schedules import ExponentialRise
from workbench.training.sweep.objective import Start, begun, learning_rates


def smoothed(losses: np.ndarray, memory: float) -> np.ndarray:
    """Exponential average, corrected for its start: (steps,) -> (steps,)."""
    found, average = np.empty(len(losses)), 0.0
    for t, loss in enumerate(losses):
        average = memory * average + (1 - memory) * loss
        found[t] = average / (1 - memory ** (t + 1))
    return found


class LearningRateRange(SubjectInstrument):
    """Learning-rate range test (Smith 2017): a rate that grows exponentially, the loss beside it,
    the rate where it falls fastest.

    A fall of the smoothed loss below the noise of a batch says nothing about rates: take more steps. It
    diverges where the smoothed loss rises twice the noise above its first value.
    """

    summary_line = (
        "learning-rate range test: loss against a growing rate, the steepest descent and where it diverges"
    )

    learning_rate_low: float = parameter(1e-5, "learning rate of the first step", gt=0, le=100, scale="log")
    learning_rate_high: float = parameter(1.0, "learning rate of the last step", gt=0, le=1e4, scale="log")
    steps: int = parameter(200, "steps between them", ge=10, le=100_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    optimizer: Choice = OPTIMIZER.choice("adamw", "optimizer")
    weight_decay: float = parameter(0.0, "weight decay of matrices", ge=0, le=10)
    memory: float = parameter(0.9, "of the exponential average that smooths the losses", ge=0, lt=1)
    start: Start = parameter("random", "start from random weights or from the subject's")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"lr_low": "learning_rate_low", "lr_high": "learning_rate_high"}

    @classmethod
    def result_class(cls) -> type[Result]:
        return RangeResult

    def check(self, on: Subject) -> None:
        learning_rates(self.learning_rate_low, self.learning_rate_high, 2)
        check_pair(self.optimizer, "constant", self.learning_rate_high, self.weight_decay)
        on.split("train")

    def _run(self, on: Subject, progress: Progress) -> Result:
        mine = begun(on, self.start, self.seed)

        def hopeless(run: Training) -> None:
            found = smoothed(np.array([row["loss"] for row in run.rows]), self.memory)
            run.stop = len(found) > 10 and found[-1] > 2 * found[0]

        factor = self.learning_rate_high / self.learning_rate_low
        run = fit(
            mine,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate_low,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=lambda optimizer, total: ExponentialRise(optimizer, total, factor),
            clip=None,
            seed=self.seed,
            callbacks=[hopeless],
            evaluate_limit=1,
            progress=progress,
        )
        table = (
            run.history[["step", "lr", "loss"]].copy()
            if run.rows
            else pd.DataFrame(columns=["step", "lr", "loss"])
        )
        facts: dict[str, Any] = {"steps": run.step, "diverged": run.diverged}
        finite = table[np.isfinite(table.loss.astype(float))].copy()
        if len(finite) >= 3:
            finite["smooth"] = smoothed(finite.loss.to_numpy(float), self.memory)
            table["smooth"] = finite.smooth
            lowest = int(np.argmin(finite.smooth.to_numpy()))
            slope = np.gradient(finite.smooth.to_numpy(), np.log(finite.lr.to_numpy(float)))
            noise = float(
                (finite.loss.astype(float) - finite.smooth)
                .iloc[: max(lowest, len(finite) // 4) + 1]
                .std(ddof=0)
            )
            beyond = finite[
                (finite.index > finite.index[lowest]) & (finite.smooth > finite.smooth.iloc[0] + 2 * noise)
            ]
            facts |= {
                "lr_steepest": float(finite.lr.iloc[int(np.argmin(slope[: lowest + 1]))]),
                "lr_lowest": float(finite.lr.iloc[lowest]),
                "lr_diverges": float(beyond.lr.iloc[0])
                if len(beyond)
                else (float(finite.lr.iloc[-1]) if run.diverged else math.nan),
                "fall": float(finite.smooth.iloc[0] - finite.smooth.iloc[lowest]),
                "noise": noise,
            }
        return self.result(table, facts)


class RangeResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        fig = figure(
            "Learning-rate range test", x="learning rate", y="loss (nats)", xaxis_type="log", xaxis_dtick=1
        )
        if "smooth" not in self.table:
            return fig
        line(fig, self.table.lr, self.table.loss, "training batch", mode="markers")
        line(fig, self.table.lr, self.table.smooth, "smoothed", mode="lines")
        low, first = float(self.table.smooth.min()), float(self.table.smooth.iloc[0])
        fig.update_yaxes(range=[low - 0.1 * (first - low) - 0.01, first + 0.5 * (first - low) + 0.01])
        rule(fig, f"steepest {self.facts['lr_steepest']:.2g}", x=self.facts["lr_steepest"])
        return fig
