"""The critical batch size, measured twice: from the steps that each batch size takes to one loss,
and from gradients on the way there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.figures import figure, line, rule
from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling.hyperparameters import critical_batch, steps_and_examples
from workbench.subjects import Subject
from workbench.training.batch.batch_size import gradient_groups, noise_scale, noise_scale_interval
from workbench.training.loop import Callback, Training, fit
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.pairs import check_pair
from workbench.training.sweep.fields import SweptInstrument
from workbench.training.sweep.objective import (
    Start,
    TrainingObjective,
    begun,
    learning_rates,
    prepared_folder,
    swept,
)
from workbench.training.sweep.sweeps import Trial

#: Evaluations on the way to a target; the step of passing it is interpolated between two of them.
EVALUATIONS = 60


def steps_to_target(
    on: Subject, target: float, steps: int, callbacks: Sequence[Callback] = (), **arguments: Any
) -> tuple[float, Training]:
    """Train `on` in place at a constant rate until the validation loss is at most `target`:
    the interpolated step, infinite after `steps`.

    `arguments` go to `fit`. Neither warm-up, weight decay nor clipping,
    whose meaning would change with the batch size, unless asked for.
    """
    every, seen = max(1, steps // EVALUATIONS), [(0, math.inf)]

    def look(run: Training) -> None:
        if run.step % every == 0 and not run.diverged:
            seen.append((run.step, run.rows[-1]["validation_loss"]))
            run.stop = seen[-1][1] <= target

    given: dict[str, Any] = {
        "schedule": "constant",
        "warmup": 0.0,
        "clip": None,
        "weight_decay": 0.0,
    } | arguments
    run = fit(on, steps=steps, evaluate_every=every, callbacks=[look, *callbacks], **given)
    if not seen[-1][1] <= target:
        return math.inf, run
    (s0, l0), (s1, l1) = seen[-2], seen[-1]
    return (float(s1) if not math.isfinite(l0) else s0 + (s1 - s0) * (l0 - target) / (l0 - l1)), run


@dataclass(frozen=True)
class TargetObjective(TrainingObjective):
    """A sweep's run to `target`; `fixed` holds `examples` and `steps`, of which a run may use the larger.
    Facts: value (validation loss), steps_to_target.
    """

    target: float = 0.0

    def __call__(self, params: dict[str, Any], trial: Trial) -> dict[str, Any]:
        mine, arguments = self.prepared(params)
        limit = max(arguments.pop("steps"), arguments.pop("examples") // arguments["batch_size"])
        taken, run = steps_to_target(mine, self.target, limit, progress=trial.progress, **arguments)
        return {
            "value": run.validation,
            "diverged": run.diverged,
            "steps_to_target": taken if math.isfinite(taken) else None,
            "steps": run.step,
            "train_seconds": run.seconds,
        }


class CriticalBatch(SweptInstrument):
    """Critical batch size from the steps that each batch size takes to one loss at its best rate,
    beside the gradient noise scale on the way there.

    Steps S and examples E to a loss lie on (S / S_min - 1)(E / E_min - 1) = 1, S = S_min + E_min / B
    (McCandlish et al. 2018, eq. 2.7); at B_crit = E_min / S_min both are twice their least. The noise scale
    tr(Sigma) / |G|^2 estimates the same from gradients alone.
    """

    summary_line = (
        "critical batch size with intervals, from steps to a loss (hyperbola) and from gradients (noise "
        "scale)"
    )

    target: float = parameter(0.8, "validation loss to reach", allow_inf_nan=False, unit="nats")
    batch_sizes: tuple[int, ...] = parameter(
        (4, 16, 64, 256), "batch sizes (examples), at least three", min_length=3
    )
    learning_rate_low: float = parameter(2.5e-4, "lowest learning rate", gt=0, le=100, scale="log")
    learning_rate_high: float = parameter(4e-3, "highest learning rate", gt=0, le=100, scale="log")
    learning_rate_points: int = parameter(
        3, "learning rates, evenly spaced in the logarithm", ge=1, le=50, group="Ladder of rates"
    )
    examples: int = parameter(
        6144, "a run that has not reached the loss ends after so many examples", ge=16, le=10**9, scale="log"
    )
    steps: int = parameter(150, "but not before so many steps", ge=10, le=1_000_000, scale="log")
    optimizer: Choice = OPTIMIZER.choice("adamw", "optimizer, at a constant rate", group="Training")
    start: Start = parameter(
        "random", "start every run from random weights or from the subject's", group="Training"
    )
    evaluate_limit: int = parameter(
        256, "validation examples that the loss is measured on", ge=1, group="Data"
    )
    overhead: float = parameter(
        0.2,
        "share of more examples than the reference batch that a large batch may cost",
        gt=0,
        le=100,
        group="Noise scale",
    )
    reference: int = parameter(
        0, "reference batch of that share; 0: the smallest thinkable", ge=0, group="Noise scale"
    )
    noise_groups: int = parameter(
        16, "independent batches whose gradients are compared", ge=4, le=4096, group="Noise scale"
    )
    noise_size: int = parameter(16, "examples of each of them", ge=1, le=4096, group="Noise scale")
    level: float = parameter(0.9, "probability content of the intervals", gt=0.5, lt=1, group="Intervals")
    resamples: int = parameter(
        500, "bootstrap resamples of the hyperbola", ge=2, le=10_000, group="Intervals"
    )

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {f"lr_{end}": f"learning_rate_{end}" for end in ("low", "high", "points")}

    @classmethod
    def result_class(cls) -> type[Result]:
        return CriticalResult

    def check(self, on: Subject) -> None:
        learning_rates(self.learning_rate_low, self.learning_rate_high, self.learning_rate_points)
        check_pair(self.optimizer, "constant", self.learning_rate_high)
        on.split("validation")
        if len(set(self.batch_sizes)) < 3 or min(self.batch_sizes) < 1:
            raise BadInput(
                f"batch_sizes: {self.batch_sizes} must be at least three different positive numbers"
            )
        if self.noise_groups * self.noise_size > on.size("train"):
            raise BadInput(
                f"noise_groups: {self.noise_groups} x {self.noise_size} examples are more than the "
                f"{on.size('train')} of split 'train'; lower one"
            )
        begins = begun(on, self.start, self.seed).evaluate("validation", limit=self.evaluate_limit)["loss"]
        if begins <= self.target:
            raise BadInput(
                f"target: {self.target:g} nats are reached before training ({begins:.4g}); "
                "ask for less, or start from random weights"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        fixed = {
            "examples": self.examples,
            "steps": self.steps,
            "optimizer": self.optimizer,
            "evaluate_limit": self.evaluate_limit,
        }
        objective = TargetObjective(
            prepared_folder(on, self.workers),
            fixed,
            self.start,
            str(on.device),
            test=False,
            target=self.target,
        )
        space = {
            "batch_size": sorted(set(self.batch_sizes)),
            "lr": learning_rates(self.learning_rate_low, self.learning_rate_high, self.learning_rate_points),
            "seed": [self.seed + i for i in range(self.seeds)],
        }

        def preview(table: pd.DataFrame) -> None:
            if progress.watched and "steps_to_target" in table:
                progress.preview(self.summarise(table))

        table = swept(
            self,
            on,
            f"target-{self.target:g}",
            space,
            objective,
            progress,
            self.workers,
            self.storage,
            self.backend,
            on_change=preview,
        )
        found = self.summarise(table)
        best = found.tables["best"]
        return (
            found if found.partial or best.empty else self.summarise(table, self._noise(on, best, progress))
        )

    def _noise(self, on: Subject, best: pd.DataFrame, progress: Progress) -> pd.DataFrame:
        """The noise scale at four points of a run to the target, at the middle batch size and its best rate:
        step, loss, noise_scale, low, high.
        """
        middle, mine = best.iloc[len(best) // 2], begun(on, self.start, self.seed)
        last = math.ceil(middle.steps_to_target)
        marks, rows = sorted({max(1, round(last * f)) for f in (0.25, 0.5, 0.75, 1.0)}), []

        def measure(run: Training) -> None:
            if run.step in marks:
                run.model.eval()
                gram = gradient_groups(mine, "train", self.noise_groups, self.noise_size, self.seed, progress)
                rows.append(
                    (
                        run.step,
                        mine.evaluate("validation", limit=self.evaluate_limit)["loss"],
                        noise_scale(gram, self.noise_size).simple,
                        *noise_scale_interval(gram, self.noise_size, self.level),
                    )
                )

        steps_to_target(
            mine,
            -math.inf,
            last,
            [measure],
            batch_size=int(middle.batch_size),
            learning_rate=float(middle.lr),
            optimizer=self.optimizer,
            seed=self.seed,
            evaluate_limit=1,
            progress=progress,
        )
        return pd.DataFrame(rows, columns=["step", "loss", "noise_scale", "low", "high"])

    def summarise(self, table: pd.DataFrame, noise: pd.DataFrame | None = None) -> Result:
        """The result of the trials that are there: also the code path for somebody else's steps to a loss
        (columns batch_size, steps_to_target).

        noise : noise scales along a run (step, loss, noise_scale, low, high);
            the fact is the median, with that measurement's interval.
        """
        done = table[table.state == "done"] if "state" in table else table
        done = done[
            [
                c
                for c in (
                    "batch_size",
                    "lr",
                    "seed",
                    "steps_to_target",
                    "value",
                    "diverged",
                    "steps",
                    "train_seconds",
                )
                if c in done
            ]
        ].reset_index(drop=True)
        done = done.assign(
            steps_to_target=pd.to_numeric(
                done.get("steps_to_target", pd.Series(dtype=float)), errors="coerce"
            )
        )
        best = fastest(done)
        facts: dict[str, Any] = {
            "runs": len(done),
            "reached": int(done.steps_to_target.notna().sum()),
            "target": self.target,
        }
        if len(best) >= 3:
            found = critical_batch(
                best.batch_size.to_numpy(),
                best.steps_to_target.to_numpy(),
                self.overhead,
                self.reference,
                self.resamples,
                self.level,
                self.seed,
            )
            facts |= {
                "critical_batch" + k.removeprefix("critical") if k.startswith("critical") else k: v
                for k, v in found.items()
            }
            facts["rates_at_the_end"] = int((~best.inside).sum())
        if noise is not None and len(noise):
            middle = noise.sort_values("noise_scale").iloc[len(noise) // 2]
            facts |= {
                "noise_scale": float(middle.noise_scale),
                "noise_scale_low": float(middle.low),
                "noise_scale_high": float(middle.high),
            }
        return self.result(
            done,
            facts,
            tables={"best": best, "noise": noise if noise is not None else pd.DataFrame()},
            partial=len(done) < len(table),
        )


def fastest(done: pd.DataFrame) -> pd.DataFrame:
    """Per batch size the rate whose mean number of steps over seeds is least: batch_size, lr,
    steps_to_target, examples, inside (the rate is at no end).

    A rate counts where every seed reached the loss; a batch size without such a rate is left out.
    """
    columns = ["batch_size", "lr", "steps_to_target", "examples", "inside"]
    if done.empty:
        return pd.DataFrame(columns=columns)
    known = "lr" in done
    table = done if known else done.assign(lr=math.nan)
    mean = (
        table.groupby(["batch_size", "lr"], dropna=False)["steps_to_target"]
        .agg(lambda steps: steps.mean(skipna=False))
        .reset_index()
    )
    ends = {table.lr.min(), table.lr.max()}
    rows = []
    for batch, part in mean.dropna(subset=["steps_to_target"]).groupby("batch_size"):
        least = part.iloc[int(np.argmin(part.steps_to_target.to_numpy()))]
        rows.append(
            (
                batch,
                least.lr,
                least.steps_to_target,
                batch * least.steps_to_target,
                not (known and least.lr in ends),
            )
        )
    return pd.DataFrame(rows, columns=columns)


class CriticalView(BaseModel):
    show: Literal["steps", "trade-off", "noise"] = Field(
        "steps",
        description="steps against batch size, steps against examples, or the noise scale along a run",
    )


class CriticalResult(Result):
    def view_model(self) -> type[BaseModel] | None:
        return CriticalView

    def figure(self, **view: Any) -> go.Figure:
        show, facts, tables = CriticalView(**view).show, self.facts, self.tables
        if show == "noise":
            return self._noise(tables.get("noise", pd.DataFrame()))
        best = tables.get("best", pd.DataFrame(columns=["batch_size"]))
        title = (
            f"Steps to a loss of {facts['target']:g}"
            if show == "steps"
            else f"Steps and examples to a loss of {facts['target']:g}"
        )
        fig = figure(
            title,
            x="batch size (examples)" if show == "steps" else "optimizer steps (time)",
            y="optimizer steps" if show == "steps" else "examples (compute)",
            xaxis_type="log",
            yaxis_type="log",
        )
        for side in (fig.layout.xaxis, fig.layout.yaxis):
            side.update(dtick="D2", exponentformat="none")
        if best.empty:
            return fig
        x, y = ("batch_size", "steps_to_target") if show == "steps" else ("steps_to_target", "examples")
        line(fig, best[x], best[y], "fastest rate", mode="markers")
        if "critical_batch" not in facts:
            return fig
        batches = np.geomspace(best.batch_size.min() / 2, best.batch_size.max() * 2, 100)
        steps, examples = steps_and_examples(facts["critical_batch"], facts["smin"], batches)
        line(
            fig,
            batches if show == "steps" else steps,
            steps if show == "steps" else examples,
            "hyperbola",
            mode="lines",
        )
        if show == "steps":
            rule(fig, f"critical batch {facts['critical_batch']:.3g}", x=facts["critical_batch"])
            if math.isfinite(facts.get("noise_scale", math.nan)):
                rule(fig, f"noise scale {facts['noise_scale']:.3g}", x=facts["noise_scale"])
        else:
            at, cost = steps_and_examples(
                facts["critical_batch"], facts["smin"], np.array([facts["critical_batch"]])
            )
            line(fig, at, cost, f"critical batch {facts['critical_batch']:.3g}", mode="markers")
        return fig

    def _noise(self, noise: pd.DataFrame) -> go.Figure:
        fig = figure(
            "Noise scale on the way to the loss",
            x="optimizer step",
            y="examples",
            yaxis_type="log",
            yaxis_dtick="D2",
            yaxis_exponentformat="none",
        )
        finite = noise[np.isfinite(noise.noise_scale)] if len(noise) else noise
        if len(finite):
            line(
                fig,
                finite.step,
                finite.noise_scale,
                "noise scale",
                band=(finite.low, finite.high) if np.isfinite(finite.high).all() else None,
                mode="lines+markers",
            )
        if len(finite) and "critical_batch" in self.facts:
            rule(fig, f"critical batch {self.facts['critical_batch']:.3g}", y=self.facts["critical_batch"])
        return fig
