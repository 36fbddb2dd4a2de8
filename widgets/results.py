"""The results browser: every stored run, to be found, shown, compared with any others, and deleted.

widgets.Results()                        # of all subjects and notebooks on this machine
widgets.Results(instrument="quantize")
"""

from __future__ import annotations

import html
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from widgets.compare import on_shared_axes
from widgets.jobs import Note, guarded
from widgets.plot import PlotView
from widgets.whole import Whole
from workbench.commands.comparing import table_of
from workbench.commands.results import first_facts, megabytes
from workbench.results import Result
from workbench.storage.kept_results import Entry, chosen, remove

#: Figures that stand beside each other at most; the table holds all that are chosen.
MOST = 6
EVERY = "every instrument"


class Results(Whole, ipywidgets.VBox):
    """Stored runs by subject, instrument and date, with their first facts. Those that are chosen are drawn on
    shared axes, and a table says what their settings differ in.

    `.shown` holds the results that are drawn.
    """

    def __init__(self, instrument: str = "", subject: str = "") -> None:
        self.shown: list[Result] = []
        self._found: dict[str, Entry] = {}
        style, auto = {"description_width": "initial"}, ipywidgets.Layout(width="auto")
        self.instrument = ipywidgets.Dropdown(description="instrument", options=[EVERY], style=style)
        self.subject = ipywidgets.Text(
            description="subject", value=subject, placeholder="any", continuous_update=False, style=style
        )
        self.refresh = ipywidgets.Button(description="Look again", layout=auto)
        self.delete = ipywidgets.Button(description="Delete those chosen", layout=auto, disabled=True)
        self.runs = ipywidgets.SelectMultiple(
            description="runs", rows=10, layout=ipywidgets.Layout(width="100%"), style=style
        )
        self.note = Note()
        self.plots = ipywidgets.Box()
        self.plots.add_class("wb-views")
        self.table = ipywidgets.HTML()
        filters = ipywidgets.HBox(
            [self.instrument, self.subject, self.refresh, self.delete, self.note],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        super().__init__([filters, self.runs, self.plots, self.table])
        self.add_class("wb-panel")
        self.add_class("wb-results")
        self.look()
        if instrument:
            self.instrument.value = instrument
            self.look()
        self.instrument.observe(guarded(self.note, lambda _: self.look()), "value")
        self.subject.observe(guarded(self.note, lambda _: self.look()), "value")
        self.refresh.on_click(guarded(self.note, lambda _: self.look()))
        self.delete.on_click(guarded(self.note, lambda _: self.remove()))
        self.runs.observe(guarded(self.note, lambda _: self.show()), "value")

    def look(self) -> None:
        """Read the cache again, by the filters."""
        everything = chosen()
        names = sorted({entry.instrument for entry in everything})
        if list(self.instrument.options) != [EVERY, *names]:
            kept = self.instrument.value
            self.instrument.options = [EVERY, *names]
            self.instrument.value = kept if kept in names else EVERY
        instrument = "" if self.instrument.value == EVERY else self.instrument.value
        found = chosen(instrument, self.subject.value.strip(), found=everything)
        self._found = {entry.key: entry for entry in found}
        kept = [key for key in self.runs.value if key in self._found]
        self.runs.options = [(self._label(entry), entry.key) for entry in found]
        self.runs.value = tuple(kept)
        size = megabytes(sum(entry.bytes for entry in found))
        self.note.say(f"{len(found)} of {len(everything)} results, {size}")

    def _label(self, entry: Entry) -> str:
        date = entry.date[:16].replace("T", " ")
        return f"{date}  {entry.instrument} on {entry.on}: {first_facts(entry)}"

    def show(self) -> None:
        """Draw what is chosen."""
        entries = [self._found[key] for key in self.runs.value]
        self.delete.disabled = not entries
        self.shown = [Result.load(entry.folder, open_subject=False) for entry in entries]
        figures = [self._titled(number, result) for number, result in enumerate(self.shown[:MOST], 1)]
        if len(figures) > 1:
            on_shared_axes(*figures)
        before: Any = self.plots.children
        self.plots.children = [PlotView(figure) for figure in figures]
        for plot in before:
            plot.close()
        left = len(self.shown) - MOST
        more = f"<p>{left} more are in the table only.</p>" if left > 0 else ""
        table = table_of(self.shown).to_html(border=0, escape=True) if self.shown else ""
        self.table.value = f'{more}<div class="wb-table">{table}</div>' if table else ""

    def _titled(self, number: int, result: Result) -> go.Figure:
        figure = result.figure()
        on = html.escape(str(result.provenance.get("on", "")))
        return figure.update_layout(title_text=f"{number}: {figure.layout.title.text or ''}, {on}")

    def remove(self) -> None:
        """Delete the chosen results from the cache."""
        gone = [self._found[key] for key in self.runs.value]
        for entry in gone:
            remove(entry)
        self.look()
        self.show()
        size = megabytes(sum(entry.bytes for entry in gone))
        self.note.say(f"removed {len(gone)} results, {size}; {len(self._found)} are left")
