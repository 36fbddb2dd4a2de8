"""The `schedule-study` instrument: schedules and their decay shares at equal tuning."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.axis import Choice, parameter, warn
from workbench.errors import BadInput
from workbench.figures import figure, line
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.optimizer.optimizers import OPTIMIZER, usual_learning_rate
from workbench.training.pairs import check_pair
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE, has_curve, sampled
from workbench.training.studies.comparison import (
    Comparison,
    ComparisonResult,
    bars,
    leaderboard,
    tuning_table,
)
from workbench.training.studies.lists import Texts, labels, listed, separated


class ScheduleStudy(Comparison):
    """Learning-rate schedules at one or several budgets, each with its own tuned peak learning rate."""

    summary_line = (
        "schedules at several budgets: test loss with intervals, average rank, the curves and their areas"
    )

    schedules: Texts = parameter(
        ["cosine", "linear", "rex", "uba", "step", "one-cycle", "constant"],
        "schedules, one with options as 'uba phi=5'",
        min_length=1,
    )
    budgets: tuple[float, ...] = parameter(
        (0.25, 1.0),
        "budgets as fractions of the examples; every schedule decays fully within each",
        min_length=1,
    )
    optimizer: Choice = OPTIMIZER.choice("adamw", "optimizer of every run")

    def __init__(self, **given: Any) -> None:
        if "phi" in given:
            warn("phi: is an option of a schedule now, write 'uba phi=5' in schedules")
            phi = given.pop("phi")
            texts = separated(given.get("schedules", type(self).model_fields["schedules"].default))
            given["schedules"] = [f"uba phi={phi}" if text == "uba" else text for text in texts]
        super().__init__(**given)

    def compared(self) -> list[Choice]:
        return listed(LEARNING_RATE_SCHEDULE, self.schedules, "schedules")

    @classmethod
    def result_class(cls) -> type[Result]:
        return ScheduleResult

    def check(self, on: Subject) -> None:
        super().check(on)
        rate = usual_learning_rate(self.optimizer)
        for schedule in self.compared():
            check_pair(self.optimizer, schedule, rate, self.weight_decay, self.warmup)
        if not all(0 < b <= 1 for b in self.budgets) or min(self.budgets) * self.examples < self.batch_size:
            raise BadInput(
                f"budgets: {self.budgets} must lie in (0, 1] and leave at least one step of batch_size "
                f"{self.batch_size}"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        schedules = self.compared()
        chosen = labels(schedules)
        pairs = [(name, budget) for budget in self.budgets for name in chosen]
        candidates = [
            {
                "optimizer": self.optimizer,
                "schedule": schedules[chosen.index(name)],
                "examples": max(self.batch_size, round(budget * self.examples)),
            }
            for name, budget in pairs
        ]
        rows = [f"{name} at {budget:g}" for name, budget in pairs]
        tuning, finals = self.protocol(
            on, progress, candidates, [usual_learning_rate(self.optimizer)] * len(pairs), rows
        )
        table = leaderboard(
            finals, [{"name": name, "budget": budget} for name, budget in pairs], tuning, self.level
        )
        facts: dict[str, Any] = {"runs": len(tuning) + len(finals)}
        if len(table):
            table["rank"] = table.groupby("budget").test.rank()
            mean_rank = table.groupby("name")["rank"].mean().sort_values()
            facts |= {
                "best": mean_rank.index[0],
                **{f"mean_rank_{k}": float(v) for k, v in mean_rank.items()},
            }
        steps = max(2, round(self.examples / self.batch_size))
        shapes = [pd.DataFrame(columns=["name", "step", "multiple"])]
        for name, schedule in zip(chosen, schedules, strict=True):
            if has_curve(schedule):
                multiples = sampled(schedule, steps, self.warmup)
                shapes.append(pd.DataFrame({"name": name, "step": np.arange(steps), "multiple": multiples}))
        return self.result(
            table,
            facts,
            tables={"tuning": tuning_table(tuning, rows), "shapes": pd.concat(shapes[1:] or shapes)},
        )


class ScheduleView(BaseModel):
    show: Literal["losses", "shapes", "tuning"] = Field(
        "losses", description="test losses, the schedules themselves, or the tuning runs"
    )


class ScheduleResult(ComparisonResult):
    def view_model(self) -> type[BaseModel] | None:
        return ScheduleView

    def figure(self, **view: Any) -> go.Figure:
        show = ScheduleView(**view).show
        if show == "tuning" or self.table.empty:
            return super().figure(show="tuning")
        if show == "shapes":
            fig = figure("Schedules", x="step", y="learning rate / peak")
            for name, part in self.tables["shapes"].groupby("name", sort=False):
                line(fig, part.step, part.multiple, f"{name} (area {part.multiple.mean():.2f})", mode="lines")
            return fig
        fig = figure("Test loss at each schedule's best learning rate", x="test loss (nats)", y="")
        if not self.table.empty:
            for i, (budget, part) in enumerate(self.table.groupby("budget")):
                bars(fig, part, part["name"], i, f"budget {budget:g}")
        return fig
