"""Stored results side by side: what their settings differ in, their facts, and their figures on shared axes.

print(table_of([first, second]).to_string())
Path("both.html").write_text(page_of([first, second]))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import nbformat
import pandas as pd
from plotly.io import to_json

from workbench.axis import Choice
from workbench.facts import told
from workbench.results import Result

#: Facts that stand in a comparison's first lines.
MOST = 12


def settings_of(fields: Any, before: str = "") -> dict[str, str]:
    """Every setting of an instrument as text, a choice's options as `saliency.damp`."""
    found: dict[str, str] = {}
    for name, plain in fields.model_dump(mode="json").items():
        value = getattr(fields, name)
        found[before + name] = str(value) if isinstance(value, Choice) else json.dumps(plain)
        if isinstance(value, Choice):
            found |= settings_of(value.options, f"{before}{name}.")
    return found


def table_of(results: Sequence[Result]) -> pd.DataFrame:
    """A column a result: subject, date, the settings that are not the same in all, and the facts."""
    settings = [settings_of(result.instrument) for result in results]
    names = dict.fromkeys(name for each in settings for name in each)
    apart = [name for name in names if len({each.get(name) for each in settings}) > 1]
    columns = {}
    for number, (result, each) in enumerate(zip(results, settings, strict=True), 1):
        about = {
            "instrument": result.instrument.name(),
            "on": str(result.provenance.get("on", "")),
            "date": str(result.provenance.get("date", ""))[:16].replace("T", " "),
        }
        facts = dict(list(told(result.facts))[:MOST])
        columns[str(number)] = about | {name: each.get(name, "") for name in apart} | facts
    return pd.DataFrame(columns).fillna("")


def page_of(results: Sequence[Result], title: str = "") -> str:
    """One HTML file with the figures below each other, and the table of `table_of`."""
    from workbench import export_html
    from workbench.overview import WholeTable

    cells = [nbformat.v4.new_markdown_cell(f"# {title or 'Stored results'}")]
    for number, result in enumerate(results, 1):
        fig = result.figure()
        if len(results) > 1:
            fig.update_layout(title_text=f"{number}: {fig.layout.title.text or ''}")
        cells.append(shown({export_html.PLOTLY_MIME: json.loads(to_json(fig))}))
    table: Any = WholeTable(table_of(results))
    cells += [
        nbformat.v4.new_markdown_cell("## Settings and facts"),
        shown({"text/html": table._repr_html_()}),
    ]
    return export_html.page(nbformat.v4.new_notebook(cells=cells))


def shown(data: dict[str, Any]) -> nbformat.NotebookNode:
    """A cell without code that shows this."""
    return nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", data=data)])
