"""The control of a field on an axis: a list of its entries and, under it, the options of the chosen one.

    control = ChoiceControl(SALIENCY, "saliency")
    control.read()                               # "magnitude", or {"name": "fisher", "damp": 0.01}
    control.write("fisher"); control.write({"name": "fisher", "damp": 0.1}); control.write("2:4")

Values of an entry's options stay when another entry is chosen and this one again. A field whose value a
method fills in starts with the item "by the method", which is read as `NOT_GIVEN`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets
import traitlets

from widgets.whole import Whole
from workbench.axis import Axis, Entry
from workbench.errors import BadInput
from workbench.families import import_plugins

FILLED = "by the method"
#: What a control reads when nothing was chosen: the field is left out of the values.
NOT_GIVEN: Any = type(
    "NotGiven", (), {"__repr__": lambda self: "NOT_GIVEN", "__bool__": lambda self: False}
)()


class ChoiceControl(Whole, ipywidgets.VBox):
    """`options_of(entry)` makes the controls of an entry's options (`Controls`, which imports this module).

    `.value` is the last value that could be read, as JSON holds it; it may be assigned. `.name` is the list,
    `.options` the controls of the chosen entry's options, or None.
    """

    value = traitlets.Any()
    disabled = traitlets.Bool(False)

    def __init__(
        self,
        axis: Axis,
        field: str,
        options_of: Callable[[Entry], Any],
        *,
        filled: bool = False,
        look: Mapping[str, Any] | None = None,
    ) -> None:
        import_plugins()
        self.axis, self.field, self._filled, self._options_of = axis, field, filled, options_of
        self._kept: dict[str, Any] = {}  # entry name -> the controls of its options
        self._quiet = True
        self._help = str((look or {}).get("tooltip", ""))
        self.name = ipywidgets.Dropdown(options=self._items(), **(look or {}))
        self.gives = ipywidgets.HTML()
        self.gives.add_class("wb-choice-gives")
        self._box = ipywidgets.Box()
        self._box.add_class("wb-choice-options")
        super().__init__([self.name, self.gives, self._box])
        self.add_class("wb-choice")
        self.name.observe(lambda _: self._chosen(), "value")
        self.observe(self._assigned, "value")
        self.observe(lambda _: self._enable(), "disabled")
        self._quiet = False
        self._chosen()

    @property
    def options(self) -> Any:
        """Controls of the chosen entry's options; None when it has none."""
        return self._kept.get(self.name.value) if self.name.value != FILLED else None

    @property
    def unseen(self) -> tuple[ipywidgets.Widget, ...]:
        """Options of the entries that were chosen before."""
        return tuple(self._kept.values())

    def read(self) -> Any:
        """The choice as JSON holds it; `BadInput` names the option that is not accepted."""
        name = self.name.value
        if name == FILLED:
            return NOT_GIVEN
        options = self.options.values if self.options is not None else {}
        return self.axis.chosen({"name": name, **options}, self.field).plain()

    def write(self, given: Any) -> None:
        """A name, a mapping, a text that stands for both (`2:4`), or None for what the method gives."""
        if given is NOT_GIVEN or given is None:
            if not self._filled:
                raise BadInput(f"{self.field}: None is not accepted; known: {', '.join(self.axis.entries)}")
            self.name.value = FILLED
            return
        choice = self.axis.chosen(given, self.field)
        self._quiet = True
        try:
            if choice.name not in self.name.options:  # registered after the panel was made
                self.name.options = self._items()
            self.name.value = choice.name
            self._show_options()
            if self.options is not None:
                self.options.values = choice.options.model_dump(mode="json")
        finally:
            self._quiet = False
        self._changed()

    def say_filled(self, choice: Any) -> None:
        """Tell what the method gives while nothing is chosen."""
        shown = self.name.value == FILLED and choice is not None
        self.gives.value = f"gives {html.escape(str(choice))}" if shown else ""
        self.gives.layout.display = "" if shown else "none"

    def _items(self) -> list[str]:
        return [*([FILLED] if self._filled else []), *self.axis.entries]

    def _chosen(self) -> None:
        if not self._quiet:
            self._show_options()
            self._changed()

    def _show_options(self) -> None:
        name = self.name.value
        entry = None if name == FILLED else self.axis[name]
        if entry is not None and name not in self._kept and entry.options.model_fields:
            made = self._options_of(entry)
            made.watch(self._changed)
            self._kept[name] = made
        self.name.tooltip = self._help if entry is None else f"{self._help}; {name}: {about(entry)}"
        shown = self.options
        self._box.children = [] if shown is None else [shown]
        self._box.layout.display = "none" if shown is None else ""
        if entry is not None:
            self.say_filled(None)
        self._enable()

    def _changed(self) -> None:
        if self._quiet:
            return
        before, self._quiet = self.value, True
        try:
            self.value = self.read()
        except BadInput:  # whoever listens reads again, and is told what is wrong
            self.notify_change(
                traitlets.Bunch(name="value", old=before, new=before, owner=self, type="change")
            )
        finally:
            self._quiet = False

    def _assigned(self, change: Any) -> None:
        if not self._quiet:
            self.write(change["new"])

    def _enable(self) -> None:
        self.name.disabled = self.disabled
        if self.options is not None:
            self.options.enable(not self.disabled)


def about(entry: Entry) -> str:
    """An entry in one line: formula and source."""
    return " ".join(f"{entry.formula} ({entry.source})".split()) if entry.source else entry.formula


def entries_html(axis: Axis) -> str:
    """Every entry with its formula, its source, the data it asks for and its options, folded."""
    rows = []
    for name, entry in axis.entries.items():
        words = [about(entry)]
        if entry.title:
            words.insert(0, entry.title)
        if entry.needs:
            words.append(f"needs {entry.needs}")
        words += [f"{option}: {info.description}" for option, info in entry.options.model_fields.items()]
        rows.append(f"<code>{html.escape(name)}</code><span>{html.escape('; '.join(words))}</span>")
    count = f"{len(rows)} choices"
    return f"<details><summary>{count}</summary><div>{''.join(rows)}</div></details>"
