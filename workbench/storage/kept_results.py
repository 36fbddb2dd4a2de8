"""What the cache holds: finished results, one folder each, and what was left by processes that were killed.

for entry in entries():
    print(entry.key, entry.instrument, entry.on, entry.date, entry.bytes, entry.state)
clear("damaged")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import BadInput
from workbench.storage.places import cache_folder
from workbench.storage.writing import damage, sweep

#: What `clear` removes, by name.
KINDS = {
    "stale": "what killed processes left",
    "damaged": "results whose files are not what was written",
    "all": "every result, and what killed processes left",
}
#: Seconds after which a hidden folder of an earlier version's unfinished save counts as left.
OLD = 3600


@dataclass(frozen=True)
class Entry:
    """One folder of the cache's results: `state` is "whole", "damaged" (`reason` says how) or "stale"."""

    folder: Path
    key: str
    instrument: str
    on: str
    date: str
    bytes: int
    state: str
    reason: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def chosen(
    instrument: str = "", on: str = "", since: str = "", found: list[Entry] | None = None
) -> list[Entry]:
    """The whole results of an instrument, of a subject, or since a day ("2026-11-28"), the newest first."""
    return [
        entry
        for entry in (entries() if found is None else found)
        if entry.state == "whole"
        and (not instrument or entry.instrument == instrument)
        and (not on or on.lower() in entry.on.lower())
        and entry.date >= since
    ]


def called(text: str) -> Entry:
    """The whole result whose key begins with `text`, or the newest of the instrument of that name."""
    found = chosen()
    keyed = [entry for entry in found if entry.key.startswith(text)]
    if len(keyed) > 1 and len({entry.key for entry in keyed}) > 1:
        raise BadInput(f"name: {text!r} begins the keys of {len(keyed)} results; give more of it")
    of_instrument = [entry for entry in found if entry.instrument == text]
    if not text or not (keyed or of_instrument):
        raise BadInput(
            f"name: no stored result is called {text!r}; `workbench results` lists keys and instruments"
        )
    return (keyed or of_instrument)[0]


def remove(entry: Entry) -> bool:
    """Remove one stored result; a run that needs it computes it again."""
    return _remove(entry.folder)


def entries() -> list[Entry]:
    """Every stored result, the newest first, then what was left unfinished."""
    root = cache_folder() / "results"
    found = []
    with contextlib.suppress(OSError):
        for place in sorted(root.iterdir()):
            if not place.name.startswith("."):
                found.append(_entry(place))
    found.sort(key=lambda entry: entry.date, reverse=True)
    return found + [
        Entry(place, place.name, "", "", _date(place), size(place), "stale", "an unfinished save")
        for place in left()
    ]


def left() -> list[Path]:
    """Unfinished saves of processes that are gone, in the folders of the cache."""
    root = cache_folder()
    found: list[Path] = []
    places = [root, *(p for p in (root / "results", root / "subjects", root / "sent") if p.is_dir())]
    places += [p for p in (root / "results").glob("*") if p.is_dir() and not p.name.startswith(".")]
    for place in places:
        found += sweep(place, left=False)
        with contextlib.suppress(OSError):
            hidden = (p for p in place.iterdir() if p.name.startswith(".") and p.is_dir())
            found += [
                p
                for p in hidden
                if not p.name.startswith(".workbench-") and time.time() - p.stat().st_mtime > OLD
            ]
    return found


def clear(what: str = "all") -> tuple[int, int]:
    """Remove one of `KINDS`; (folders, bytes) that are gone. A run that needs them computes them again."""
    if what not in KINDS:
        raise BadInput(f"clear: {what!r} is unknown; give {', '.join(KINDS)}")
    states = {"stale": ("stale",), "damaged": ("damaged",), "all": ("whole", "damaged", "stale")}[what]
    count = total = 0
    for entry in entries():
        if entry.state in states and _remove(entry.folder):
            count, total = count + 1, total + entry.bytes
    return count, total


def size(place: Path) -> int:
    """Bytes of a file, or of everything below a folder."""
    total = 0
    with contextlib.suppress(OSError):
        if not place.is_dir():
            return place.stat().st_size
        for base, _, names in os.walk(place):
            for name in names:
                with contextlib.suppress(OSError):
                    total += (Path(base) / name).lstat().st_size
    return total


def _entry(place: Path) -> Entry:
    told: Any = {}
    reason = ""
    try:
        told = json.loads((place / "result.json").read_text(encoding="utf-8"))
        reason = damage(place)
        if not isinstance(told, dict) or not isinstance(told.get("provenance"), dict):
            told, reason = {}, reason or "result.json is no result"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"result.json: {type(error).__name__}"
    about = told.get("provenance", {}) if isinstance(told, dict) else {}
    return Entry(
        place,
        place.name,
        str(told.get("instrument", "")),
        str(about.get("on", "")),
        str(about.get("date", "")) or _date(place),
        size(place),
        "damaged" if reason else "whole",
        reason,
        fields=dict(told.get("fields") or {}),
        facts=dict(told.get("facts") or {}),
        seconds=float(about.get("seconds") or 0.0),
    )


def _date(place: Path) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(place.stat().st_mtime))
    except OSError:
        return ""


def _remove(place: Path) -> bool:
    """Take a folder out of the way in one rename, so that nobody reads half of it, and remove it."""
    try:
        if not place.is_dir() or place.is_symlink():
            place.unlink()
            return True
        gone = place.with_name(f".gone-{place.name}")
        shutil.rmtree(gone, ignore_errors=True)
        place.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
