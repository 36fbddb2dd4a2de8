"""Schedules as tables and figures, without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures import figure, line
from workbench.training.schedule.schedules import sampled


def schedule_table(
    schedules: Sequence[str | Mapping[str, Any]],
    steps: int = 1000,
    learning_rate: float = 1.0,
    warmup: float = 0.05,
    sampling: int = 1,
) -> pd.DataFrame:
    """The learning rate of every step of each schedule, as an optimizer would see it:
    columns name, step, lr.

    A schedule is a name, a mapping with options or a choice. `one-cycle` has its own warm-up;
    `plateau` has no curve of its own (`BadInput`).
    """
    parts = []
    for schedule in schedules:
        values = sampled(schedule, steps, warmup, sampling, learning_rate)
        name = schedule if isinstance(schedule, str) else schedule["name"]
        parts.append(pd.DataFrame({"name": str(name), "step": np.arange(steps), "lr": values}))
    return pd.concat(parts, ignore_index=True)


def schedule_areas(table: pd.DataFrame) -> pd.DataFrame:
    """One row a schedule: mean over peak (its area), share of the steps above half the peak,
    first and last learning rate.
    """
    rows = []
    for name in dict.fromkeys(table.name):
        values = table.lr[table.name == name].to_numpy()
        rows.append(
            (
                name,
                values.mean() / values.max(),
                float((values > values.max() / 2).mean()),
                values[0],
                values[-1],
            )
        )
    return pd.DataFrame(rows, columns=["name", "area", "above_half", "first", "last"])


def schedule_figure(table: pd.DataFrame) -> go.Figure:
    fig = figure("Learning-rate schedules", x="step", y="learning rate")
    for name in dict.fromkeys(table.name):
        part = table[table.name == name]
        line(fig, part.step, part.lr, f"{name} (area {part.lr.mean() / part.lr.max():.2f})", mode="lines")
    return fig
