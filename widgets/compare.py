"""Two results of one instrument held against each other:
one figure over the other, and what differs in numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go

from widgets.whole import Whole
from workbench.axis import Choice
from workbench.facts import told
from workbench.results import Result, format_fact

#: Kinds of trace that stay readable when another result's lie over them.
CURVES = ("scatter", "bar", "histogram", "box", "violin")


def can_overlay(first: go.Figure, second: go.Figure) -> bool:
    """Whether both figures are curves or bars (a heat map would hide the other)."""
    return all(trace.type in CURVES for figure in (first, second) for trace in figure.data)


def overlay(current: go.Figure, other: go.Figure, name: str) -> go.Figure:
    """`current` with the traces of `other` behind it: paler, open markers, and `name` before their names."""
    merged = go.Figure(current)
    behind = []
    for trace in other.data:
        pale = go.Figure([trace]).data[0]
        pale.name = f"{name}: {trace.name}" if trace.name else name
        if pale.legendgroup:
            pale.legendgroup = f"{name}: {pale.legendgroup}"
        pale.opacity = 0.45
        if pale.type == "scatter":
            pale.update(line={"dash": "dot"}, marker={"symbol": f"{pale.marker.symbol or 'circle'}-open"})
        if pale.type == "bar":
            pale.update(marker={"pattern": {"shape": "/"}})
            pale.showlegend = True
        behind.append(pale)
    merged.add_traces(behind)
    if any(trace.type == "bar" for trace in merged.data):
        merged.update_layout(barmode="group")
        merged.update_traces(showlegend=True, selector={"type": "bar"})
    return merged


def settings_apart(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """Of two instruments: (setting, value of the first, of the second) where they differ. Of one choice with
    different options these, as `saliency.damp`.
    """
    yield from _apart(first, second, "")


def _apart(first: Any, second: Any, before: str) -> Iterator[tuple[str, Any, Any]]:
    there = second.model_dump(mode="json")
    for name, plain in first.model_dump(mode="json").items():
        one, two = getattr(first, name), getattr(second, name, None)
        if plain == there.get(name):
            continue
        if not isinstance(one, Choice) or not isinstance(two, Choice):
            yield before + name, plain, there.get(name)
        elif one.entry is not two.entry or one.entry.spelled:
            yield before + name, str(one), str(two)
        else:
            yield from _apart(one.options, two.options, f"{before}{name}.")


def on_shared_axes(*figures: go.Figure) -> None:
    """Give figures beside each other one height, and one range where all have the same axis."""
    height = max(figure.layout.height or 400 for figure in figures)
    for figure in figures:
        figure.update_layout(height=height)
    scales = [figure.layout.coloraxis for figure in figures]
    if all(scale.cmin is not None and scale.cmax is not None for scale in scales):
        ends = min(scale.cmin for scale in scales), max(scale.cmax for scale in scales)
        for scale in scales:
            scale.update(cmin=ends[0], cmax=ends[1])
    for name in ("xaxis", "yaxis"):
        axes = [figure.layout[name] for figure in figures]
        alike = len({(axis.type, axis.title.text) for axis in axes}) == 1
        free = all(axis.range is None and axis.autorange in (None, True) for axis in axes)
        found = shared_range(figures, name[0], axes[0].type == "log") if alike and free else None
        for axis in axes if found is not None else ():
            axis.update(range=found)


def shared_range(figures: Sequence[go.Figure], letter: str, logarithmic: bool) -> tuple[float, float] | None:
    """From the least to the largest number of all figures along an axis, with a margin and, of bars, zero;
    None where there are no numbers.
    """
    traces = [trace for figure in figures for trace in figure.data]
    found = [np.asarray(trace[letter]) for trace in traces if trace[letter] is not None]
    if not found or any(values.dtype.kind not in "iuf" for values in found):
        return None
    values = np.concatenate([v.astype(float).ravel() for v in found])
    values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    if not len(values):
        return None
    if logarithmic:
        values = np.log10(values)
    low, high = float(values.min()), float(values.max())
    if not logarithmic and any(trace.type == "bar" for trace in traces):
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.05 * (high - low) or 0.5
    return (low if low == 0 else low - margin, high + margin)


class Comparison(Whole, ipywidgets.VBox):
    """Which earlier run stands beside the one shown, and how; `redraw()` is called when that changes."""

    def __init__(self, redraw: Callable[[], Any]) -> None:
        style = {"description_width": "initial"}
        self.pick = ipywidgets.Dropdown(
            description="Compare with", options=[("nothing", 0)], value=0, style=style
        )
        self.how = ipywidgets.Dropdown(
            description="drawn",
            options=["over it", "side by side"],
            value="over it",
            style=style,
            layout=ipywidgets.Layout(width="12rem"),
        )
        self.table = ipywidgets.HTML()
        self._quiet = False
        row = ipywidgets.HBox([self.pick, self.how], layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([row, self.table], layout=ipywidgets.Layout(display="none"))
        self.add_class("wb-section")
        for picker in (self.pick, self.how):
            picker.observe(lambda _: None if self._quiet else redraw(), "value")

    def offer(self, earlier: Mapping[int, Result], shown: Result) -> None:
        """Earlier runs by number; a choice that is still there stays."""
        self.layout.display = "" if earlier else "none"
        chosen = self.pick.value
        self._quiet = True
        told = [(label(number, result, shown), number) for number, result in earlier.items()]
        self.pick.options = [("nothing", 0), *told]
        self.pick.value = chosen if chosen in earlier else 0
        self._quiet = False

    def say(self, table: str) -> None:
        if self.table.value != table:
            self.table.value = table


def label(number: int, result: Result, shown: Result) -> str:
    """run 2 (sparsity 0.7): the settings that set it apart from the run shown."""
    apart = [
        f"{name.replace('_', ' ')} {then}"
        for name, then, _ in settings_apart(result.instrument, shown.instrument)
    ]
    return f"run {number} ({', '.join(apart[:3]) or 'same settings'})"


def differences(current: Result, other: Result, name: str) -> str:
    """An HTML table of the settings that differ and of the numbers among the facts that do."""
    rows = [
        (field, format_fact(here), format_fact(there), "")
        for field, here, there in settings_apart(current.instrument, other.instrument)
    ]
    fields = set(current.instrument.model_dump())
    for fact, value in current.facts.items():
        before = other.facts.get(fact)
        if _number(value) and _number(before) and value != before:
            words = f"{fact}, measured" if fact in fields else fact
            ratio = f" (x {value / before:.3g})" if value * before > 0 else ""
            rows.append((words, format_fact(value), format_fact(before), f"{value - before:+.4g}{ratio}"))
    cells = "".join(
        f"<tr><th scope='row'>{html.escape(field.replace('_', ' '))}</th>"
        + "".join(f"<td>{html.escape(str(v))}</td>" for v in values)
        + "</tr>"
        for field, *values in rows
    )
    if not rows:
        return "<p>Same settings, same numbers.</p>"
    return (
        '<div class="wb-table"><table><thead><tr><th></th><th scope="col">now</th>'
        f'<th scope="col">{html.escape(name)}</th><th '
        f'scope="col">change</th></tr></thead><tbody>{cells}</tbody></table></div>'
    )


def facts_html(result: Result) -> str:
    """The facts of a result as a list that wraps: each name with its value."""
    items = "".join(
        f"<span><i>{html.escape(name)}</i> {html.escape(value)}</span>" for name, value in told(result.facts)
    )
    note = '<p class="wb-partial">Stopped early: this result is partial.</p>' if result.partial else ""
    return f'{note}<div class="wb-facts" role="status">{items}</div>'


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
