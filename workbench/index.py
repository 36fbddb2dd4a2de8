"""The index: what can be chosen and what it takes, readable without importing torch.

`workbench list` and every `--help` read `index.json`, which this module writes from the registries
(`python -m workbench.index`); a test holds that the file and the registries say the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from workbench.families import own_files
from workbench.field_text import bounds_text, paragraph, shown

FILE = Path(__file__).parent / "index.json"


def stored() -> dict[str, Any]:
    """The index as it is stored."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def current() -> dict[str, Any]:
    """The index as it is stored; made again where files of the user's own add to it."""
    return made() if own_files() else stored()


def made() -> dict[str, Any]:
    """The index of what is registered now, a user's own entries included."""
    from workbench.axis import axes
    from workbench.names import catalog, methods
    from workbench.subjects.registry import BUILTINS

    return {
        "instruments": {name: instrument_note(cls) for name, cls in catalog().items()},
        "axes": {kind: axis_note(axis) for kind, axis in axes().items()},
        "methods": {name: method_note(card) for name, card in methods().items()},
        "subjects": {name: note for name, (_, _, note) in BUILTINS.items()},
    }


def instrument_note(cls: Any) -> dict[str, Any]:
    """What an instrument does, what it runs on, and its fields."""
    return {
        "about": paragraph(cls),
        "on": cls.on,
        "fields": [field_note(name, info) for name, info in cls.parameters().items()],
        "renamed": dict(cls.renamed()),
    }


def method_note(card: Any) -> dict[str, Any]:
    """What a method is, and the instruments of its recipe."""
    note = {"family": card.family, "title": card.title, "source": card.source}
    return note | {"steps": [name for name, _ in card.recipe], "recipe": card.words()}


def axis_note(axis: Any) -> dict[str, Any]:
    entries = {}
    for name, entry in axis.entries.items():
        entries[name] = {
            "title": entry.title,
            "formula": entry.formula,
            "source": entry.source,
            "needs": entry.needs,
            "options": [field_note(option, info) for option, info in entry.options.parameters().items()],
        }
    return {"about": axis.help, "entries": entries}


def field_note(name: str, info: Any) -> dict[str, Any]:
    """One field as plain text: help, bounds as people write them, choices, unit, default, axis."""
    extra = info.json_schema_extra or {}
    note = {"name": name, "help": info.description or ""}
    choices = [str(a) for a in get_args(info.annotation)] if get_origin(info.annotation) is Literal else []
    if choices:
        note["choices"] = choices
    if (text := bounds_text(info)) != "":
        note["bounds"] = text
    for key in ("unit", "axis", "group"):
        if extra.get(key):
            note[key] = str(extra[key])
    if not info.is_required():
        default = info.get_default(call_default_factory=True)
        note["default"] = "" if default is None else shown(default)
    return note


def text() -> str:
    return json.dumps(made(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from workbench.index import text as registered

    FILE.write_text(registered())
