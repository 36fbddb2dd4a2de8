"""The `train` instrument: train a subject with the fields of the loop,
get the trained subject and its curves.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from workbench.axis import parameter
from workbench.errors import BadInput, unknown_name
from workbench.figures import figure, line
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.loop import Precision, arithmetic_of, fit
from workbench.training.optimizer.optimizers import make_optimizer, state_bytes
from workbench.training.schedule.schedules import make_schedule
from workbench.training.state import Training
from workbench.training.sweep.objective import Start, reinitialised

OptimizerName = Literal[
    "adamw",
    "sgd",
    "adafactor",
    "lamb",
    "lars",
    "lion",
    "muon",
    "soap",
    "sophia",
    "kron",
    "mars",
    "scion",
    "mkor",
    "one-bit-adam",
    "galore",
]
ScheduleName = Literal[
    "cosine",
    "linear",
    "constant",
    "rex",
    "uba",
    "delayed-linear",
    "polynomial",
    "step",
    "exponential",
    "inverse-sqrt",
    "wsd",
    "infinite",
    "one-cycle",
    "plateau",
]


class Train(SubjectInstrument):
    """Train the subject: any optimizer, schedule and precision of the bench (products of rounded, rotated
    operands among them), masks and number formats kept.
    """

    summary_line = "train a subject: loss, learning rate and gradient norm per step, validation and test loss"
    changes_model = True

    steps: int = parameter(200, "optimizer steps", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    micro_batch: int = parameter(
        0, "examples at once (gradient accumulation); 0 takes the whole batch", ge=0, le=65536
    )
    lr: float = parameter(1e-3, "peak learning rate", gt=0, le=100, scale="log")
    optimizer: OptimizerName = parameter("adamw", "optimizer")
    weight_decay: float = parameter(0.01, "weight decay of matrices", ge=0, le=10)
    schedule: ScheduleName = parameter("cosine", "learning-rate schedule")
    phi: float = parameter(2.0, "phi of the UBA schedule; 2 is cosine", gt=0, le=50, scale="log")
    warmup: float = parameter(0.05, "linear warm-up as a fraction of the steps", ge=0, lt=1)
    clip: float = parameter(1.0, "largest gradient norm; 0 does not clip", ge=0, le=1e6)
    precision: Precision = parameter(
        "fp32",
        "precision of the forward and backward pass; a number format rounds the operands of its matrix "
        "products",
    )
    rotation: Literal[0, 1, 2] = parameter(
        0, "Hadamard rotations of rounded operands (HALO's levels): none, forward, forward and input gradient"
    )
    ema: float = parameter(0.0, "decay of averaged weights; 0 keeps the last weights", ge=0, lt=1)
    start: Start = parameter("weights", "start from the subject's weights or from random ones")
    split: str = parameter("train", "split to train on", min_length=1)
    evaluate_every: int = parameter(
        0, "steps between evaluations on the validation split; 0: only at the end", ge=0
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return TrainResult

    def check(self, on: Subject) -> None:
        on.split(self.split)
        arithmetic_of(on, self.precision, self.rotation)
        make_optimizer(self.optimizer, self.lr, self.weight_decay)
        make_schedule(self.schedule, self.warmup, **self._schedule_options())

    def _schedule_options(self) -> dict[str, Any]:
        return {"phi": self.phi} if self.schedule == "uba" else {}

    def _run(self, on: Subject, progress: Progress) -> Result:
        mine = reinitialised(on, self.seed) if self.start == "random" else on
        before = on.evaluate("validation") if "validation" in on.splits and self.start == "weights" else {}

        def draw(run: Training) -> None:
            if run.step % max(1, self.steps // 50) == 0 and type(progress).preview is not Progress.preview:
                progress.preview(self.result(run.history, {"steps": run.step}, partial=True))

        run = fit(
            mine,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            schedule_options=self._schedule_options(),
            warmup=self.warmup,
            clip=self.clip or None,
            precision=self.precision,
            rotation=self.rotation,
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


def names(text: str, known: tuple[str, ...], field: str) -> list[str]:
    """A comma-separated list of names, each of them known."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise BadInput(f"{field}: {text!r} names nothing; known: {', '.join(known)}")
    for name in found:
        if name not in known:
            raise unknown_name(field, name, known)
    return list(dict.fromkeys(found))
