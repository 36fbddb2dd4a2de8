"""Controls for the fields of a pydantic model: the field's type, bounds, choices,
unit and help decide what is shown.

    panel_controls = Controls(Prune)            # or a result's view settings
    panel_controls.values                       # {"sparsity": 0.5, ...}, as JSON would hold them
    panel_controls.values = {"sparsity": 0.7}

Two-sided numbers become sliders (logarithmic where the field says so), choices a list, truth values a box to
tick, one-sided numbers a number field, a field on an axis its entries with the options of the chosen one
(`widgets.settings.choices`); everything else (texts, tuples, mappings, optional numbers) is a line
of text, read as YAML unless the field is text. Values survive the way there and back unchanged:
what a slider cannot show widens it.
"""

from __future__ import annotations

import enum
import html
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import ipywidgets
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from widgets.settings.choices import NOT_GIVEN, ChoiceControl, entries_html
from widgets.settings.groups import grouped
from widgets.settings.lines import as_line, from_line, holds
from workbench.axis import Axis, Choice, Entry, Fields, axis_of
from workbench.errors import BadInput

#: What text fields of these names begin to offer; a subject's own layers and splits come beside them.
SUGGESTED = {"layers": ("blocks", "all"), "device": ("auto", "cpu", "cuda")}
SPLITS = ("train", "calibration", "validation", "test")
MOST = 2**53  # the largest whole number JavaScript counts with


@dataclass(frozen=True)
class Control:
    """One field's widget, and how its value is read and written (as JSON would hold it)."""

    widget: Any  # an ipywidgets widget with a trait `value`
    read: Callable[[], Any]
    write: Callable[[Any], None]


class Controls(ipywidgets.Box):
    """One control for each field of `model`; `changed()` is called after the user (or `values`)
    changed any.
    """

    def __init__(
        self,
        model: type[BaseModel],
        values: Mapping[str, Any] | None = None,
        changed: Callable[[], None] | None = None,
        *,
        live: bool = False,
        inside: str = "",
    ) -> None:
        """inside : the field whose options these are."""
        self.model = model
        fields = model.parameters() if hasattr(model, "parameters") else model.model_fields
        self.fields: dict[str, FieldInfo] = dict(fields)
        self.controls = {name: control(name, info, live, inside) for name, info in self.fields.items()}
        groups = {} if inside else {name: str(_extra(info).get("group", "")) for name, info in fields.items()}
        free, self.groups = grouped({name: item.widget for name, item in self.controls.items()}, groups)
        shown = [*free, *self.groups]
        if self.groups:
            heads = ipywidgets.Box([group.head for group in self.groups])
            heads.add_class("wb-group-heads")
            shown.insert(len(free), heads)
        super().__init__(shown)
        self.add_class("wb-controls")
        self._given: set[str] = set()
        self._held = False
        for name, item in self.controls.items():
            item.widget.observe(lambda _, name=name: self._given.add(name), "value")
        self._plain = {name: item.read() for name, item in self.controls.items()}
        self.watch(self._follow)
        if values:
            self.values = dict(values)
        self._follow()
        if changed is not None:
            self.watch(changed)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after any change."""

        def after(_: Any) -> None:
            if not self._held:
                changed()

        for item in self.controls.values():
            item.widget.observe(after, "value")
        self._watching = [*getattr(self, "_watching", []), changed]

    def replace(self, values: Mapping[str, Any]) -> None:
        """These values, and what a field begins with for all others; told as one change."""
        self._held = True
        try:
            for name, item in self.controls.items():
                item.write(self._plain[name])
            self._given.clear()
            self.values = values
        finally:
            self._held = False
        for changed in self._watching:
            changed()

    def mark(self, wrong: str = "") -> None:
        """Show which field an error names; none without one. Its group is opened."""
        for name, item in self.controls.items():
            (item.widget.add_class if name == wrong else item.widget.remove_class)("wb-wrong")
        for group in self.groups:
            if wrong in group.fields:
                group.unfold()

    def suggest(self, known: Mapping[str, Sequence[str]]) -> None:
        """Words that the text fields of these names offer, beside any other text."""
        for name, words in known.items():
            if name in self.controls and isinstance(self.controls[name].widget, ipywidgets.Combobox):
                self.controls[name].widget.options = list(words)

    def _follow(self) -> None:
        """What other fields' values decide: what a method gives, which fields act, how many are set."""
        self._say_filled()
        for name, info in self.fields.items():
            needed = str(_extra(info).get("only_with", ""))
            if needed:
                acts = any(self._met(part) for part in needed.split(" or "))
                self.controls[name].widget.layout.display = "" if acts else "none"
        for group in self.groups:
            group.say_changed(self._given)

    def _met(self, needed: str) -> bool:
        name, _, wanted = needed.partition("=")
        try:
            value = _name_of(self.controls[name].read())
        except BadInput:  # said where the settings are checked
            return True
        return str(value) == wanted if wanted else bool(value)

    @property
    def values(self) -> dict[str, Any]:
        """Every field that has a value; one that a method fills in is left out until somebody chooses."""
        read = {name: item.read() for name, item in self.controls.items()}
        return {name: value for name, value in read.items() if value is not NOT_GIVEN}

    @values.setter
    def values(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in self.controls:
                raise BadInput(f"{name}: unknown field (fields: {', '.join(self.controls)})")
            plain = value.plain() if isinstance(value, Choice) else to_jsonable_python(value)
            self.controls[name].write(plain)
            self._given.add(name)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were written or moved: what a method would fill in is left to it."""
        return {name: value for name, value in self.values.items() if name in self._given}

    def _say_filled(self) -> None:
        """Beside "by the method": what it gives with the settings shown."""
        waiting = {
            name: item.widget
            for name, item in self.controls.items()
            if isinstance(item.widget, ChoiceControl)
        }
        if not waiting or not issubclass(self.model, Fields):
            return
        try:
            filled = self.model.filled({name: _name_of(value) for name, value in self.given.items()})
        except BadInput:  # said where the settings are checked
            filled = {}
        for name, widget in waiting.items():
            widget.say_filled(_name_of(filled.get(name)))

    def enable(self, enabled: bool) -> None:
        for item in self.controls.values():
            item.widget.disabled = not enabled


def _extra(info: FieldInfo) -> dict[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def _name_of(value: Any) -> Any:
    return value.get("name") if isinstance(value, Mapping) else value


def help_html(fields: Mapping[str, FieldInfo]) -> str:
    """What every field means, folded: a tooltip alone reaches neither keyboard nor touch."""
    rows = "".join(
        f"<code>{html.escape(name)}</code><span>{html.escape(info.description or '')}"
        f"{'' if (axis := axis_of(info)) is None else entries_html(axis)}</span>"
        for name, info in fields.items()
    )
    return f'<details class="wb-help"><summary>What the settings mean</summary><div>{rows}</div></details>'


def control(name: str, info: FieldInfo, live: bool = False, inside: str = "") -> Control:
    """The control of one field. `live`: sliders report while they move
    (for settings of a view, which are cheap). `inside`: the field that it is an option of.
    """
    extra = _extra(info)
    unit = extra.get("unit") or ""
    words = name.replace("_", " ")
    look: dict[str, Any] = {
        "description": words if not unit or str(unit) in words.split() else f"{words} ({unit})",
        "tooltip": info.description or name,
        "style": {"description_width": "9rem"},
        "layout": ipywidgets.Layout(width="auto", min_width="0"),
    }
    low, high = bounds(info)
    kind = info.annotation
    options = choices(kind)
    axis = axis_of(info)
    if axis is not None:
        made = _on_axis(axis, name, info.default is None, look, live)
    elif options is not None:
        made = _choice(options, look)
    elif kind is bool:
        made = _plain(ipywidgets.Checkbox(**look))
    elif kind in (int, float) and low is not None and high is not None:
        step = extra.get("step")
        made = _slider(
            kind,
            low,
            high,
            step if isinstance(step, (int, float)) else None,
            extra.get("scale") == "log",
            look,
            live,
        )
    elif kind is int:
        made = _plain(
            ipywidgets.BoundedIntText(
                min=-MOST if low is None else int(low), max=MOST if high is None else int(high), **look
            )
        )
    elif kind is float:
        made = _plain(ipywidgets.FloatText(**look))
    elif kind is str and (words_known := suggested(name)):
        made = _plain(
            ipywidgets.Combobox(options=words_known, ensure_option=False, continuous_update=False, **look)
        )
    elif kind is str:
        made = _plain(ipywidgets.Text(**look, continuous_update=False))
    elif get_origin(kind) in (list, tuple) and set(get_args(kind)) <= {str, ...}:
        made = _texts(look)
    else:
        made = _yaml(kind, look)
    made.widget.add_class(f"wb-field-{inside}-{name}" if inside else f"wb-field-{name}")
    default = info.get_default(call_default_factory=True)
    if default is not PydanticUndefined:
        made.write(to_jsonable_python(default))
    return made


def suggested(name: str) -> list[str]:
    """Words that a text field of this name is offered before a subject is known."""
    return list(SPLITS if name == "split" or name.endswith("_split") else SUGGESTED.get(name, ()))


def bounds(info: FieldInfo) -> tuple[float | None, float | None]:
    """The smallest and largest accepted value; an excluded end (gt, lt) is returned as the end itself."""
    low = high = None
    for rule in info.metadata:
        low = next(
            (float(v) for v in (getattr(rule, "ge", None), getattr(rule, "gt", None)) if v is not None), low
        )
        high = next(
            (float(v) for v in (getattr(rule, "le", None), getattr(rule, "lt", None)) if v is not None), high
        )
    return low, high


def choices(kind: Any) -> list[tuple[str, Any]] | None:
    """(label, JSON value) for a Literal, an Enum, or a union of those and None; None for any other type."""
    origin = get_origin(kind)
    if origin is Literal:
        return [(_label(value), to_jsonable_python(value)) for value in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [(_label(member.value), to_jsonable_python(member.value)) for member in kind]
    if kind is type(None):
        return [("none", None)]
    if origin in (Union, types.UnionType):
        parts = [choices(part) for part in get_args(kind)]
        if all(part is not None for part in parts) and len(parts) > 1:
            return [option for part in parts if part is not None for option in part]
    return None


def _label(value: Any) -> str:
    return "none" if value is None else str(value).replace("_", " ")


def _plain(widget: ipywidgets.ValueWidget) -> Control:
    def write(value: Any) -> None:
        widget.value = value

    return Control(widget, lambda: widget.value, write)


def _on_axis(axis: Axis, name: str, filled: bool, look: dict[str, Any], live: bool) -> Control:
    def options_of(entry: Entry) -> Controls:
        return Controls(entry.options, live=live, inside=name)

    widget = ChoiceControl(axis, name, options_of, filled=filled, look=look)
    return Control(widget, widget.read, widget.write)


def _choice(options: list[tuple[str, Any]], look: dict[str, Any]) -> Control:
    # By position: a list of values cannot tell 1 from True, nor None from nothing chosen.
    widget = ipywidgets.Dropdown(
        options=[(label, index) for index, (label, _) in enumerate(options)], value=0, **look
    )
    values = [value for _, value in options]

    def write(value: Any) -> None:
        found = [i for i, v in enumerate(values) if v == value and type(v) is type(value)]
        if not found:
            raise BadInput(
                f"{look['description']}: {value!r} is not accepted, "
                f"it should be one of {', '.join(label for label, _ in options)}"
            )
        widget.value = found[0]

    return Control(widget, lambda: values[widget.value], write)


def _slider(
    kind: Any, low: float, high: float, step: float | None, log: bool, look: dict[str, Any], live: bool
) -> Control:
    shown: dict[str, Any] = {"continuous_update": live, "readout": True, **look}
    widget: Any
    base = 10
    if log:
        base = 2 if kind is int and high > 1 and math.log2(high).is_integer() else 10
        lowest = low if low > 0 else min(1e-8, high * 1e-3)  # zero itself has no logarithm
        widget = ipywidgets.FloatLogSlider(
            base=base,
            min=math.log(lowest, base),
            max=math.log(high, base),
            step=1 if base == 2 else 0.05,
            value=high,
            readout_format=".0f" if kind is int else ".3",
            **shown,
        )
    elif kind is int:
        widget = ipywidgets.IntSlider(
            min=int(low), max=int(high), step=int(step or 1), value=int(low), **shown
        )
    else:
        widget = ipywidgets.FloatSlider(
            min=low, max=high, step=step or (high - low) / 100, value=low, readout_format=".4", **shown
        )

    def write(value: float) -> None:
        with widget.hold_sync():
            if not log:
                widget.min, widget.max = min(widget.min, value), max(widget.max, value)
            elif 0 < value < base**widget.min:  # also by a rounding error, which the widget would cut off
                widget.min = math.floor(math.log(value, base)) - 1
            elif value > base**widget.max:
                widget.max = math.ceil(math.log(value, base)) + 1
            widget.value = value

    def read() -> float:
        return round(widget.value) if kind is int else widget.value

    return Control(widget, read, write)


def _texts(look: dict[str, Any]) -> Control:
    """A list of texts, separated by commas; in YAML's brackets when a text itself holds what separates."""
    widget = ipywidgets.Text(placeholder="one, two, ...", continuous_update=False, **look)

    def read() -> list[Any]:
        if widget.value.strip().startswith("["):
            return list(from_line(widget.value, list[str], look["description"]))
        return [part.strip() for part in widget.value.split(",") if part.strip()]

    def write(values: list[str]) -> None:
        plain = all(v and v == v.strip() and "," not in v and not v.startswith("[") for v in values)
        widget.value = ", ".join(values) if plain else f"[{as_line(values, list[str])}]"

    return Control(widget, read, write)


def _yaml(kind: Any, look: dict[str, Any]) -> Control:
    """A line of text for a value of any other type; an empty line is None."""
    listing, mapping = holds(kind)
    hint = (
        "none"
        if type(None) in get_args(kind)
        else "one, two, ..."
        if listing
        else "name: value, ..."
        if mapping
        else ""
    )
    widget = ipywidgets.Text(placeholder=hint, continuous_update=False, **look)

    def write(value: Any) -> None:
        widget.value = as_line(value, kind)

    return Control(widget, lambda: from_line(widget.value, kind, look["description"]), write)
