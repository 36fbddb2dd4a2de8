"""Figures of the curvature results: densities on a log axis, layers as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from workbench.figures import by_layer, color, figure, line


def signed_log(values: ArrayLike, unit: float) -> NDArray[np.float64]:
    """asinh(value / unit) / ln 10: linear within the unit, decades outside."""
    return np.arcsinh(np.asarray(values, dtype=float) / unit) / np.log(10)


def density_figure(
    table: pd.DataFrame,
    title: str,
    axis: str = "signed log",
    outliers: pd.DataFrame | None = None,
    bulk: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> go.Figure:
    """Density with its 95 % band over probes on a log axis;
    labelled outliers, bulk edges, and further marks (position, text).
    """
    fig = figure(title, x="eigenvalue", y="density of eigenvalues", yaxis_type="log")
    if not len(table):
        fig.add_annotation(text="no product finished yet", showarrow=False)
        return fig
    unit = float(table["eigenvalue"].abs().max()) * 1e-3 or 1.0

    def place(values: ArrayLike) -> NDArray[np.float64]:
        return signed_log(values, unit) if axis == "signed log" else np.asarray(values, dtype=float)

    top = float(table["density"].max())
    floor = top * 1e-10
    shown = table[table["density"] > floor]
    banded = shown["low"].notna().all()
    line(
        fig,
        place(shown["eigenvalue"]),
        shown["density"],
        "density",
        mode="lines",
        band=(shown["low"].clip(lower=floor), shown["high"].clip(lower=floor)) if banded else None,
        customdata=shown["eigenvalue"],
        hovertemplate="eigenvalue %{customdata:.4g}<br>density %{y:.3g}<extra></extra>",
    )
    if outliers is not None and len(outliers):
        ordered = outliers.reindex(outliers["eigenvalue"].abs().sort_values(ascending=False).index)
        height = np.interp(ordered["eigenvalue"], table["eigenvalue"], table["density"]).clip(min=floor)
        fig.add_scatter(
            x=place(ordered["eigenvalue"]),
            y=height,
            mode="markers+text",
            text=[f"{v:.3g}" for v in ordered["eigenvalue"]],
            textposition="top center",
            name="resolved eigenvalues",
            cliponaxis=False,
            marker=dict(symbol="diamond", size=8, color=color(1)),
            customdata=ordered[["eigenvalue", "residual", "copies"]],
            hovertemplate=(
                "%{customdata[0]:.6g}<br>residual %{customdata[1]:.2g}<br>about %{customdata[2]:.1f} "
                "copies<extra></extra>"
            ),
        )
    if bulk is not None:
        low, high = place(bulk)
        fig.add_vrect(
            x0=low,
            x1=high,
            fillcolor="rgba(128,128,128,0.15)",
            line_width=0,
            layer="below",
            annotation_text="bulk",
            annotation_position="top left"
            if high - low > 0.08 * np.ptp(place(shown["eigenvalue"]))
            else "top right",
        )
    for number, (position, text) in enumerate(marks):
        fig.add_scatter(
            x=place([position, position]),
            y=[floor, top],
            mode="lines",
            name=text,
            line=dict(color=color(2), dash=("dot", "dash")[number % 2], width=2),
        )
    if axis == "signed log":
        ends = place([table["eigenvalue"].min(), table["eigenvalue"].max()])
        ticks = [0.0] + [
            s * unit * 10.0**k
            for k in range(1, 5)
            for s in (-1, 1)
            if ends[0] <= place([s * unit * 10.0**k])[0] <= ends[1]
        ]
        fig.update_xaxes(
            tickvals=place(ticks),
            ticktext=[f"{t:.2g}" for t in ticks],
            title_text="eigenvalue (linear near 0, logarithmic outside)",
        )
    fig.update_yaxes(range=[np.log10(floor), np.log10(top) + 0.7])
    return with_room_for_labels(fig)


def with_room_for_labels(fig: go.Figure, share: float = 0.06, most: int = 8) -> go.Figure:
    """The figure with at most so many text labels, the outermost kept:
    none nearer to another than `share` of the axis it stands on.
    """
    curves = [
        np.asarray(trace.x, dtype=float)
        for trace in fig.data
        if trace.type == "scatter" and trace.x is not None and len(trace.x)
    ]
    extent = np.ptp(np.concatenate(curves)) if curves else 0.0
    taken: list[float] = []
    for trace in fig.data:
        if trace.type != "scatter" or trace.text is None:
            continue
        places, texts = np.asarray(trace.x, dtype=float), list(trace.text)
        for i in np.argsort(-np.abs(places), kind="stable"):
            if len(taken) < most and all(abs(places[i] - other) >= share * extent for other in taken):
                taken.append(float(places[i]))
            else:
                texts[i] = ""
        trace.text = texts
    return fig


def layers_figure(
    table: pd.DataFrame,
    value: str = "mean_eigenvalue",
    unit: str = "mean eigenvalue",
    title: str = "Curvature by layer",
) -> go.Figure:
    """One number a layer; each cell carries its layer's name for clicks and hovering."""
    if not len(table):
        return figure(f"{title}: no layer finished yet")
    return by_layer(title, table["layer"].to_list(), {unit: table[value]}, unit)
