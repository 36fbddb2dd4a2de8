"""The figure of several laws as one band. Pure: it draws tables that the instrument prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures import MARKERS, color, figure, line
from workbench.scaling.doubt.law_band import TOGETHER
from workbench.scaling.figures import AXIS, short

if TYPE_CHECKING:
    from workbench.results import Result


def band_figure(result: Result) -> go.Figure:
    """Every plausible law along compute, dashed where it leaves the data it was published on, and the band
    that holds scatter, parameters and the choice of law.
    """
    fig = figure(
        "Laws weighed on held-out compute", AXIS["flops"], "loss", xaxis_type="log", yaxis_type="log"
    )
    if "law_band" not in result.tables:
        fig.add_annotation(
            text="run with checks and against, on runs with params and tokens", showarrow=False
        )
        return fig
    table = result.tables["law_band"]
    band = table[table.law == TOGETHER]
    level = getattr(result.instrument, "level", 0.9)
    line(
        fig,
        band.flops,
        band.predicted,
        f"all, weighed ({level:.0%} band of a new run)",
        band=(band.low, band.high),
        index=0,
        mode="lines",
    )
    for index, (name, part) in enumerate(table[table.law != TOGETHER].groupby("law", sort=False), 1):
        add_law(fig, str(name), part, index)
    runs = result.tables["runs"]
    if "flops" in runs:
        fig.add_scatter(
            x=runs.flops,
            y=runs.loss if "loss" in runs else runs.iloc[:, 0],
            mode="markers",
            name="runs",
            marker=dict(symbol="circle-open", size=6, color="rgba(128,128,128,0.9)"),
        )
    return fig


def add_law(fig: go.Figure, name: str, part: pd.DataFrame, index: int) -> None:
    """One law: solid inside its published data, dashed beyond, with how far beyond."""
    inside = part.beyond.to_numpy() <= 1
    told = f"{name}, weight {100 * part.weight.iloc[0]:.0f} %"
    farthest = float(part.beyond.max())
    for dash, there, label in (
        ("solid", inside, told),
        ("dash", ~inside, f"{name} beyond its published data (up to {short(farthest)} x)"),
    ):
        if not there.any():
            continue
        fig.add_scatter(
            x=part.flops,
            y=np.where(there, part.predicted, np.nan),
            mode="lines+markers",
            name=label,
            legendgroup=name,
            line=dict(color=color(index), dash=dash, width=2),
            marker=dict(symbol=MARKERS[index % len(MARKERS)], size=7, maxdisplayed=8),
        )
