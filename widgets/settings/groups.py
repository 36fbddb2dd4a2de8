"""Settings that stand under one name, closed until somebody opens them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ipywidgets

from widgets.whole import Whole


class Group(Whole, ipywidgets.Box):
    """The controls of one group; `head` is the button that opens and closes it."""

    def __init__(self, name: str, controls: Mapping[str, ipywidgets.Widget]) -> None:
        self.name, self.fields = name, list(controls)
        self._changed = 0
        self.head = ipywidgets.Button(layout=ipywidgets.Layout(width="auto"))
        self.head.add_class("wb-group-head")
        self.head.on_click(lambda _: self.unfold(self.layout.display == "none"))
        super().__init__(list(controls.values()), layout=ipywidgets.Layout(display="none"))
        self.add_class("wb-controls")
        self.add_class("wb-group")
        self._say()

    def unfold(self, shown: bool = True) -> None:
        self.layout.display = "" if shown else "none"
        self._say()

    def say_changed(self, given: Collection[str]) -> None:
        """How many of its settings somebody has set."""
        self._changed = sum(name in given for name in self.fields)
        self._say()

    def _say(self) -> None:
        closed = self.layout.display == "none"
        changed = f", {self._changed} set" if self._changed else ""
        self.head.description = f"{'▸' if closed else '▾'} {self.name} ({len(self.fields)}{changed})"
        self.head.tooltip = f"{'Show' if closed else 'Hide'} the settings of {self.name}"


def grouped(controls: Mapping[str, Any], groups: Mapping[str, str]) -> tuple[list[Any], list[Group]]:
    """Widgets without a group, in order, and a `Group` for each name."""
    free = [widget for name, widget in controls.items() if not groups.get(name)]
    names = list(dict.fromkeys(group for name in controls if (group := groups.get(name))))
    made = [
        Group(group, {name: widget for name, widget in controls.items() if groups.get(name) == group})
        for group in names
    ]
    return free, made
