"""The look of every figure: one slim Plotly template, and the few traces the instruments share.

Figures are pure functions of results. They are drawn in three places: live in a notebook panel, by
JupyterLab's own Plotly renderer, and in an exported report, each of them on a light or a dark page. So
backgrounds are transparent, grids are translucent, text is a grey that reads on both (the live view
and the report replace it by the page's own ink), and lines are told apart by colour *and* dash *and* marker:
the colours are Okabe and Ito's (2008), whose first four keep a distance for every common kind of colour
blindness; magnitudes use cividis (Nuñez, Anderton and Renslow, 2018).

>>> fig = figure("Loss against sparsity", x="sparsity", y="loss (nats)")
>>> line(fig, [0.5, 0.7, 0.9], [1.0, 1.2, 2.0], "oBERT", band=([0.9, 1.1, 1.8], [1.1, 1.3, 2.2]))
>>> [trace.name for trace in fig.data if trace.showlegend]
['oBERT']
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import ArrayLike, NDArray
from pandas.api.types import is_bool_dtype, is_numeric_dtype

#: Okabe-Ito; the palette's black is replaced by a grey that shows on a dark page too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
MARKERS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star")
#: Equal contrast (4.6 : 1) against white and black.
NEUTRAL_INK = "#767676"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
NEUTRAL_GRID = "rgba(128,128,128,0.25)"
#: No curve is sent to a browser with more points than this (see `thin`).
MAX_POINTS = 3000

_AXIS = dict(
    gridcolor=NEUTRAL_GRID,
    zerolinecolor="rgba(128,128,128,0.5)",
    linecolor="rgba(128,128,128,0.6)",
    automargin=True,
    ticks="outside",
    ticklen=4,
    tickcolor="rgba(128,128,128,0.6)",
    title=dict(standoff=8),
    exponentformat="power",
    minorloglabels="small digits",
)


def _template() -> go.layout.Template:
    layout = go.Layout(
        colorway=COLORS[:6],
        colorscale=dict(sequential="Cividis", sequentialminus="Cividis", diverging="RdBu"),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family=FONT, size=13, color=NEUTRAL_INK),
        title=dict(
            font=dict(size=16),
            x=0,
            xref="paper",
            xanchor="left",
            y=1,
            yref="container",
            yanchor="top",
            pad=dict(t=14),
        ),
        margin=dict(l=60, r=16, t=48, b=48),
        height=400,
        hovermode="closest",
        # At the bottom of the container, where room is made for as many rows as it takes;
        # above the plot it would run into the title.
        legend=dict(
            orientation="h",
            x=0,
            xanchor="left",
            y=0,
            yref="container",
            yanchor="bottom",
            bgcolor="rgba(0,0,0,0)",
        ),
        xaxis=_AXIS,
        yaxis=_AXIS,
        modebar=dict(bgcolor="rgba(0,0,0,0)"),
        coloraxis=dict(colorscale="Cividis", colorbar=dict(outlinewidth=0, thickness=14)),
    )
    return go.layout.Template(layout=layout)


TEMPLATE = _template()
pio.templates["workbench"] = TEMPLATE
# JupyterLab's own renderer offers to send a figure to a server; results are nobody else's.
pio.renderers["plotly_mimetype"].config["modeBarButtonsToRemove"] = ["sendChartToCloud"]


def color(index: int, alpha: float | None = None) -> str:
    """Palette colour number `index` (the palette repeats), as hex,
    or as rgba with an opacity `alpha` in [0, 1].
    """
    value = COLORS[index % len(COLORS)]
    if alpha is None:
        return value
    red, green, blue = (int(value[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


#: Methods that stand in several figures of a report, by the look that they have in each.
LOOKS = {
    "magnitude": 0,
    "wanda": 1,
    "obert": 2,
    "round to nearest": 3,
    "gptq": 4,
    "obert, then gptq": 5,
    "sparsegpt": 9,
    "obd": 10,
    "obert-greedy": 8,
    "sparsegpt, then gptq": 12,
}


def looks(names: Iterable[str]) -> dict[str, int | None]:
    """The look of each method: its own where all have one, else the next of the figure (None)."""
    found = {name: LOOKS.get(name.lower()) for name in names}
    return found if None not in found.values() else dict.fromkeys(found)


def figure(title: str, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """An empty figure in the workbench's look.

    `x` and `y` are axis titles *with their unit* ("sparsity", "loss (nats)"); everything else is passed to
    the Plotly layout unchanged (`xaxis_type="log"`, `height=300`, `barmode="group"`, ...).
    """
    fig = go.Figure(
        layout={
            "template": TEMPLATE,
            "title_text": title,
            "xaxis_title_text": x or None,
            "yaxis_title_text": y or None,
        }
    )
    fig.update_layout(**layout)
    return fig


def thin(x: ArrayLike, y: ArrayLike, points: int = MAX_POINTS) -> tuple[NDArray[Any], NDArray[Any]]:
    """Reduce a curve to at most `points` points without losing a peak.

    The curve is cut into `points // 2 - 1` runs of consecutive points; of each the smallest and the largest
    finite `y` are kept, and the curve's two ends. Order is kept. Runs that hold no finite value keep their
    first point, so a gap stays a gap. Curves that are short enough are returned as they are (as arrays).

    x, y : one-dimensional, equal length n. Returns (x', y') of length <= points.
        ValueError if the lengths differ.
    """
    xs, ys = np.asarray(x), np.asarray(y)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ValueError(
            f"thin: x and y must be one-dimensional and equally long, got shapes {xs.shape} and {ys.shape}"
        )
    if points < 4:
        raise ValueError(f"thin: points must be at least 4, got {points}")
    n = len(ys)
    if n <= points:
        return xs, ys
    values = ys.astype(np.float64)
    finite = np.isfinite(values)
    bins = points // 2 - 1
    starts = np.linspace(0, n, bins + 1).astype(np.int64)[:-1]
    run = np.searchsorted(starts, np.arange(n), side="right") - 1  # the run that each point belongs to

    def first_at(extreme: NDArray[np.float64], candidates: NDArray[np.float64]) -> NDArray[np.int64]:
        hit = np.flatnonzero(candidates == extreme[run])
        _, first = np.unique(run[hit], return_index=True)
        return hit[first]

    below, above = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    low = first_at(np.minimum.reduceat(below, starts), below)
    high = first_at(np.maximum.reduceat(above, starts), above)
    keep = np.unique(np.concatenate([[0, n - 1], low, high]))
    return xs[keep], ys[keep]


def line(
    fig: go.Figure,
    x: ArrayLike,
    y: ArrayLike,
    name: str,
    band: tuple[ArrayLike, ArrayLike] | None = None,
    index: int | None = None,
    mode: str | None = None,
    **trace: Any,
) -> None:
    """Add a curve to `fig`, with its interval (`band = (low, high)`) as a shaded strip.

    `index` picks colour, dash and marker together, so the same method keeps its look across figures; by
    default the next one not used in this figure. Curves of up to 40 points show markers;
    longer ones are lines, thinned to `MAX_POINTS`.
    """
    if index is None:
        index = len({t.legendgroup for t in fig.data if t.legendgroup})
    xs, ys = np.asarray(x), np.asarray(y)
    if band is not None:
        lows, highs = (np.asarray(side, dtype=float) for side in band)
        (x_low, low), (x_high, high) = thin(xs, lows), thin(xs, highs)
        fig.add_scatter(
            x=np.concatenate([x_low, x_high[::-1]]),
            y=np.concatenate([low, high[::-1]]),
            fill="toself",
            mode="lines",
            line=dict(width=0),
            fillcolor=color(index, 0.18),
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    lap = index // len(COLORS)  # colours come again with another dash and marker
    if mode is None:
        mode = "lines+markers" if len(xs) <= 40 else "lines"
    xs, ys = thin(xs, ys)
    fig.add_scatter(
        x=xs,
        y=ys,
        name=name,
        mode=mode,
        legendgroup=name,
        showlegend=True,
        line=dict(color=color(index), dash=DASHES[(index + lap) % len(DASHES)], width=2),
        marker=dict(symbol=MARKERS[(index + 2 * lap) % len(MARKERS)], size=7, color=color(index)),
        **trace,
    )


def points(
    fig: go.Figure,
    x: ArrayLike,
    y: ArrayLike,
    name: str,
    text: Sequence[str] | None = None,
    index: int | None = None,
    **trace: Any,
) -> None:
    """Add a cloud of points to `fig`; `text` is shown on hovering. `index` as in `line`."""
    line(
        fig, x, y, name, index=index, mode="markers", hovertext=None if text is None else list(text), **trace
    )


def rule(fig: go.Figure, text: str, x: float | None = None, y: float | None = None) -> None:
    """Add a thin dashed reference line across the plot at `x` or at `y`, in the axis's own units,
    labelled `text`.

    Set the axis's type first: on a logarithmic axis Plotly takes a line's place as the value and a label's as
    its logarithm.
    """
    if (x is None) == (y is None):
        raise ValueError("rule: give exactly one of x and y")
    style = dict(line=dict(color="rgba(128,128,128,0.9)", width=1.2, dash="dash"))
    if x is not None:
        fig.add_vline(x=x, **style)
        fig.add_annotation(
            text=text,
            x=np.log10(x) if fig.layout.xaxis.type == "log" else x,
            y=1,
            yref="y domain",
            xanchor="left",
            yanchor="top",
            showarrow=False,
        )
    else:
        assert y is not None
        fig.add_hline(y=y, **style)
        fig.add_annotation(
            text=text,
            y=np.log10(y) if fig.layout.yaxis.type == "log" else y,
            x=1,
            xref="x domain",
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
        )


def heat(
    fig: go.Figure,
    z: ArrayLike,
    x: Sequence[Any] | None = None,
    y: Sequence[Any] | None = None,
    unit: str = "",
    **trace: Any,
) -> None:
    """Add a heat map of `z` (rows, columns) in cividis, with `unit` on its colour bar;
    row 0 is drawn at the top.

    For tables and small grids. Weight matrices (10^5 cells and more) belong on `widgets.Bitmap`.
    """
    fig.add_heatmap(
        z=np.asarray(z),
        x=None if x is None else list(x),
        y=None if y is None else list(y),
        colorscale="Cividis",
        colorbar=dict(title=dict(text=unit, side="right"), outlinewidth=0, thickness=14),
        **trace,
    )
    fig.update_yaxes(autorange="reversed")


def table_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """The default picture of a tidy table: its first numeric column across, every other one as a curve.

    A table whose first column is text (layer names, methods) becomes grouped bars beside it. Instruments that
    know what their numbers mean override `Result.figure` instead.
    """
    numeric = [
        str(name)
        for name in table.columns
        if is_numeric_dtype(table[name]) and not is_bool_dtype(table[name])
    ]
    first = str(table.columns[0]) if len(table.columns) else ""
    if not numeric:
        return figure(title)
    if first in numeric and len(numeric) > 1:
        fig = figure(title, x=first, y=numeric[1] if len(numeric) == 2 else "value")
        for name in numeric[1:]:
            line(fig, table[first], table[name], name)
        return fig
    labels = table[first].astype(str) if first not in numeric else table.index.astype(str)
    height = 150 + len(table) * (9 + 11 * len(numeric))
    fig = figure(title, numeric[0] if len(numeric) == 1 else "value", first, barmode="group", height=height)
    for index, name in enumerate(numeric):
        fig.add_bar(y=labels, x=table[name], orientation="h", name=name, marker_color=color(index))
    fig.update_yaxes(type="category", autorange="reversed", tickvals=labels)
    return fig
