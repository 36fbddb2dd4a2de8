"""The bench: pick a subject and an instrument, get its panel."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets

from widgets.jobs import Note, guarded
from widgets.opening import panel
from widgets.panels import Panel
from widgets.whole import Whole, take_down
from workbench.errors import BadInput
from workbench.names import catalog, find
from workbench.subjects.registry import BUILTINS


class Bench(Whole, ipywidgets.VBox):
    """A choice of subject (a built-in, a folder, a hub id; for instruments on runs, a table's file)
    and instrument; Open shows the panel below.
    """

    def __init__(self, subject: str = "digits-vit", instrument: str | None = None) -> None:
        names = list(catalog())
        style = {"description_width": "initial"}
        self.subject = ipywidgets.Combobox(
            description="subject",
            value=subject,
            options=list(BUILTINS),
            style=style,
            tooltip="a built-in subject, a checkpoint folder, or a Hugging Face id",
        )
        self.instrument = ipywidgets.Dropdown(
            description="instrument", options=names, value=instrument or names[0], style=style
        )
        self.opener = ipywidgets.Button(description="Open", button_style="primary")
        self.note = Note()
        self.about = ipywidgets.HTML()
        self.place = ipywidgets.VBox()
        self.opener.on_click(guarded(self.note, lambda _: self.show()))
        self.instrument.observe(guarded(self.note, lambda _: self._describe()), "value")
        self._describe()
        row = ipywidgets.HBox(
            [self.subject, self.instrument, self.opener, self.note],
            layout=ipywidgets.Layout(flex_flow="row wrap"),
        )
        super().__init__([row, self.about, self.place])
        self.add_class("wb-panel")
        self.add_class("wb-bench")

    @property
    def panel(self) -> Panel | None:
        return self.place.children[0] if self.place.children else None

    def show(self) -> None:
        """Open the chosen instrument's panel, in place of the one before."""
        if not self.subject.value.strip():
            raise BadInput(
                f"subject: is empty; choose one of {', '.join(BUILTINS)}, or give a folder or a hub id"
            )
        self.note.say("")
        before = self.panel
        self.place.children = [panel(find(self.instrument.value), self.subject.value.strip())]
        if before is not None:
            take_down(before)

    def _describe(self) -> None:
        kind: Any = find(self.instrument.value)
        self.about.value = f"<p>{html.escape(' '.join((kind.__doc__ or '').split()))}</p>"
