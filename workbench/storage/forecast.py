"""What a run will hold at most, by kind, and how long it will take: said before it starts.

    "2GB", "1.5 GiB", 2_000_000_000        bytes
    Forecast({"weights": 513 << 20, "workspace": 90 << 20}).words()

A forecast is made of shapes alone, so a run that does not fit is refused before a weight is read.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import BadInput

UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
SHARE = 0.8  # of what is free


def bytes_of(value: int | float | str, field: str = "memory") -> int:
    """A number of bytes, or a text with a unit; `BadInput` for what is neither, or not above zero."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", str(value), re.ASCII)
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or not 1 <= float(found[1]) * unit < math.inf:
        raise BadInput(
            f"{field}: {str(value)[:60]!r} is no number of bytes; give a whole number, or one with a unit "
            "such as 800MB, 2GB or 1.5GiB"
        )
    return int(float(found[1]) * unit)


def in_words(count: float) -> str:
    """1_234_567_890 -> '1.23 GB'; as short as it can be read."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


@dataclass(frozen=True)
class Forecast:
    """held : kind (weights, hidden states, second moments, workspace) -> bytes at the moment when most is
        held; what the process holds without the subject is not part of it
    seconds : how long the run takes; None where that was not asked
    exact : else it holds at least so much
    smaller : settings that hold less -> bytes they hold, the mildest first
    streamed : the same run with one block in memory and the others in files, where it can be done;
        `in_files` is that one's
    """

    held: Mapping[str, int]
    seconds: float | None = None
    exact: bool = True
    smaller: Mapping[str, int] = field(default_factory=dict)
    streamed: Forecast | None = None
    in_files: bool = False

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def words(self) -> str:
        """'about 0.75 GB (weights 538 MB, workspace 210 MB), about 40 s'"""
        parts = ", ".join(f"{kind} {in_words(count)}" for kind, count in self.held.items() if count)
        time = "" if self.seconds is None else f", and takes about {duration(self.seconds)}"
        much = f"about {in_words(self.total)} at most" if self.exact else f"{in_words(self.total)} or more"
        where = ", with one block in memory and the others in files" if self.in_files else ""
        return f"holds {much} ({parts}){where}{time}"

    def within(self, limit: int) -> Forecast:
        """Of the ways to do this run the one that stays below `limit` bytes, in memory if it does."""
        return self if self.total <= limit or self.streamed is None else self.streamed

    def check(self, name: str, limit: int, given: bool) -> None:
        """`BadInput` with the smallest that works when the run holds more than `limit` bytes.

        given : the limit is somebody's, else what is free
        """
        if self.total <= limit:
            return
        whose = f"{in_words(limit)} is" if given else f"{in_words(limit)}, {SHARE:.0%} of what is free, is"
        enough = next(
            (f"{text}, which holds {in_words(n)}" for text, n in self.smaller.items() if n <= limit), ""
        )
        least = -(-self.total // 1_000_000)
        help_ = f"give --memory {least}MB or more" + (f", or {enough}" if enough else "")
        raise BadInput(f"memory: {whose} too little: {name} {self.words()}; {help_}")


class Plan(Protocol):
    """Work whose memory follows from shapes and whose time follows from a trial; of `predicted` work no time
    is told.
    """

    @property
    def predicted(self) -> bool: ...

    def forecast(self) -> Forecast:
        """What is held when most is."""

    def seconds(self, change: Callable[..., None]) -> float | None:
        """How long it takes, by what `change` takes on a part."""


def weight_bytes(model: Any) -> int:
    """What the parameters of a torch module take."""
    return sum(p.nbytes for p in model.parameters())


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def free_bytes(device: Any = None) -> int | None:
    """Bytes that can still be taken on a device (of torch; None: in main memory); None where the system does
    not say.
    """
    if device is not None and getattr(device, "type", "cpu") == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return main_memory() if sys.platform.startswith("linux") else None


def main_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What Linux says is available, or less where the process's group has a limit of its own."""
    found = []
    for line in text_of(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) << 10)
    for line in text_of(proc / "self/cgroup").splitlines():
        if line.startswith("0::"):
            own = groups / line[3:].strip().lstrip("/")
            most, used = text_of(own / "memory.max").strip(), text_of(own / "memory.current").strip()
            stat = dict(
                row.split() for row in text_of(own / "memory.stat").splitlines() if row.count(" ") == 1
            )
            if most.isdigit() and used.isdigit():
                found.append(int(most) - int(used) + int(stat.get("inactive_file", 0)))
    return max(min(found), 0) if found else None


def text_of(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
