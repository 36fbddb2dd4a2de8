"""Schedules as tables and figures, without training anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures import figure, line
from workbench.training.schedule.schedules import sampled


def schedule_table(
    names: Sequence[str],
    steps: int = 1000,
    lr: float = 1.0,
    warmup: float = 0.05,
    sampling: int = 1,
    phi: float = 0.5,
) -> pd.DataFrame:
    """The learning rate of every step of each schedule, as an optimizer would see it: columns name, step, lr.

    `phi` goes to the UBA schedule; `one-cycle` has its own warm-up,
    `plateau` and `power` have no curve of their own (`BadInput`).
    """
    parts = []
    for name in names:
        if name == "uba":
            values = sampled(name, steps, warmup, sampling, lr, phi=phi)
        else:
            values = sampled(name, steps, 0.0 if name == "one-cycle" else warmup, sampling, lr)
        parts.append(pd.DataFrame({"name": name, "step": np.arange(steps), "lr": values}))
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
