"""Figures of proposed runs. Pure: they draw tables that the instrument prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures import color, figure, points
from workbench.scaling.figures import short

if TYPE_CHECKING:
    from workbench.results import Result

#: A run that has not been made: open and dashed, so that it is no measurement.
GHOST = dict(symbol="star-diamond-open", size=15, color=color(6), line=dict(width=2.5, color=color(6)))
SHOWN = ("params", "tokens", "flops", "cost")


def described(row: pd.Series) -> str:
    """A candidate in a line a fact, for hovering."""
    known = [f"{c} {short(float(row[c]))}" for c in SHOWN if c in row]
    return "<br>".join([*known, f"narrows the interval by {100 * row['narrows']:.2g} %"])


def add_ghosts(fig: go.Figure, result: Result, axis: str) -> None:
    """The proposed runs at their predicted loss on a figure whose x axis is a column of the candidates."""
    proposed = result.table
    if not len(proposed) or axis not in proposed:
        return
    fig.add_scatter(
        x=proposed[axis],
        y=proposed.predicted,
        mode="markers",
        name="next run (not made)",
        hovertext=[described(row) for _, row in proposed.iterrows()],
        hoverinfo="text",
        marker=GHOST,
    )


def pool_figure(result: Result) -> go.Figure:
    """What every candidate is expected to teach, against its cost; the proposed ones are marked in order."""
    pool = result.tables["pool"]
    unit = "FLOPs" if "flops" in pool and np.allclose(pool.cost, pool.flops) else "the pool's own unit"
    fig = figure(
        "What each run would teach about the target",
        f"cost of the run ({unit})",
        "expected narrowing of the target's interval (%)",
        xaxis_type="log",
    )
    text = [described(row) for _, row in pool.iterrows()]
    points(
        fig, pool.cost, 100 * pool.narrows, "candidates", text=text, index=0, customdata=np.arange(len(pool))
    )
    fig.data[-1].hoverinfo = "text"
    proposed = result.table
    if len(proposed):
        chosen = pool.iloc[proposed.candidate.astype(int)]
        fig.add_scatter(
            x=chosen.cost,
            y=100 * chosen.narrows,
            mode="markers+text",
            name="proposed, in order",
            text=[str(i + 1) for i in range(len(chosen))],
            textposition="top center",
            hovertext=[described(row) for _, row in chosen.iterrows()],
            hoverinfo="text",
            marker=GHOST,
        )
    return fig


def target_figure(result: Result) -> go.Figure:
    """The target's predicted value and interval: now, and after the proposed runs as expected."""
    target = result.tables["target"]
    named = next((c for c in ("flops", "tokens", "params") if c in target), None)
    x = target[named] if named else np.arange(1, len(target) + 1)
    fig = figure(
        "The target now, and after the proposed runs",
        {
            "flops": "training compute of the cell (FLOPs)",
            "tokens": "training tokens",
            "params": "parameters",
        }.get(str(named), "cell"),
        f"predicted loss, with its {getattr(result.instrument, 'level', 0.9):.0%} interval",
        xaxis_type="log" if named else "linear",
    )
    for index, (name, low, high, shift) in enumerate(
        (("now", "low", "high", 0.985), ("after them, as expected", "low_after", "high_after", 1.015))
    ):
        points(
            fig,
            np.asarray(x) * shift,
            target.predicted,
            name,
            index=index,
            error_y=dict(
                type="data",
                symmetric=False,
                array=target[high] - target.predicted,
                arrayminus=target.predicted - target[low],
                color=color(index),
            ),
        )
    return fig
