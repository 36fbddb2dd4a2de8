"""Two results of one instrument held against each other:
one figure over the other, and what differs in numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go

from workbench.axis import Choice
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
            rows.append((words, format_fact(value), format_fact(before), f"{value - before:+.4g}"))
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
    shown = [(name, value) for name, value in result.facts.items() if not isinstance(value, (dict, list))]
    items = "".join(
        f"<span><i>{html.escape(n.replace('_', ' '))}</i> {html.escape(format_fact(v))}</span>"
        for n, v in shown
    )
    note = '<p class="wb-partial">Stopped early: this result is partial.</p>' if result.partial else ""
    return f'{note}<div class="wb-facts" role="status">{items}</div>'


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
