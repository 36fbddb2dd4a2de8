"""`workbench results`: what the cache holds: list, open, compare, delete, clear."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from workbench.commands.options import Parser, parse
from workbench.errors import BadInput
from workbench.facts import told
from workbench.storage import cache_folder, replacing
from workbench.storage.kept_results import KINDS, Entry, called, chosen, clear, entries, remove, size

#: What is done -> what it takes, in words.
ACTIONS = {
    "list": "what is stored (the default)",
    "open": "show results in a browser; NAME is a key's beginning, or an instrument: its newest",
    "compare": "settings and facts of several, and their figures in one page",
    "delete": "remove these",
}
FACTS = 3


def results(arguments: list[str]) -> int:
    parser = Parser(
        prog="workbench results",
        allow_abbrev=False,
        description="What is stored of earlier runs. Example: workbench results open spectrum",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "; ".join(f"{name}: {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", nargs="?", default="list", metavar="ACTION", help=about)
    parser.add_argument("names", nargs="*", metavar="NAME", default=())
    parser.add_argument("--instrument", default="", help="list only results of this instrument")
    parser.add_argument("--subject", default="", help="list only results on subjects whose name holds this")
    parser.add_argument("--since", default="", help="list only results from this day on, as 2026-11-28")
    parser.add_argument("--out", help="write the page of open or compare here, and open no browser")
    parser.add_argument(
        "--clear",
        nargs="?",
        const="all",
        help="; ".join(f"{name}: {text}" for name, text in KINDS.items()) + " (default: all)",
    )
    space = parse(parser, arguments)
    if space.clear is not None:
        count, gone = clear(space.clear)
        print(f"removed {count} folder{'' if count == 1 else 's'}, {megabytes(gone)}")
        return 0
    if space.action not in ACTIONS:
        raise BadInput(f"action: {space.action!r} is unknown; give {', '.join(ACTIONS)}")
    if space.action == "list":
        if space.names:
            raise BadInput(f"list: takes no name; give --instrument {space.names[0]}, or open a result")
        return listed(space)
    if not space.names:
        raise BadInput(f"{space.action}: is of results; name them as `workbench results` lists them")
    found = [called(name) for name in space.names]
    if space.action == "delete":
        for entry in found:
            remove(entry)
            print(f"removed {entry.key}: {entry.instrument} on {entry.on}, {megabytes(entry.bytes)}")
        return 0
    return opened(found, space.out, compared=space.action == "compare")


def listed(space: argparse.Namespace) -> int:
    """A line a result, the newest first, with its first facts; then what is damaged or left over."""
    found = entries()
    shown = chosen(space.instrument, space.subject, space.since, found)
    filtered = bool(space.instrument or space.subject or space.since)
    for entry in shown if filtered else found:
        state = first_facts(entry) if entry.state == "whole" else f"{entry.state}: {entry.reason}"
        print(
            f"{entry.date[:16].replace('T', ' '):16} {entry.key[:8]} {entry.instrument or '?':22} "
            f"{entry.on[:22]:22} {megabytes(entry.bytes):>10}  {state}"
        )
    total = sum(entry.bytes for entry in (shown if filtered else found))
    print(
        f"{len(shown)} results, {megabytes(total)}, in {cache_folder() / 'results'}; "
        f"the whole cache, with subjects and sweeps, {megabytes(size(cache_folder()))}"
    )
    if others := len(found) - len(chosen(found=found)):
        print(f"{others} damaged or stale: `workbench results --clear damaged`, `--clear stale`")
    return 0


def first_facts(entry: Entry) -> str:
    return ", ".join(f"{name} {value}" for name, value in list(told(entry.facts))[:FACTS])


def opened(found: list[Entry], out: str | None, compared: bool) -> int:
    """The figures as a page, in the browser or in a file; of a comparison the table here too."""
    from workbench.commands.comparing import page_of, table_of
    from workbench.results import Result

    loaded = [Result.load(entry.folder, open_subject=False) for entry in found]
    if compared:
        print(table_of(loaded).to_string())
    title = f"{found[0].instrument} on {found[0].on}" if len(found) == 1 else "Stored results"
    file = Path(out) if out else cache_folder() / "pages" / f"{'-'.join(e.key[:8] for e in found)}.html"
    with replacing(file, private=not out, field="out") as draft:
        draft.write_text(page_of(loaded, title), encoding="utf-8")
    print(f"wrote {file}")
    if not out and not webbrowser.open(file.absolute().as_uri()):
        print("no browser was found here; open the file in one")
    return 0


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
