"""Progress and Stop: one small object that every long computation is given."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.storage.forecast import duration

if TYPE_CHECKING:
    from workbench.results import Result

Item = TypeVar("Item")
#: Seconds between two lines where there is neither a terminal nor a notebook.
EVERY = 10.0


class Progress:
    """Progress and Stop for anything over a second.

    `track` yields items until they end or `stop` is set; then `partial` is True and the caller keeps what it
    has. Subclasses draw: override `show(label, done, total)` and, for live figures, `preview(result)`.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.partial = False
        #: The signal that asked to stop, where one did.
        self.signal: int | None = None

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        done = 0
        self.show(label, done, total)
        for item in items:
            if self.stopped:
                return
            yield item
            done += 1
            self.show(label, done, total)

    @property
    def stopped(self) -> bool:
        """True once somebody asked to stop; reading it marks the result as partial."""
        if self.stop.is_set():
            self.partial = True
        return self.partial

    @property
    def watched(self) -> bool:
        """Whether anybody looks at unfinished results (building them costs time)."""
        return type(self).preview is not Progress.preview

    def quiet(self) -> Progress:
        """One that draws nothing and obeys the same Stop."""
        inner = Progress()
        inner.stop = self.stop
        return inner

    def within(self, name: str) -> Progress:
        """One for a part of the work: it draws here, with the part's name before its own labels, and obeys
        the same Stop.
        """
        return Part(self, name)

    def show(self, label: str, done: int, total: int | None) -> None:
        """Draw the state; called often, so it must be cheap."""

    def say(self, text: str) -> None:
        """Tell the user something that is not in the result."""

    def preview(self, result: Result) -> None:
        """Receive an unfinished result to draw while the run goes on."""


class Part(Progress):
    """Of a part of what another one watches."""

    def __init__(self, whole: Progress, name: str) -> None:
        super().__init__()
        self.whole, self.name, self.stop = whole, name, whole.stop

    def show(self, label: str, done: int, total: int | None) -> None:
        self.whole.show(f"{self.name}, {label}", done, total)

    def say(self, text: str) -> None:
        self.whole.say(text)


class Pace:
    """How fast each label's work goes, and what is left of it in words."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    def left(self, label: str, done: int, total: int | None) -> str:
        """What is left at the speed so far; nothing of what takes no time."""
        if not done or label not in self._began:
            self._began[label] = time.monotonic()
        spent = time.monotonic() - self._began[label]
        if not total or not 0 < done < total or spent < 2:
            return ""
        return f", about {duration(spent / done * (total - done))} left"


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose outputs are shown there."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Line:
    """One line of text below a notebook's cell, written over while the work goes on: it is saved with the
    notebook, and read without a kernel.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self._place = display({"text/plain": ""}, raw=True, display_id=True)

    def say(self, text: str) -> None:
        if self._place is not None:  # there is no page
            self._place.update({"text/plain": text}, raw=True)


class TextProgress(Progress):
    """tqdm bars in a terminal, one a label; one line in a notebook; elsewhere a line every `EVERY` seconds.
    In a headless report the text goes to the file named by `WORKBENCH_PROGRESS_FILE`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bars: dict[str, Any] = {}
        self._file = os.environ.get("WORKBENCH_PROGRESS_FILE")
        self._headless = bool(os.environ.get("WORKBENCH_HEADLESS"))
        self._pace = Pace()
        self._line: Line | None = None
        self._last = self._began = time.monotonic()

    def show(self, label: str, done: int, total: int | None) -> None:
        left, now = self._pace.left(label, done, total), time.monotonic()
        since = now - self._last
        if self._headless:
            if self._file and (since > 0.5 or done == total):
                self._last = now
                Path(self._file).write_text(f"{label} {done}/{'?' if total is None else total}{left}\n")
        elif in_notebook():
            if since > 0.5:
                self._last = now
                self._line = self._line or Line()
                self._line.say(f"{label} {done}{f' of {total}' if total else ''}{left}")
        elif sys.stderr.isatty():
            self._draw_bar(label, done, total)
        elif since > EVERY:
            self._last = now
            self.say(f"{label} {done}{f' of {total}' if total else ''}{left}")

    def _draw_bar(self, label: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        bar = self._bars.get(label)
        if bar is None or done < bar.n:
            if bar is not None:
                bar.close()
            bar = self._bars[label] = tqdm(total=total, desc=label, leave=False, mininterval=0.3)
        bar.update(done - bar.n)
        if total is not None and done >= total:
            bar.close()
            del self._bars[label]

    def say(self, text: str) -> None:
        print(f"workbench: {text}", file=sys.stderr)

    def close(self) -> None:
        if self._line is not None:
            self._line.say(f"took {duration(time.monotonic() - self._began)}")
            self._line = None
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


#: Signals that ask for an end: Ctrl-C, `kill` and a scheduler's or system's shutdown, a terminal that closes.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def interrupt_stops(progress: Progress) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP asks for a clean stop; a second Ctrl-C or SIGTERM ends at once.
    `progress.signal` is then the number of the one that asked. One that the process ignores stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if progress.stop.is_set() and number != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt
        progress.signal = number
        progress.stop.set()

    before = {}
    for number in ENDING:
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN and handler is not None:
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
