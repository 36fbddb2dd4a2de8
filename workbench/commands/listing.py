"""`workbench list` and `workbench show`: what there is, and what one of it is."""

from __future__ import annotations

import textwrap
from typing import Any

from workbench.commands.help_text import WIDTH, row
from workbench.commands.options import Parser
from workbench.index import stored

KINDS = ("instruments", "methods", "subjects", "axes")


def list_(arguments: list[str]) -> int:
    parser = Parser(prog="workbench list")
    parser.add_argument("what", nargs="?", choices=KINDS)
    what = parser.parse_args(arguments).what
    index = stored()
    if what in (None, "instruments"):
        print("instruments: workbench run NAME --subject SUBJECT")
        for name, note in index["instruments"].items():
            print("\n".join(row(name, note["about"], "  ")))
    if what in (None, "subjects"):
        print("subjects: --subject NAME, or a folder, a GGUF file, a hub id, file.py:function")
        for name, about in index["subjects"].items():
            print("\n".join(row(name, about, "  ")))
    if what in (None, "methods"):
        print("methods: workbench run NAME --subject SUBJECT; workbench show NAME")
        for name, note in index["methods"].items():
            print(
                f"  {name:25} {note['family']:14} {verdict(note['family'], name):20} {note['title']} "
                f"({note['source']})"
            )
    if what == "axes":
        for kind, axis in index["axes"].items():
            print(f"{kind}: {axis['about']}")
            for name, entry in axis["entries"].items():
                print(
                    "\n".join(row(name, "; ".join(p for p in (entry["formula"], entry["source"]) if p), "  "))
                )
    return 0


def verdict(family: str, name: str) -> str:
    from workbench.storage import evidence_record

    record = evidence_record(family, name)
    if record is None:
        return "no evidence yet"
    return "holds here" if record.get("holds") else "does not hold here"


def show(arguments: list[str]) -> int:
    """Formula, source, file and line, recipe, options and evidence of a method or of an axis' entry."""
    parser = Parser(prog="workbench show")
    parser.add_argument("name")
    name = parser.parse_args(arguments).name
    from workbench.names import doors

    for lines in (described(door) for door in doors(name)):
        print("\n".join(lines))
    return 0


def described(door: Any) -> list[str]:
    """A door's page as lines of text."""
    lines = [f"{door.name}: {door.title}" if door.title else door.name]
    for label, text in door.facts:
        wrapped = textwrap.wrap(text, WIDTH - 12) or [""]
        lines += [f"  {label:10}{wrapped[0]}", *(" " * 12 + line for line in wrapped[1:])]
    return lines
