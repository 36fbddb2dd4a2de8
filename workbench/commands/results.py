"""`workbench results`: what the cache holds, its size, and clearing it."""

from __future__ import annotations

from workbench.commands.options import Parser, parse
from workbench.storage import cache_folder
from workbench.storage.kept_results import KINDS, clear, entries, size


def results(arguments: list[str]) -> int:
    parser = Parser(prog="workbench results", allow_abbrev=False)
    parser.add_argument(
        "--clear",
        nargs="?",
        const="all",
        help="; ".join(f"{name}: {about}" for name, about in KINDS.items()) + " (default: all)",
    )
    space = parse(parser, arguments)
    if space.clear is not None:
        count, gone = clear(space.clear)
        print(f"removed {count} folder{'' if count == 1 else 's'}, {megabytes(gone)}")
        return 0
    found = entries()
    for entry in found:
        state = "" if entry.state == "whole" else f"  {entry.state}: {entry.reason}"
        print(
            f"{entry.date[:16].replace('T', ' '):16} {entry.instrument or '?':24} {entry.on:24} "
            f"{megabytes(entry.bytes):>10}  {entry.key}{state}"
        )
    total = sum(entry.bytes for entry in found)
    whole = sum(entry.state == "whole" for entry in found)
    print(
        f"{whole} results, {megabytes(total)}, in {cache_folder() / 'results'}; "
        f"the whole cache, with subjects and sweeps, {megabytes(size(cache_folder()))}"
    )
    others = len(found) - whole
    if others:
        print(f"{others} damaged or stale: `workbench results --clear damaged`, `--clear stale`")
    return 0


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
