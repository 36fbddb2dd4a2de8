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


#: Standard deviations of the smoothed loss that a fall, from the first level to the lowest, must exceed.
CLEAR = 5.0
#: Standard deviations of single losses above the lowest smoothed one at which a run is given up.
HOPELESS = 12.0


def noise_of(losses: np.ndarray) -> float:
    """Standard deviation of single losses about their trend, by the median of second differences:
    a trend that is straight over three steps does not count (von Neumann et al. 1941; Gasser et al. 1986).
    """
    if len(losses) < 3:
        return 0.0
    bends = losses[:-2] - 2 * losses[1:-1] + losses[2:]
    return float(np.median(np.abs(bends)) / (0.6745 * math.sqrt(6.0)))


def level_noise(losses: np.ndarray, memory: float) -> float:
    """Standard deviation of a smoothed loss: noise x sqrt((1 - m) / (1 + m))."""
    return noise_of(losses) * math.sqrt((1 - memory) / (1 + memory))


def rose(losses: np.ndarray, memory: float) -> int | None:
    """The first step from which the smoothed loss stays hopelessly above its lowest value and its start."""
    smooth = smoothed(losses, memory)
    lowest = int(np.argmin(smooth))
    noise = noise_of(losses[: lowest + 1] if lowest >= 10 else losses)
    fall = float(smooth[0] - smooth[lowest])
    above = smooth[lowest:] > max(smooth[0], smooth[lowest]) + max(HOPELESS * noise, fall, 1e-300)
    if not above[-1]:
        return None
    return lowest + int(len(above) - np.argmin(above[::-1])) if not above.all() else lowest


class LearningRateRange(SubjectInstrument):
    """Learning-rate range test (Smith 2017): a rate that grows exponentially, the loss beside it,
    the rate where it falls fastest.

    A fall of the smoothed loss below five times its noise says nothing about rates: there is no suggestion
    then, only 'no clear fall'. It diverges where the smoothed loss stays far above its lowest value and
    above where it began. Nothing here depends on the loss's sign, unit or start.
    """

    summary_line = (
        "learning-rate range test: loss against a growing rate, the steepest descent and where it diverges"
    )

    learning_rate_low: float = parameter(1e-5, "learning rate of the first step", gt=0, le=100, scale="log")
    learning_rate_high: float = parameter(1.0, "learning rate of the last step", gt=0, le=1e4, scale="log")
    steps: int = parameter(200, "steps between them", ge=10, le=100_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    optimizer: Choice = OPTIMIZER.choice("adamw", "optimizer")
    weight_decay: float = parameter(0.0, "weight decay of matrices", ge=0, le=10, group="Training")
    memory: float = parameter(
        0.9, "of the exponential average that smooths the losses", ge=0, lt=1, group="Training"
    )
    start: Start = parameter("random", "start from random weights or from the subject's", group="Training")

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
            losses = np.array([row["loss"] for row in run.rows], dtype=np.float64)
            finite = len(losses) > 20 and bool(np.isfinite(losses).all())
            run.stop = finite and rose(losses, self.memory) is not None

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
            facts |= self.found(finite, run.diverged)
        return self.result(table, facts)

    def found(self, finite: pd.DataFrame, diverged: bool) -> dict[str, Any]:
        """What a curve says: suggestions only where the loss falls clearly beyond its noise."""
        losses, smooth = finite.loss.to_numpy(np.float64), finite.smooth.to_numpy(np.float64)
        rates = finite.lr.to_numpy(np.float64)
        lowest = int(np.argmin(smooth))
        level = level_noise(losses, self.memory)
        first = max(1, min(len(losses) // 10, round(1 / (1 - self.memory))))
        start = float(np.mean(losses[:first]))
        spread = level * math.sqrt(1 + (1 + self.memory) / ((1 - self.memory) * first))
        fall = start - float(smooth[lowest])
        clear = lowest > 0 and fall > CLEAR * spread and fall > 0
        beyond = rose(losses, self.memory)
        facts: dict[str, Any] = {
            "lr_steepest": math.nan,
            "lr_lowest": float(rates[lowest]) if clear else math.nan,
            "lr_diverges": float(rates[beyond])
            if beyond is not None
            else (float(rates[-1]) if diverged else math.nan),
            "fall": fall,
            "noise": noise_of(losses),
        }
        if clear:
            settled = min(first, lowest - 1)  # the average of the first few losses is as noisy as they are
            at = settled + steepest(smooth[settled : lowest + 1], level)
            facts["lr_steepest"] = float(rates[at])
        else:
            facts["note"] = (
                "no clear fall: the loss does not leave its noise, so no rate is suggested; take more steps, "
                "a larger batch or a higher learning_rate_high"
            )
        return facts


def steepest(smooth: np.ndarray, level: float) -> int:
    """The step of the steepest descent towards the last (lowest) value, by the slope over a window that is
    as wide as a fall of CLEAR times the noise, so that no wiggle is taken for a descent.
    """
    total = float(smooth[0] - smooth[-1])
    best, found = len(smooth) - 1, -math.inf
    need = min(max(1.5 * CLEAR * level, total / 3), max(total, 1e-300))
    for begin in range(len(smooth) - 1):
        reached = np.flatnonzero(smooth[begin] - smooth[begin:] >= need)
        if len(reached):
            slope = float(smooth[begin] - smooth[begin + reached[0]]) / float(reached[0])
            if slope > found:
                best, found = begin + int(reached[0]) // 2, slope
    return best


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
        if math.isfinite(self.facts["lr_steepest"]):
            rule(fig, f"steepest {self.facts['lr_steepest']:.2g}", x=self.facts["lr_steepest"])
        return fig
