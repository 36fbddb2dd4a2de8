"""Controls for the fields of a pydantic model: the field's type, bounds, choices,
unit and help decide what is shown.

    panel_controls = Controls(Prune)            # or a result's view settings
    panel_controls.values                       # {"sparsity": 0.5, ...}, as JSON would hold them
    panel_controls.values = {"sparsity": 0.7}

Two-sided numbers become sliders (logarithmic where the field says so), choices a list, truth values a box to
tick, one-sided numbers a number field, a field on an axis its entries with the options of the chosen one
(`widgets.choices`); everything else (texts, tuples, mappings, optional numbers) is a line
of text, read as YAML unless the field is text. Values survive the way there and back unchanged:
what a slider cannot show widens it.
"""

from __future__ import annotations

import enum
import html
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import ipywidgets
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from widgets.choices import NOT_GIVEN, ChoiceControl, entries_html
from workbench.axis import Axis, Choice, Entry, Fields, axis_of
from workbench.errors import BadInput
from workbench.values import Parameters, reads_otherwise

MOST = 2**53  # the largest whole number JavaScript counts with
BLANKS = " \t\r\n"  # white space to YAML; a no-break space is text


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
        super().__init__([item.widget for item in self.controls.values()])
        self.add_class("wb-controls")
        self._given: set[str] = set()
        for name, item in self.controls.items():
            item.widget.observe(lambda _, name=name: self._given.add(name), "value")
        self.watch(self._say_filled)
        if values:
            self.values = dict(values)
        self._say_filled()
        if changed is not None:
            self.watch(changed)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after any change."""
        for item in self.controls.values():
            item.widget.observe(lambda _: changed(), "value")

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
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
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
            return list(_from_line(widget.value, list[str], look["description"]))
        return [part.strip() for part in widget.value.split(",") if part.strip()]

    def write(values: list[str]) -> None:
        plain = all(v and v == v.strip() and "," not in v and not v.startswith("[") for v in values)
        widget.value = ", ".join(values) if plain else f"[{_as_line(values, list[str])}]"

    return Control(widget, read, write)


def _holds(kind: Any) -> tuple[bool, bool]:
    """Whether a field of this type holds a list, and whether it holds a mapping."""
    listing = get_origin(kind) in (list, tuple, set) or kind in (list, tuple)
    return listing, kind is dict or get_origin(kind) is dict


def _yaml(kind: Any, look: dict[str, Any]) -> Control:
    """A line of text for a value of any other type; an empty line is None."""
    listing, mapping = _holds(kind)
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
        widget.value = _as_line(value, kind)

    return Control(widget, lambda: _from_line(widget.value, kind, look["description"]), write)


def _from_line(text: str, kind: Any, name: str) -> Any:
    """The value that a line of text stands for, brackets and braces added where they are left out."""
    listing, mapping = _holds(kind)
    line = text.strip(BLANKS)
    if not line:
        return [] if listing else {} if mapping else None
    if listing and not line.startswith("["):
        line = f"[{line}]"
    if mapping and not line.startswith("{"):
        line = f"{{{line}}}"
    try:
        value = yaml.load(line, Parameters)
    except yaml.YAMLError:
        advice = "write values separated by commas, and texts with special characters in quotes"
        raise BadInput(f"{name}: {line!r} cannot be read; {advice}") from None
    a_text = str in get_args(kind) and get_origin(kind) in (Union, types.UnionType)
    return line if a_text and isinstance(value, str) and line[0] not in "'\"" else value


class Lines(yaml.SafeDumper):
    """Puts a text in quotes that `Parameters` would read as something else, `0E0` as a number."""


def _as_text(dumper: Lines, text: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if reads_otherwise(text) else None
    )


Lines.add_representer(str, _as_text)


def _as_line(value: Any, kind: Any) -> str:
    """The line that `_from_line` reads as this value."""
    if value is None:
        return ""
    line = yaml.dump(
        value, Dumper=Lines, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    ).strip(BLANKS)
    line = line.removesuffix("...").strip(BLANKS)
    bare = any(_holds(kind)) and not line.startswith(("[[", "[{", "{{"))
    return line[1:-1] if bare else line
