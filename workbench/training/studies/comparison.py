"""Fair comparisons: equal tuning, end-of-schedule losses, seeds, and costs beside the losses.

Each candidate's peak learning rate is tuned on validation at the first seed with as many runs as every
other's; the best one is run at all seeds, and the test loss of those is what is compared
(Wen et al. 2025; Kaddour et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, Field

from workbench.axis import Choice, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.figures import color, figure, line
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.studies.learning_rate_batch_size import ticks
from workbench.training.sweep.fields import SweptInstrument
from workbench.training.sweep.objective import Start, TrainingObjective, prepared_folder, swept

#: How often a ladder is extended by two rungs where the best learning rate was at its end: until it lies
#: inside, but for a loss that does not depend on it. The rule is everybody's.
EXTENSIONS = 8


def interval(values: Any, level: float = 0.9) -> tuple[float, float, float]:
    """Mean and Student's t interval; infinite bounds of a single value are given as NaN."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return mean, math.nan, math.nan
    from scipy import stats  # a second of import that workers of a sweep need not pay

    reach = float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - reach, mean + reach


class Comparison(SweptInstrument):
    """Fields and protocol that both comparisons share."""

    examples: int = parameter(8192, "training examples of a full run", ge=16, le=10**9, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    learning_rate_points: int = parameter(
        5,
        "learning rates tried for every candidate, a factor learning_rate_factor apart around the usual one",
        ge=1,
        le=20,
        group="Ladder of rates",
    )
    learning_rate_factor: float = parameter(
        2.0, "ratio of neighbouring learning rates", gt=1, le=10, group="Ladder of rates"
    )
    seeds: int = parameter(3, "runs of every candidate at its best learning rate", ge=1, le=20)
    warmup: float = parameter(0.1, "linear warm-up as a fraction of the steps", ge=0, lt=1, group="Training")
    weight_decay: float = parameter(0.01, "weight decay of matrices", ge=0, le=10, group="Training")
    start: Start = parameter(
        "random", "start every run from random weights or from the subject's", group="Training"
    )
    evaluate_limit: int = parameter(
        512, "validation and test examples that a run is judged by", ge=1, group="Data"
    )
    level: float = parameter(0.9, "probability content of the intervals", gt=0.5, lt=1, group="Intervals")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"lr_points": "learning_rate_points", "lr_factor": "learning_rate_factor"}

    def compared(self) -> list[Choice]:
        """The choices that are compared."""
        return []

    def code(self) -> str:
        """That of the compared choices counts as well."""
        entries = [*entries_in(self), *(choice.entry for choice in self.compared())]
        return code_version(type(self), [entry.value for entry in entries])

    def check(self, on: Subject) -> None:
        for split in ("train", "validation", "test"):
            on.split(split)
        if self.batch_size > self.examples:
            raise BadInput(
                f"batch_size: {self.batch_size} is more than examples ({self.examples}); "
                "there would be no step"
            )

    def ladder(self, centre: float) -> list[float]:
        middle = (self.learning_rate_points - 1) / 2
        return [centre * self.learning_rate_factor ** (i - middle) for i in range(self.learning_rate_points)]

    def beyond(self, tried: pd.DataFrame) -> list[float]:
        """Two more learning rates past the end of the ladder that the best run is at;
        none when the best lies inside.
        """
        good = tried[np.isfinite(tried.value)]
        if good.empty or len(tried) < 2:
            return []
        best = float(good.lr[good.value.idxmin()])
        if best == tried.lr.max():
            return [best * self.learning_rate_factor, best * self.learning_rate_factor**2]
        return (
            [best / self.learning_rate_factor, best / self.learning_rate_factor**2]
            if best == tried.lr.min()
            else []
        )

    def protocol(
        self,
        on: Subject,
        progress: Progress,
        candidates: list[dict[str, Any]],
        centres: list[float],
        labels: list[str],
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(tuning runs, final runs): candidates are argument sets of `fit`, each tuned around its own centre.
        Tuning is drawn as it goes.
        """
        fixed = {
            "batch_size": self.batch_size,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "evaluate_limit": self.evaluate_limit,
        }
        objective = CandidateObjective(
            prepared_folder(on, self.workers),
            fixed,
            self.start,
            str(on.device),
            reports=8,
            candidates=candidates,
            examples=self.examples,
        )
        asked = {i: self.ladder(centre) for i, centre in enumerate(centres)}

        def preview(table: pd.DataFrame) -> None:
            if progress.watched and "value" in table:
                runs = pd.concat([tuning, with_points(table)], ignore_index=True)
                progress.preview(
                    self.result(
                        pd.DataFrame(),
                        {"runs": len(runs)},
                        tables={"tuning": tuning_table(runs, labels)},
                        partial=True,
                    )
                )

        tuning, points = pd.DataFrame(), [tuple_text([i, lr]) for i, ladder in asked.items() for lr in ladder]
        for attempt in range(1 + EXTENSIONS):
            space = {"point": points, "seed": [self.seed]}
            found = with_points(
                swept(
                    self,
                    on,
                    f"tune{attempt}",
                    space,
                    objective,
                    progress,
                    self.workers,
                    self.storage,
                    self.backend,
                    on_change=preview,
                )
            )
            tuning = pd.concat([tuning, found], ignore_index=True)
            points = (
                []
                if progress.stopped
                else [tuple_text([i, lr]) for i in asked for lr in self.beyond(tuning[tuning.candidate == i])]
            )
            if not points:
                break
        if progress.stopped or tuning.empty:
            return tuning, tuning.iloc[:0]
        best = tuning.loc[tuning.value.fillna(math.inf).groupby(tuning.candidate).idxmin()]
        finals = [tuple_text([int(c), float(lr)]) for c, lr in zip(best.candidate, best.lr, strict=True)]
        space = {"point": finals, "seed": [self.seed + i for i in range(self.seeds)]}
        return tuning, with_points(
            swept(self, on, "final", space, objective, progress, self.workers, self.storage, self.backend)
        )


def tuple_text(pair: list[Any]) -> str:
    return f"{pair[0]}:{pair[1]!r}"


def with_points(table: pd.DataFrame) -> pd.DataFrame:
    done = table[table.state == "done"].copy()
    split = [point.split(":") for point in done.point]
    done["candidate"], done["lr"] = [int(a) for a, _ in split], [float(b) for _, b in split]
    done["value"] = pd.to_numeric(done.value, errors="coerce").fillna(math.inf)
    return done.reset_index(drop=True)


class CandidateObjective(TrainingObjective):
    """Trains candidate number i of a list at a learning rate; the point is the text "i:lr"."""

    def __init__(
        self,
        folder: str,
        fixed: dict[str, Any],
        start: Start,
        device: str,
        reports: int,
        candidates: list[dict[str, Any]],
        examples: int,
    ) -> None:
        super().__init__(
            folder, fixed | {"candidates": candidates, "examples": examples}, start, device, reports
        )

    def __call__(self, params: dict[str, Any], trial: Any) -> dict[str, Any]:
        index, lr = params["point"].split(":")
        fixed = {k: v for k, v in self.fixed.items() if k != "candidates"}
        mine = TrainingObjective(self.folder, fixed, self.start, self.device, self.reports)
        return mine({**self.fixed["candidates"][int(index)], "lr": float(lr), "seed": params["seed"]}, trial)


def leaderboard(
    finals: pd.DataFrame, labels: list[dict[str, Any]], tuning: pd.DataFrame, level: float
) -> pd.DataFrame:
    """One row a candidate: its labels, lr, validation, test mean with interval, seconds, state bytes,
    whether its best lr was at an end.
    """
    rows = []
    for index in sorted(set(finals.candidate)):
        part, ladder = finals[finals.candidate == index], tuning[tuning.candidate == index].lr
        mean, low, high = interval(part.test.astype(float).fillna(math.inf), level)
        lr = float(part.lr.iloc[0])
        at_end = len(ladder) > 1 and lr in (ladder.min(), ladder.max())
        rows.append(
            {
                **labels[index],
                "lr": lr,
                "at_end": at_end,
                "tuning_runs": len(ladder),
                "validation": float(part.value.mean()),
                "test": mean,
                "test_low": low,
                "test_high": high,
                "seeds": len(part),
                "seconds_per_run": float(part.train_seconds.median()),
                "state_bytes": int(part.state_bytes.median()),
            }
        )
    return pd.DataFrame(rows)


def tuning_table(tuning: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {"name": [labels[i] for i in tuning.candidate], "lr": tuning.lr, "value": tuning.value}
    )


def curve_table(finals: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Validation losses along the final runs, averaged over seeds: name, step, items, value."""
    curves = finals["curve"] if "curve" in finals else [None] * len(finals)
    rows = [
        (labels[i], *point)
        for i, curve in zip(finals.candidate, curves, strict=True)
        if isinstance(curve, list)
        for point in curve
    ]
    table = pd.DataFrame(rows, columns=["name", "step", "items", "value"])
    return table.groupby(["name", "step", "items"], as_index=False)[["value"]].mean()


def rank_flips(curves: pd.DataFrame) -> int:
    """Pairs of candidates whose order half-way differs from their order at the end."""
    if curves.empty:
        return 0
    half = curves[curves.step <= curves.step.max() / 2].groupby("name").value.last()
    end = curves.groupby("name").value.last()
    both = [n for n in end.index if n in half.index]
    return sum((half[a] - half[b]) * (end[a] - end[b]) < 0 for i, a in enumerate(both) for b in both[i + 1 :])


class ComparisonView(BaseModel):
    show: Literal["leaderboard", "tuning", "curves"] = Field(
        "leaderboard", description="test losses, the tuning runs, or validation losses along the runs"
    )


class ComparisonResult(Result):
    def view_model(self) -> type[BaseModel] | None:
        return ComparisonView

    def figure(self, **view: Any) -> go.Figure:
        show = ComparisonView(**view).show
        if self.table.empty and len(self.tables.get("tuning", ())):
            show = "tuning"  # there is no final run yet
        if show == "leaderboard" or (self.table.empty and show != "tuning"):
            fig = figure("Test loss at each one's best learning rate", x="test loss (nats)", y="")
            bars(fig, self.table, self.table.get("name", pd.Series(dtype=str)))
            return fig
        source = self.tables[show]
        title, x = (
            ("Tuning", "learning rate") if show == "tuning" else ("Validation loss along the runs", "step")
        )
        fig = figure(
            title, x=x, y="validation loss (nats)", xaxis_type="log" if show == "tuning" else "linear"
        )
        if show == "tuning" and len(source):
            fig.update_xaxes(dtick=ticks(source.lr.min(), source.lr.max()))
        looks = {
            name: i for i, name in enumerate(dict.fromkeys(self.tables["tuning"].name))
        }  # a name keeps its look across views
        for name, part in source[np.isfinite(source.value)].groupby("name", sort=False):
            line(
                fig,
                part["lr" if show == "tuning" else "step"],
                part.value,
                str(name),
                index=looks.get(name),
                mode="lines+markers",
            )
        return fig


def bars(fig: go.Figure, table: pd.DataFrame, labels: Any, index: int = 0, name: str = "") -> None:
    """Points with intervals, best on top."""
    if table.empty:
        return
    low, high = table.test - table.test_low, table.test_high - table.test
    fig.add_trace(
        go.Scatter(
            x=table.test,
            y=labels,
            mode="markers",
            name=name or "test",
            showlegend=bool(name),
            marker=dict(size=10, color=color(index)),
            error_x=dict(type="data", symmetric=False, array=high.fillna(0), arrayminus=low.fillna(0)),
        )
    )
    fig.update_yaxes(autorange="reversed")
