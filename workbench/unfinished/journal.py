"""The journal of a run: its training checkpoints in one folder of the cache, named by the run's key.

    with journal(key, about, progress) as kept:     # what trains inside finds it by `current`
        ...
        kept.clear()                                # the run has finished

A run of the same key goes on from them: it is done again from its beginning, and each training that has a
checkpoint takes its state from there. So nothing but training has to know about it. The folder comes into
being with the first checkpoint, belongs to one process at a time and goes when the run has finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.storage import cache_folder


class DamagedCheckpoint(BadInput):
    """A checkpoint that cannot be read; it is left for the user to decide about."""


#: Days after which what an interrupted run left is removed by the next run that keeps something.
STALE = 30
NOTE = "run.json"


def seconds_between() -> float:
    """Seconds between two checkpoints of a training; `WORKBENCH_CHECKPOINT_SECONDS` overrides the 30."""
    told = os.environ.get("WORKBENCH_CHECKPOINT_SECONDS", "30")
    try:
        return max(float(told), 0.0)
    except ValueError:
        raise BadInput(f"WORKBENCH_CHECKPOINT_SECONDS: {told!r} is no number of seconds; unset it") from None


class Journal:
    """The folder of one run. A run inside another has a journal inside the other's."""

    def __init__(self, folder: Path, about: Mapping[str, Any], progress: Progress, root: bool = True) -> None:
        self.folder, self.about, self.progress, self.root = folder, about, progress, root
        self.every = seconds_between()
        self.usable = True
        self._lock: TextIO | None = None
        self._counts: Counter[str] = Counter()
        if self.folder.is_dir() and self._owned():
            for leftover in self.folder.rglob("*.part"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)

    def place(self, identity: str) -> Path:
        """Folder of the checkpoint of the training with this identity: its second one has another."""
        self._counts[identity] += 1
        return self.folder / f"{identity}-{self._counts[identity]}"

    def begin(self) -> bool:
        """Make the folder, with a note of what it is; False when this run keeps nothing."""
        if not self.usable:
            return False
        if not (self.folder / NOTE).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / NOTE).write_text(json.dumps(dict(self.about)))
            if self.root:
                clear_stale(self.folder.parent, self.progress)
        return self._owned()

    def give_up(self, reason: object) -> None:
        """Nothing more is kept, which is said once."""
        if self.usable:
            self.usable = False
            self.progress.say(f"no checkpoint is kept ({reason}); the run goes on without")

    def forget(self, key: str) -> None:
        """What a run inside this one has left is needed no more."""
        if self.usable:
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def clear(self) -> None:
        """The run has finished: nothing of it is needed any more."""
        if self.usable and self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _owned(self) -> bool:
        if self.root and self._lock is None and self.usable:
            self._lock = locked(self.folder / "lock")
            if self._lock is None:
                self.give_up("another process is at this very run")
        return self.usable


CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)


def current() -> Journal | None:
    """The journal of the run that is going on; None outside of a run."""
    return CURRENT.get()


@contextlib.contextmanager
def journal(key: str, about: Mapping[str, Any], progress: Progress, fresh: bool = False) -> Iterator[Journal]:
    """The journal of the run `key` while it goes on. `fresh`: what an earlier one left is removed.

    A run that ends in `BadInput` would end so again: it leaves nothing.
    """
    outer = CURRENT.get()
    folder = (unfinished_folder() if outer is None else outer.folder) / key
    made = Journal(folder, about, progress, root=outer is None)
    made.usable = made.usable and (outer is None or outer.usable)
    if fresh:
        made.clear()
    token = CURRENT.set(made)
    try:
        yield made
    except DamagedCheckpoint:
        raise
    except BadInput:
        made.clear()
        raise
    finally:
        CURRENT.reset(token)
        made.close()


@contextlib.contextmanager
def without_journal() -> Iterator[None]:
    """What trains inside keeps nothing here: trials that a ledger keeps."""
    token = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(token)


def locked(file: Path) -> TextIO | None:
    """An open file that only one process can hold, until it ends in whatever way; None when another does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = file.open("w")
    try:
        import fcntl
    except ImportError:  # Windows
        return held
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        return None
    return held


# ---- what runs have left -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Unfinished:
    """What one interrupted run left: its folder, what it was, when it was written last, its bytes."""

    folder: Path
    about: dict[str, Any]
    written: float
    size: int

    @property
    def days(self) -> float:
        return (time.time() - self.written) / 86400

    def remove(self) -> bool:
        """False when a process is at it."""
        held = locked(self.folder / "lock")
        if held is None:
            return False
        with held:
            shutil.rmtree(self.folder, ignore_errors=True)
        return True


def unfinished_folder() -> Path:
    return cache_folder() / "unfinished"


def kept(key: str) -> bool:
    """Whether an interrupted run of this key has left something."""
    return bool(key) and (unfinished_folder() / key / NOTE).exists()


def left_behind(folder: Path | None = None) -> list[Unfinished]:
    """What interrupted runs left in the cache, the oldest first."""
    found = []
    for place in sorted((folder or unfinished_folder()).glob("*")):
        if not place.is_dir():
            continue
        try:
            files = [file.stat() for file in place.rglob("*") if file.is_file() and file.name != "lock"]
            told = json.loads((place / NOTE).read_text())
            about = told if isinstance(told, dict) else {}
        except (OSError, ValueError):
            files, about = [], {}
        written = max((file.st_mtime for file in files), default=0.0)
        found.append(Unfinished(place, about, written, sum(file.st_size for file in files)))
    return sorted(found, key=lambda left: left.written)


def clear_stale(folder: Path, progress: Progress, days: float = STALE) -> None:
    """Remove what runs left long ago; said once."""
    gone = [left for left in left_behind(folder) if left.days > days and left.remove()]
    if gone:
        size = sum(left.size for left in gone) / 1e6
        progress.say(
            f"removed the checkpoints of {len(gone)} runs left over {days:g} days ago ({size:.1f} MB)"
        )
