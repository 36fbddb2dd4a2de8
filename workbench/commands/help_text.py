"""Help from the index: options grouped under the choice they belong to, bounds as people write them."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from workbench.commands.options import RUN_OPTIONS, RUNS_OPTIONS, SUBJECT_OPTIONS

WIDTH = 100


def run_help(name: str, index: dict[str, Any]) -> str | None:
    """What `workbench run NAME` takes; None when the index does not know the name as an instrument
    or a method.
    """
    if name in index["methods"]:
        note = index["methods"][name]
        if not note["steps"]:
            return None
        head = [
            f"workbench run {name} --subject SUBJECT [--option VALUE ...]",
            "",
            f"{note['title']} ({note['source']})",
        ]
        head.append("the same as: " + note["recipe"])
        names = dict.fromkeys(note["steps"])
        parts = [instrument_help(index["instruments"][n], index, f"Options of {n}") for n in names]
        return "\n".join([*head, *parts])
    if name not in index["instruments"]:
        return None
    note = index["instruments"][name]
    source = "--subject SUBJECT" if note["on"] == "subject" else "--runs FILE"
    head = [
        f"workbench run {name} {source} [--option VALUE ...] [--out FOLDER]",
        "",
        *textwrap.wrap(note["about"], WIDTH),
        "",
        f"example: {example(name, note)}",
    ]
    return "\n".join([*head, instrument_help(note, index, "Options")])


def example(name: str, note: dict[str, Any]) -> str:
    """A command that runs as it stands, where the defaults do."""
    source = "--subject digits-vit" if note["on"] == "subject" else "--runs scaling-sweep"
    essential = [f for f in note["fields"] if "group" not in f and f.get("default")]
    numbers = [f for f in essential if f["default"].replace(".", "").isdigit()] or essential
    chosen = [f"--{f['name'].replace('_', '-')} {quoted(f['default'])}" for f in numbers[:1]]
    return " ".join(["workbench run", name, source, *chosen])


def quoted(text: str) -> str:
    return f"'{text}'" if re.search(r"[^\w.,:+-]", text) else text


def instrument_help(note: dict[str, Any], index: dict[str, Any], title: str) -> str:
    lines: list[str] = []
    groups = dict.fromkeys(field.get("group", "") for field in note["fields"])
    for group in sorted(groups, key=bool):  # what has no group comes first
        lines += ["", group or title]
        for field in note["fields"]:
            if field.get("group", "") != group:
                continue
            lines += field_help(field, "  ")
            if "axis" in field:
                lines += entries_help(field, index["axes"][field["axis"]])
    subject = {
        "subject": "a built-in name, a folder, a GGUF file, a hub id or file.py:function"
    } | SUBJECT_OPTIONS
    lines += ["", "Subject" if note["on"] == "subject" else "Runs"]
    for option, text in (subject if note["on"] == "subject" else RUNS_OPTIONS).items():
        lines += row(f"--{option}", text, "  ")
    lines += ["", "Running"]
    fields = {field["name"] for field in note["fields"]}
    for option, text in RUN_OPTIONS.items():
        if option not in fields and not (option == "export" and note["on"] != "subject"):
            lines += row(f"--{option}", text, "  ")
    return "\n".join(lines)


def entries_help(field: dict[str, Any], axis: dict[str, Any]) -> list[str]:
    """The entries of a field's axis with formula and source, and under each its own options."""
    lines = []
    for name, entry in axis["entries"].items():
        about = "; ".join(part for part in (entry["formula"], entry["source"]) if part)
        lines += row(name, about, "      ")
        for option in entry["options"]:
            lines += field_help(option | {"name": f"{field['name']}.{option['name']}"}, "        ")
    return lines


def field_help(field: dict[str, Any], indent: str) -> list[str]:
    """--name  help; one of a, b; 0 <= x < 1; in nats; default 0.5"""
    notes = [field["help"]] if field["help"] else []
    if "choices" in field:
        notes.append("one of " + ", ".join(field["choices"]))
    if "bounds" in field:
        notes.append(field["bounds"])
    if "unit" in field:
        notes.append(f"in {field['unit']}")
    if "default" not in field:
        notes.append("required")
    elif field["default"] != "":
        notes.append(f"default {field['default']}")
    elif "axis" in field:
        notes.append("default: what the method says")
    return row(f"--{field['name'].replace('_', '-')}", "; ".join(notes), indent)


def row(left: str, right: str, indent: str) -> list[str]:
    start = f"{indent}{left:<{max(24 - len(indent) + 2, 2)}}"
    if len(start.rstrip()) > 26 or not right:
        lines = [start.rstrip()]
        return lines + textwrap.wrap(right, WIDTH, initial_indent=" " * 28, subsequent_indent=" " * 28)
    return textwrap.wrap(right, WIDTH, initial_indent=f"{start:<28}", subsequent_indent=" " * 28)
