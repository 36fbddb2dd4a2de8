"""Run, Stop and a progress bar for work that takes longer than a moment.

The work runs in a thread, so the kernel keeps answering: Stop, sliders and other cells work while it runs.
What goes wrong is said in words beside the bar; a traceback is there to unfold,
never spread over the notebook.
"""

from __future__ import annotations

import contextlib
import functools
import html
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets

from widgets.whole import Whole
from workbench.errors import BadInput
from workbench.progress import Pace, Progress
from workbench.results import Result

#: Seconds between two updates of the bar or of a live figure; every message costs the page a redraw.
SHOW_EVERY, PREVIEW_EVERY, SAY_EVERY = 0.1, 0.4, 1.0


class Note(ipywidgets.HTML):
    """One line of state, announced to screen readers."""

    def __init__(self, text: str = "") -> None:
        super().__init__(layout=ipywidgets.Layout(min_width="0", flex="1 1 12rem"))
        self.add_class("wb-note")
        self.say(text)

    def say(self, text: str) -> None:
        self.value = f'<span role="status">{html.escape(text)}</span>'

    def complain(self, error: BaseException) -> None:
        """An error in words: ours as they are, a stranger's with its type and, folded, where it happened."""
        if isinstance(error, BadInput):
            self.value = f'<span role="alert" class="wb-error">{html.escape(str(error))}</span>'
            return
        message = " ".join(str(error).split()) or "no message"
        trace = "".join(traceback.format_exception(error))
        self.value = (
            f'<span role="alert" class="wb-error">{html.escape(type(error).__name__)}: '
            f"{html.escape(message)}</span>"
            f"<details><summary>where it happened</summary><pre>{html.escape(trace)}</pre></details>"
        )


def guarded(note: Note, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with any exception shown in `note`: JupyterLab shows nothing of an error in a widget's
    callback.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            note.complain(error)
            return None

    return call


class WidgetProgress(Progress):
    """The workbench's progress protocol drawn on an ipywidgets bar, at most ten times a second."""

    def __init__(
        self, bar: ipywidgets.IntProgress, note: Note, preview: Callable[[Result], None] | None = None
    ) -> None:
        super().__init__()
        self._bar, self._note, self._preview, self._pace = bar, note, preview, Pace()
        self._shown = self._previewed = self._said = 0.0
        self._label = ""

    def show(self, label: str, done: int, total: int | None) -> None:
        now, left = time.monotonic(), self._pace.left(label, done, total)
        if now - self._shown < SHOW_EVERY and done != total:
            return
        self._shown = now
        with self._bar.hold_sync():
            self._bar.max = total or max(done, 1)
            self._bar.value = done
        if now - self._said < SAY_EVERY and done != total and label == self._label:
            return  # what is read out changes at most once a second
        self._said, self._label = now, label
        asked = " (stopping)" if self.stop.is_set() else ""
        self._note.say(f"{label} {done}{f' of {total}' if total else ''}{left}{asked}")

    def preview(self, result: Result) -> None:
        now = time.monotonic()
        if self._preview is not None and now - self._previewed >= PREVIEW_EVERY:
            self._previewed = now
            self._preview(result)


class Job(Whole, ipywidgets.HBox):
    """A row of Run, Stop, bar and state for `work(progress) -> value`;
    `finished(value)` is called with what it returned.

    `preview` receives unfinished results while it runs. `start()` and `wait()` are what the buttons do, for
    scripts and tests. `after(call)` is for what is asked while work is running: it comes next.
    """

    def __init__(
        self,
        work: Callable[[Progress], Any],
        finished: Callable[[Any], None],
        preview: Callable[[Result], None] | None = None,
    ) -> None:
        self._work, self._finished, self._preview = work, finished, preview
        self._thread: threading.Thread | None = None
        self._progress: WidgetProgress | None = None
        self._lock = threading.Lock()  # between the work's last act and a request that arrives meanwhile
        self._going = self._aside = False
        self._waiting: Callable[[], None] | None = None
        self.run = ipywidgets.Button(
            description="Run", button_style="primary", tooltip="Run with these settings"
        )
        self.halt = ipywidgets.Button(
            description="Stop", disabled=True, tooltip="Stop and keep what is there"
        )
        self.bar = ipywidgets.IntProgress(
            value=0, max=1, layout=ipywidgets.Layout(width="12rem", display="none")
        )
        self.note = Note("ready")
        self.run.on_click(guarded(self.note, lambda _: self.start()))
        self.halt.on_click(guarded(self.note, lambda _: self.stop()))
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        super().__init__([self.run, self.halt, self.bar, self.note], layout=row)
        self.add_class("wb-job")

    @property
    def running(self) -> bool:
        return self._going

    def start(self, work: Callable[[Progress], Any] | None = None, begins: str = "starting") -> None:
        """Begin in a thread; does nothing while one is running.

        work : instead of the job's own, which comes next when it is asked for meanwhile; when it returns None
            there is nothing to show
        begins : what is said until the work says more
        """
        with self._lock:
            if self._going:
                if self._aside and work is None:
                    self._waiting = self.start
                return
            self._going, self._aside = True, work is not None
            self._busy(True)
        self._progress = WidgetProgress(self.bar, self.note, self._preview)
        self.note.say(begins)
        task = (self._progress, work or self._work)
        self._thread = threading.Thread(target=self._go, args=task, daemon=True)
        self._thread.start()

    def after(self, call: Callable[[], None]) -> bool:
        """Call now, or when the work that is running has ended; of several waiting the last one is kept.
        True when it waits.
        """
        with self._lock:
            if self._going:
                self._waiting = call
                return True
        call()
        return False

    def stop(self) -> None:
        """Ask the work to end; it keeps what it has. What was to come next is forgotten."""
        self._waiting = None
        if self._progress is not None and self.running:
            self._progress.stop.set()
            self.halt.disabled = True
            self.note.say("stopping")

    def close(self) -> None:
        """Work that is running is asked to end; what it found is not shown."""
        self.stop()
        super().close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the work, and what was to come after it, to end;
        True when it did within `timeout` seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join(None if until is None else max(until - time.monotonic(), 0))
            if until is not None and time.monotonic() >= until:
                break
        return not self.running

    def now(self, progress: Progress) -> None:
        """Do the work here and now, in this thread (headless)."""
        self._finished(self._work(progress))

    def _go(self, progress: WidgetProgress, work: Callable[[Progress], Any]) -> None:
        began = time.monotonic()
        try:
            value = work(progress)
            if self.comm is None:  # closed meanwhile
                return
            if value is None and self._aside:
                self.note.say("ready")
                return
            self._finished(value)
            if work is not self._work:
                return
            how = "stopped, kept what was there" if progress.partial else "done"
            self.note.say(f"{how} after {time.monotonic() - began:.1f} s")
        except Exception as error:
            self.note.complain(error)
        finally:
            with self._lock:
                self._busy(False)
                self._going = False
                following, self._waiting = self._waiting, None
            if following is not None:
                guarded(self.note, following)()

    def _busy(self, busy: bool) -> None:
        with contextlib.ExitStack() as held:
            for widget in (self.run, self.halt):
                held.enter_context(widget.hold_sync())
            self.run.disabled, self.halt.disabled = busy, not busy
        self.bar.layout.display = "" if busy else "none"
