"""Tables about what is here: the studies and instruments that are installed, and how a result came about."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import nbformat
import pandas as pd
from IPython.display import HTML

from workbench import reports
from workbench.axis import Choice
from workbench.commands.as_typed import command_of
from workbench.facts import told
from workbench.instruments import Instrument
from workbench.names import catalog
from workbench.results import Result


class WholeTable(pd.DataFrame):
    """A table whose texts are read: a page shows all of them, whatever pandas would cut."""

    @property
    def _constructor(self) -> type[WholeTable]:
        return WholeTable

    def _repr_html_(self) -> str | None:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            shown: str | None = super()._repr_html_()  # type: ignore[misc]
        return shown


def studies() -> HTML:
    """The notebooks, linked, with what each is about: its heading and the paragraph under it."""
    rows = []
    for file in sorted(reports.notebooks_folder().glob("*.ipynb")):
        if file.stem == "index":
            continue
        first = next(
            (cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "markdown"), ""
        )
        title, _, rest = first.lstrip("# ").partition("\n")
        about = " ".join(rest.strip().split("\n\n")[0].split()).replace("*", "").replace("`", "")
        rows.append(
            (
                f'<a href="{html.escape(file.name)}">{html.escape(file.stem)}</a>',
                html.escape(title),
                html.escape(about),
            )
        )
    return _table(["notebook", "title", "about"], rows)


def instruments() -> HTML:
    """Every instrument: its command-line name, its import, what it measures, what it works on."""
    rows = []
    for name, kind in catalog().items():
        about = " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())
        package = ".".join(kind.__module__.split(".")[:2])
        rows.append(
            (f"<code>{name}</code>", f"<code>{package}.{kind.__name__}</code>", html.escape(about), kind.on)
        )
    return _table(["instrument", "class", "about", "works on"], rows)


def in_short(result: Result, source: str) -> HTML:
    """A result's facts in words with the command that makes it."""
    facts = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in told(result.facts)
    )
    partial = "<p>Stopped early: this result is partial.</p>" if result.partial else ""
    command = html.escape(command_of(result.instrument, source))
    on = html.escape(str(result.provenance.get("on", "")))
    about = f"<p>{html.escape(result.instrument.name())} on {on}.</p>"
    return HTML(f"{about}{partial}<table><tbody>{facts}</tbody></table><p>Made by</p><pre>{command}</pre>")


def settings(instrument: Instrument, on: Any) -> pd.DataFrame:
    """The instrument's fields with their values and meaning, after the subject they are used on."""
    rows = [
        {"setting": "instrument", "value": instrument.name(), "meaning": ""},
        {"setting": instrument.on, "value": repr(on), "meaning": ""},
    ]
    for name, info in type(instrument).parameters().items():
        rows += _setting_rows(name, getattr(instrument, name), info.description or "")
    return WholeTable(rows).set_index("setting")


def _setting_rows(name: str, value: Any, meaning: str) -> Iterator[dict[str, str]]:
    """A field; of a choice also its formula and source, and a row for each of its options."""
    if isinstance(value, Choice):
        source = f" ({value.entry.source})" if value.entry.source else ""
        meaning = f"{meaning}: {value.entry.formula}{source}"
    yield {"setting": name, "value": str(value), "meaning": meaning}
    if isinstance(value, Choice):
        for option, info in type(value.options).parameters().items():
            yield from _setting_rows(
                f"{name}.{option}", getattr(value.options, option), info.description or ""
            )


def provenance(result: Result) -> pd.DataFrame:
    """Who made this result, from what, with which versions."""
    flat: dict[str, Any] = {}
    for key, value in result.provenance.items():
        if isinstance(value, dict):
            flat |= {f"{key}: {name}": item for name, item in value.items()}
        elif isinstance(value, list):
            flat[key] = (
                ", then ".join(step["instrument"] if isinstance(step, dict) else str(step) for step in value)
                or "none"
            )
        else:
            flat[key] = value
    return WholeTable({"value": [str(v) for v in flat.values()]}, index=pd.Index(list(flat), name="what"))


def _table(columns: list[str], rows: Sequence[tuple[str, ...]]) -> HTML:
    head = "".join(f'<th scope="col" style="text-align: left">{name}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
