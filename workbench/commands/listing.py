"""`workbench list` and `workbench show`: what there is, and what one of it is."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from workbench.commands.help_text import WIDTH, row
from workbench.commands.options import RUN_OPTIONS, Parser, files_in
from workbench.families import load_plugins
from workbench.index import current

KINDS = ("instruments", "methods", "subjects", "axes")


def list_(arguments: list[str]) -> int:
    parser = Parser(prog="workbench list")
    parser.add_argument("what", nargs="?", choices=KINDS)
    parser.add_argument("--plugins", default="", help=RUN_OPTIONS["plugins"])
    space = parser.parse_args(arguments)
    what = space.what
    load_plugins(files_in(space.plugins))
    index = current()
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
        list_methods(index["methods"])
    if what == "axes":
        for kind, axis in index["axes"].items():
            print(f"{kind}: {axis['about']}")
            for name, entry in axis["entries"].items():
                print(
                    "\n".join(row(name, "; ".join(p for p in (entry["formula"], entry["source"]) if p), "  "))
                )
    return 0


def list_methods(cards: dict[str, Any]) -> None:
    """A line a method with what was found here, and how often each verdict was."""
    from workbench.storage import VERDICTS, evidence_record, verdict
    from workbench.storage.identity import OTHERS, identity_kind

    found = {name: verdict(evidence_record(note["family"], name)) for name, note in cards.items()}
    for name, note in cards.items():
        print(f"  {name:25} {note['family']:14} {found[name]:20} {note['title']} ({note['source']})")
    counts = Counter(found.values())
    print(f"{len(cards)} methods: " + ", ".join(f"{kind} {counts[kind]}" for kind in VERDICTS))
    kinds = [kind for kind in map(identity_kind, cards) if kind]
    others = sum(kind in OTHERS for kind in kinds)
    print(f"{len(kinds)} found equal to their equations or to others' code, {others} of them to the latter")


def show(arguments: list[str]) -> int:
    """Formula, source, file and line, recipe, options and evidence of a method or of an axis' entry."""
    parser = Parser(prog="workbench show")
    parser.add_argument("name")
    parser.add_argument("--plugins", default="", help=RUN_OPTIONS["plugins"])
    space = parser.parse_args(arguments)
    name = space.name
    from workbench.names import doors

    load_plugins(files_in(space.plugins))
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
