"""The `train` instrument: train a subject with the fields of the loop,
get the trained subject and its curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.axis import Choice, parameter
from workbench.figures import figure, line
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.batch.rules import BATCH_RULE
from workbench.training.loop import Training, fit
from workbench.training.losses import TRAINING_LOSS
from workbench.training.models.model_change import MODEL_CHANGE
from workbench.training.optimizer.optimizers import OPTIMIZER, state_bytes
from workbench.training.pairs import check_pair
from workbench.training.precision.precision import PRECISION, arithmetic_of
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE
from workbench.training.sweep.objective import Start, reinitialised


class Train(SubjectInstrument):
    """Train the subject: any optimizer, schedule and precision of the bench (products of rounded, rotated
    operands among them), masks and number formats kept.
    """

    summary_line = "train a subject: loss, learning rate and gradient norm per step, validation and test loss"
    changes_model = True

    steps: int = parameter(200, "optimizer steps", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    micro_batch: int = parameter(
        0,
        "examples at once (gradient accumulation); 0 takes the whole batch",
        ge=0,
        le=65536,
        group="Training",
    )
    learning_rate: float = parameter(1e-3, "peak learning rate", gt=0, le=100, scale="log")
    optimizer: Choice = OPTIMIZER.choice("adamw")
    weight_decay: float = parameter(0.01, "weight decay of matrices", ge=0, le=10, group="Training")
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("cosine")
    warmup: float = parameter(0.05, "linear warm-up as a fraction of the steps", ge=0, lt=1, group="Training")
    clip: float = parameter(1.0, "largest gradient norm; 0 does not clip", ge=0, le=1e6, group="Training")
    precision: Choice = PRECISION.choice("fp32", group="Training")
    batch_rule: Choice = BATCH_RULE.choice("fixed", group="Training")
    loss: Choice = TRAINING_LOSS.choice("task", group="Model and loss")
    model_change: Choice = MODEL_CHANGE.choice("none", group="Model and loss")
    ema: float = parameter(
        0.0, "decay of averaged weights; 0 keeps the last weights", ge=0, lt=1, group="Training"
    )
    start: Start = parameter(
        "weights", "start from the subject's weights or from random ones", group="Training"
    )
    split: str = parameter("train", "split to train on", min_length=1, group="Data")
    evaluate_every: int = parameter(
        0, "steps between evaluations on the validation split; 0: only at the end", ge=0, group="Data"
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"lr": "learning_rate"}

    @classmethod
    def result_class(cls) -> type[Result]:
        return TrainResult

    def check(self, on: Subject) -> None:
        on.split(self.split)
        arithmetic_of(on, self.precision)
        self.loss(on)
        if self.model_change != "none":
            self.model_change(on.copy())
        check_pair(self.optimizer, self.schedule, self.learning_rate, self.weight_decay, self.warmup)

    def _run(self, on: Subject, progress: Progress) -> Result:
        mine = reinitialised(on, self.seed) if self.start == "random" else on
        before = on.evaluate("validation") if "validation" in on.splits and self.start == "weights" else {}
        mine = self.model_change(mine)

        def draw(run: Training) -> None:
            if run.step % max(1, self.steps // 50) == 0 and progress.watched:
                progress.preview(self.result(run.history, {"steps": run.step}, partial=True))

        run = fit(
            mine,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup=self.warmup,
            clip=self.clip or None,
            precision=self.precision,
            batch_rule=self.batch_rule(),
            loss=self.loss(mine),
            ema=self.ema,
            split=self.split,
            evaluate_every=self.evaluate_every,
            seed=self.seed,
            callbacks=[draw],
            progress=progress,
        )
        table = run.history
        facts: dict[str, Any] = {
            "steps": run.step,
            "examples": run.position,
            "items": run.items,
            "diverged": run.diverged,
        }
        if len(table):
            facts |= {
                "train_loss": float(table.loss.iloc[-max(1, run.step // 20) :].mean()),
                "items_per_second": run.items / run.seconds,
            }
        facts |= {f"before_{k}": v for k, v in before.items()}
        if not run.diverged:
            facts |= {
                f"{split}_{k}": v
                for split in ("validation", "test")
                if split in mine.splits
                for k, v in mine.evaluate(split).items()
            }
        if hasattr(mine.model, "certificate"):
            facts["lipschitz_certificate"] = mine.model.certificate()
        facts["optimizer_state_bytes"] = state_bytes(run.optimizer)
        return self.result(table, facts, subject=mine)


class TrainResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        fig = figure("Training", x="step", y="loss (nats)")
        if self.table.empty:
            return fig
        line(fig, self.table.step, self.table.loss, "training batch", mode="lines")
        if "validation_loss" in self.table:
            measured = self.table.dropna(subset=["validation_loss"])
            line(fig, measured.step, measured.validation_loss, "validation", mode="lines+markers")
        peak = float(self.table.lr.max())
        values = np.asarray(self.table.lr, float)
        fig.add_trace(
            go.Scatter(
                x=self.table.step,
                y=values,
                name=f"learning rate (peak {peak:.3g})",
                yaxis="y2",
                mode="lines",
                line=dict(color="#808080", dash="dot", width=1),
            )
        )
        fig.update_layout(
            yaxis2=dict(
                overlaying="y", side="right", showgrid=False, title="learning rate", rangemode="tozero"
            ),
            margin_r=60,
        )
        return fig
