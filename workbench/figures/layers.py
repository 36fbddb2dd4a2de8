"""One way to draw layers: a number (or several) of each, readable at six layers and at a thousand.

Up to `FEW` layers are rows with short names; more are a grid, a column a block and a row a kind of weight.
A figure drawn so knows its layers (`meta.layers` of its traces, by which a page selects one in every figure,
with the mouse or the arrow keys) and says in words what it shows (`layout.meta.alt`).

>>> roles = ("query", "key", "value")
>>> names = [f"bert.encoder.layer.{block}.{role}" for block in range(12) for role in roles]
>>> fig = by_layer("Error", names, {"error": range(1, 37)}, "share of energy")
>>> fig.data[0].type, list(fig.data[0].y)
('heatmap', ['query', 'key', 'value'])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from workbench.figures.look import MARKERS, color, figure

#: Layers that are drawn as rows; more are a grid.
FEW = 24
#: Values that lie this far apart are drawn on a logarithmic scale.
WIDE = 30.0
#: Decades that the colours of a logarithmic scale span at most, below the largest value.
DECADES = 6.0
#: Fill patterns of the bars of several series, beside their colours.
PATTERNS = ("", "/", "x", ".", "-", "\\")
#: Blocks up to which the cells of a grid hold their numbers.
FEW_COLUMNS = 12
OUTSIDE = "outside"

Numbers = NDArray[np.float64]


class Cells(NamedTuple):
    """rows : kinds of weight; columns : blocks; where : layer -> (row, column)"""

    rows: list[str]
    columns: list[str]
    where: dict[str, tuple[int, int]]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all begin with, and without a last part that all end with."""
    parts = [name.split(".") for name in names]
    first = 0
    while parts and all(len(p) > first + 1 and p[first] == parts[0][first] for p in parts):
        first += 1
    left = [p[first:] for p in parts]
    if len(left) > 1 and all(len(p) > 1 and p[-1] == left[0][-1] for p in left):
        left = [p[:-1] for p in left]
    return [".".join(p) for p in left]


def grid_of_layers(names: Sequence[str]) -> Cells:
    """Layers as a grid: one row a weight's name inside its block, one column a block number (`OUTSIDE` for
    what is in none). Of several stacks, an encoder's and a decoder's, each has rows of its own.
    """
    found = [re.search(r"(?<![\w])(\d+)\.", name) for name in names]
    stacks = list(dict.fromkeys(name[: m.start()] for name, m in zip(names, found, strict=True) if m))
    called = dict(zip(stacks, short_names([s.rstrip(".") for s in stacks]), strict=True))
    columns: list[str] = []
    kinds: list[str] = []
    places: list[tuple[str, str]] = []
    for name, match in zip(names, found, strict=True):
        kind, column = (name[match.end() :], match[1]) if match else (name, OUTSIDE)
        if match and len(stacks) > 1:
            kind = f"{called[name[: match.start()]]} {kind}"
        kinds.append(kind)
        columns.append(column)
        places.append((kind, column))
    rows, across = list(dict.fromkeys(kinds)), list(dict.fromkeys(columns))
    at_row, at_column = ({label: i for i, label in enumerate(labels)} for labels in (rows, across))
    where = {name: (at_row[k], at_column[c]) for name, (k, c) in zip(names, places, strict=True)}
    return Cells(short_names(rows) if len(rows) > 1 else rows, across, where)


def by_layer(
    title: str,
    names: Sequence[str],
    series: Mapping[str, ArrayLike],
    unit: str,
    *,
    log: bool | None = None,
    largest: bool = False,
    said: Sequence[str] = (),
    between: tuple[float, float] | None = None,
) -> go.Figure:
    """A figure of one number a layer, or of several on one scale.

    names : the layers; series : what is shown -> a value a layer (NaN: none); unit : of all values
    log : a logarithmic scale; None: where all values are positive and lie far apart. Values on both sides
        of zero then have a scale that is linear near zero and logarithmic outside.
    largest : only the `FEW` layers of largest value, in that order
    said : more of each layer, for hovering and clicking;  between : the ends of a linear scale
    """
    layers = [str(name) for name in names]
    shown = {label: np.asarray(values, dtype=float) for label, values in series.items()}
    alt = in_words(layers, shown, unit)
    kept = np.arange(len(layers))
    if largest and layers:
        kept = np.argsort(-np.nan_to_num(next(iter(shown.values())), nan=-np.inf), kind="stable")[:FEW]
        title += f": the {FEW} largest of {len(layers)}" if len(layers) > FEW else ""
    texts = [
        f"{name}{''.join(f'<br>{k}: {v[i]:.4g}' for k, v in shown.items() if np.isfinite(v[i]))}"
        + (f"<br>{said[i]}" if said else "")
        for i, name in enumerate(layers)
    ]
    part = [layers[i] for i in kept], {k: v[kept] for k, v in shown.items()}, [texts[i] for i in kept]
    scale = Scale.of(np.concatenate([*part[1].values(), []]), log, between)
    fig = (rows if len(part[0]) <= FEW else cells)(title, *part, unit, scale)
    fig.update_layout(meta={"alt": f"{title}. {alt}"})
    return fig


def in_words(layers: Sequence[str], series: Mapping[str, Numbers], unit: str) -> str:
    """The largest, the least and the median layer of each series."""
    told = []
    for label, values in series.items():
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            top, low = known[np.argmax(values[known])], known[np.argmin(values[known])]
            told.append(
                f"{label} of {len(known)} layers: largest {values[top]:.3g} ({layers[top]}), median "
                f"{np.median(values[known]):.3g}, least {values[low]:.3g} ({layers[low]}) [{unit}]"
            )
    return "; ".join(told) or "No layer has a value"


class Scale(NamedTuple):
    """kind : "linear", "log" or "signed" (linear within `near` of zero, logarithmic outside); low, high : its
    ends, as drawn; fixed : somebody gave them
    """

    kind: str
    low: float
    high: float
    near: float = 1.0
    fixed: bool = False

    @classmethod
    def of(cls, values: Numbers, log: bool | None, between: tuple[float, float] | None) -> Scale:
        known = values[np.isfinite(values)]
        if not len(known):
            return cls("linear", 0.0, 1.0)
        low, high, size = float(known.min()), float(known.max()), np.abs(known[known != 0])
        far = len(size) > 0 and float(size.max() / size.min()) > WIDE
        if log or (log is None and far and between is None and (low > 0 or low < 0)):
            if low < 0:
                near = float(size.max()) * 1e-3
                end = float(np.arcsinh(size.max() / near))
                return cls("signed", -end, end, near)
            if len(size):
                top = float(np.log10(size.max()))
                least = max(float(np.log10(size.min())), top - DECADES)
                return cls("log", least if top - least > 0.01 else top - 1, top)
        if between is not None:
            return cls("linear", *between, fixed=True)
        if low < 0 < high:
            low, high = -max(-low, high), max(-low, high)
        return cls("linear", low, high) if high > low else cls("linear", min(low, 0.0), max(high, 0.0) or 1.0)

    def place(self, values: Numbers) -> Numbers:
        """Where values lie on the scale; NaN for what it has no place for."""
        if self.kind == "log":
            return np.log10(np.where(values > 0, values, np.nan))
        return np.arcsinh(values / self.near) if self.kind == "signed" else values

    def marks(self) -> dict[str, Any]:
        """Places and texts of the marks; none of a linear scale, which Plotly marks well."""
        if self.kind == "linear":
            return {}
        if self.kind == "signed":
            decades = [self.near * 10.0**k for k in range(1, 4)]
            found = [-v for v in reversed(decades)] + [0.0, *decades]
        else:
            wide = self.high - self.low > 2
            steps = (1,) if wide else (1, 2, 5)
            whole = range(int(np.floor(self.low)), int(np.ceil(self.high)) + 1)
            found = [10.0**k * m for k in whole for m in steps]
            found = [v for v in found if self.low - 1e-9 <= np.log10(v) <= self.high + 1e-9]
            found = found if len(found) > 1 else [10.0**self.low, 10.0**self.high]
        places = self.place(np.asarray(found, dtype=float))
        return {"tickvals": places.tolist(), "ticktext": [f"{v:.3g}" for v in found]}


def rows(
    title: str, layers: list[str], series: Mapping[str, Numbers], texts: list[str], unit: str, scale: Scale
) -> go.Figure:
    """A row a layer: bars on a linear scale, points on a logarithmic one, where no length means anything."""
    several = len(series) > 1
    height = 150 + len(layers) * (20 if not several else 10 + 11 * len(series))
    fig = figure(title, unit, height=max(height, 220), barmode="group", bargap=0.25)
    for index, (label, values) in enumerate(series.items()):
        meta = {"layers": layers, "clicked": plain(texts), "values": known(values)}
        about = dict(hovertext=texts, hoverinfo="text", meta=meta)
        if scale.kind == "linear":
            pattern = {"shape": PATTERNS[index % len(PATTERNS)], "fillmode": "overlay", "fgcolor": "white"}
            bars = {"color": color(index), "pattern": pattern}
            fig.add_bar(x=values, y=layers, orientation="h", name=label, marker=bars, **about)
        else:
            dots = {"color": color(index), "symbol": MARKERS[index % len(MARKERS)], "size": 9}
            fig.add_scatter(x=scale.place(values), y=layers, mode="markers", name=label, marker=dots, **about)
    fig.update_layout(showlegend=several)
    fig.update_xaxes(**scale.marks(), range=[scale.low, scale.high] if scale.fixed else None)
    fig.update_yaxes(
        type="category",
        autorange="reversed",
        tickvals=layers,
        ticktext=short_names(layers),
        title_text="layer",
    )
    return fig


def cells(
    title: str, layers: list[str], series: Mapping[str, Numbers], texts: list[str], unit: str, scale: Scale
) -> go.Figure:
    """A cell a layer: blocks across, kinds of weight down, one grid below the other for several series."""
    from plotly.subplots import make_subplots

    grid = grid_of_layers(layers)
    one = min(max(22 * len(grid.rows), 110), 900)
    several = len(series) > 1
    gap = 34 if several else 0
    inside = one * len(series) + gap * (len(series) - 1)
    fig = make_subplots(
        rows=len(series),
        shared_xaxes=True,
        vertical_spacing=gap / inside if several else None,
        subplot_titles=list(series) if several else None,
        figure=figure(title, height=inside + 130),
    )
    fig.update_annotations(x=0, xanchor="left", font_size=13)
    shape = (len(grid.rows), len(grid.columns))
    names, words = (np.full(shape, "", dtype=object) for _ in range(2))
    for name, text in zip(layers, texts, strict=True):
        names[grid.where[name]], words[grid.where[name]] = name, text
    readable = len(grid.columns) <= FEW_COLUMNS
    meta = {"layers": names.tolist(), "clicked": [plain(row) for row in words.tolist()]}
    for number, (label, values) in enumerate(series.items(), 1):
        fig.add_heatmap(
            z=placed(scale.place(values), layers, grid),
            x=grid.columns,
            y=grid.rows,
            name=label,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertext=words,
            hoverinfo="text",
            **(
                {"text": written(placed(values, layers, grid)), "texttemplate": "%{text}"} if readable else {}
            ),
            meta=meta | {"values": [known(row) for row in placed(values, layers, grid)]},
            row=number,
            col=1,
        )
    colours = "RdBu_r" if scale.kind != "log" and scale.low < 0 < scale.high else "Cividis"
    bar = dict(title=dict(text=unit, side="right"), outlinewidth=0, thickness=14, **scale.marks())
    fig.update_layout(coloraxis=dict(colorscale=colours, cmin=scale.low, cmax=scale.high, colorbar=bar))
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_xaxes(title_text="block", row=len(series), col=1)
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return fig


def placed(values: Numbers, layers: Sequence[str], grid: Cells) -> Numbers:
    """Each layer's value in its cell, NaN where there is no layer."""
    found = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for name, value in zip(layers, values, strict=True):
        found[grid.where[name]] = value
    return found


def written(values: Numbers) -> list[list[str]]:
    """The numbers in the cells."""
    return [[f"{value:.2g}" if np.isfinite(value) else "" for value in row] for row in values]


def known(values: Numbers) -> list[float | None]:
    """Numbers as JSON has them."""
    return [float(value) if np.isfinite(value) else None for value in values]


def plain(texts: Sequence[str]) -> list[str]:
    """Texts as a line each: what a clicked layer says."""
    return [str(text).replace("<br>", "; ") for text in texts]
