"""What a long run has measured so far, part by part, in the journal of the run: it goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from workbench.unfinished import current

Record = dict[str, Any]  # numbers and text


class FinishedParts:
    """Records by name. One that an interrupted run of the same key has left is not measured again.

    Records are appended to one file, a line each, when the journal's seconds between two checkpoints have
    passed; a line that was cut off is a record that was not measured.
    """

    FILE = "parts.jsonl"

    def __init__(self, identity: str) -> None:
        self.journal = current()
        self.known: dict[str, Record] = {}
        self.folder: Path | None = None
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        if self.journal is not None and self.journal.usable:
            self.folder = self.journal.place(identity)
            self.known = read(self.folder / self.FILE)
        self._last = time.monotonic()

    def get(self, name: str, measure: Callable[[], Record | None]) -> Record | None:
        """The record of this name, measured where it is not known; None when that was stopped."""
        if name not in self.known:
            found = measure()
            if found is None:
                return None
            self.known[name] = found
            self._waiting.append(json.dumps([name, found]))
            self.write()
        return self.known[name]

    def write(self, now: bool = False) -> None:
        """Append what waits, when it is time."""
        journal = self.journal
        if not self._waiting or journal is None or self.folder is None:
            return
        if not now and time.monotonic() - self._last < journal.every:
            return
        self._last = time.monotonic()
        try:
            if not journal.begin():
                return
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / self.FILE).open("a")
            self._file.write("".join(f"{line}\n" for line in self._waiting))
            self._file.flush()
        except OSError as error:
            journal.give_up(error)
        self._waiting.clear()

    def close(self) -> None:
        self.write(now=True)
        if self._file is not None:
            self._file.close()
            self._file = None


def read(file: Path) -> dict[str, Record]:
    """The whole lines of a file; what follows one that is not whole is cut off, in the file too."""
    if not file.is_file():
        return {}
    found: dict[str, Record] = {}
    good = 0
    content = file.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            name, record = json.loads(line)
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        found[str(name)] = record
        good += len(line)
    if good < len(content):
        with file.open("rb+") as opened:
            opened.truncate(good)
    return found
