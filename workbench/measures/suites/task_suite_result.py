"""Figures of `task-suite`: recovery, scores and flips, by task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import BaseModel, Field, create_model

from workbench.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


class TaskSuiteResult(Result):
    """Recovery in % of each task with its paired interval, the scores behind it, or the flipped items."""

    def metrics(self) -> list[str]:
        known = self.table[self.table["score_low"].notna()] if len(self.table) else self.table
        return list(dict.fromkeys(known["metric"])) if len(known) else []

    def compares(self) -> bool:
        return "recovery" in self.table and bool(self.table["recovery"].notna().any())

    def view_model(self) -> type[BaseModel]:
        shows = ("recovery", "scores", "flips") if self.compares() else ("scores",)
        metrics = tuple(self.metrics()) or ("acc",)
        fields: dict[str, Any] = {
            "show": (Literal[shows], Field(shows[0], description="what is drawn")),
            "metric": (Literal[metrics], Field(metrics[0], description="which score of an item")),
        }
        return create_model("TaskSuiteView", **fields)

    def figure(self, **view: Any) -> go.Figure:
        chosen: Any = self.view_model()(**view)
        mine = self.table[self.table["metric"] == chosen.metric] if len(self.table) else self.table
        return {"recovery": recoveries, "scores": scores, "flips": flips}[chosen.show](
            self, mine, chosen.metric
        )


def near_the_values(fig: go.Figure, low: pd.Series[Any], high: pd.Series[Any], *also: float) -> None:
    """A range of the axis that holds the intervals, and not zero for its own sake."""
    ends = [value for value in (*low, *high, *also) if value == value]
    if ends:
        room = 0.08 * (max(ends) - min(ends) or 1.0)
        fig.update_yaxes(range=[min(ends) - room, max(ends) + room])


def bars(low: pd.Series[Any], value: pd.Series[Any], high: pd.Series[Any]) -> dict[str, Any]:
    return dict(type="data", symmetric=False, array=high - value, arrayminus=value - low)


def recoveries(result: TaskSuiteResult, table: pd.DataFrame, metric: str) -> go.Figure:
    """Recovery with its 95 % interval; what changed nothing is at 100 %."""
    from workbench.figures import color, figure

    fig = figure(
        f"What is left of {result.facts['reference']}'s {metric}"
        "<br><sup>95 % interval, paired over the items</sup>",
        "task",
        "recovery (%)",
        scattermode="group",
        margin_t=64,
    )
    fig.update_xaxes(type="category")
    known = table[table["recovery"].notna()]
    for index, (name, rows) in enumerate(known.groupby("subject", sort=False)):
        fig.add_scatter(
            x=rows["task"],
            y=rows["recovery"],
            error_y=bars(rows["recovery_low"], rows["recovery"], rows["recovery_high"]),
            mode="markers",
            marker=dict(size=9, color=color(index + 1)),
            name=str(name),
            customdata=rows[["score", "score_se", "right_to_wrong", "wrong_to_right", "mcnemar_p"]],
            hovertemplate="%{x}: %{y:.1f} %<br>"
            + metric
            + " %{customdata[0]:.3f} ± %{customdata[1]:.3f}<br>right to wrong %{customdata[2]}, "
            "wrong to right %{customdata[3]}, McNemar's p %{customdata[4]:.3g}"
            "<extra>%{fullData.name}</extra>",
        )
    near_the_values(fig, known["recovery_low"], known["recovery_high"], 100.0)
    fig.add_hline(y=100, line=dict(color=color(6), dash="dot"))
    return fig


def scores(result: TaskSuiteResult, table: pd.DataFrame, metric: str) -> go.Figure:
    """The share of items answered rightly by each model with its 95 % interval, and what guessing gives."""
    from workbench.figures import color, figure

    fig = figure(
        f"{metric} by task<br><sup>95 % interval of each model alone (Wilson; normal for the mean)</sup>",
        "task",
        f"{metric} (share of items)",
        scattermode="group",
        margin_t=64,
    )
    fig.update_xaxes(type="category")
    for index, (name, rows) in enumerate(table.groupby("subject", sort=False)):
        fig.add_scatter(
            x=rows["task"],
            y=rows["score"],
            error_y=bars(rows["score_low"], rows["score"], rows["score_high"]),
            mode="markers",
            marker=dict(size=9, color=color(index), symbol="circle" if index else "square"),
            name=str(name),
            customdata=rows[["score_se", "items"]],
            hovertemplate="%{x}: %{y:.3f} ± %{customdata[0]:.3f} of %{customdata[1]} items"
            "<extra>%{fullData.name}</extra>",
        )
    guessed = table[table["chance"].notna()].drop_duplicates("task") if len(table) else table
    if len(table):
        near_the_values(fig, table["score_low"], table["score_high"], *guessed["chance"])
    if len(guessed):
        fig.add_scatter(
            x=guessed["task"],
            y=guessed["chance"],
            mode="markers",
            marker=dict(symbol="line-ew-open", size=18, color=color(6)),
            name="guessing",
        )
    return fig


def flips(result: TaskSuiteResult, table: pd.DataFrame, metric: str) -> go.Figure:
    """Items that were right and are wrong (downwards) and the other way round (upwards)."""
    from workbench.figures import color, figure

    fig = figure(
        f"Items that flipped, by {metric}", "task", "items won (up) and lost (down)", barmode="relative"
    )
    fig.update_xaxes(type="category")
    known = table[table["recovery"].notna()]
    for index, (name, rows) in enumerate(known.groupby("subject", sort=False)):
        for column, sign, pattern in (("wrong_to_right", 1, ""), ("right_to_wrong", -1, "/")):
            fig.add_bar(
                x=rows["task"],
                y=sign * rows[column],
                name=f"{name}, {column.replace('_', ' ')}",
                offsetgroup=str(name),
                marker=dict(color=color(index + 1), pattern_shape=pattern),
                customdata=rows[[column, "mcnemar_p"]],
                hovertemplate="%{x}: %{customdata[0]} items, McNemar's p %{customdata[1]:.3g}"
                "<extra>%{fullData.name}</extra>",
            )
    return fig
