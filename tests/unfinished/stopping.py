"""Progress that asks to stop at a chosen moment."""

from __future__ import annotations

from workbench.progress import Progress


class Stopped(Progress):
    """Asks to stop when the progress of anything whose label begins so has moved for the n-th time."""

    def __init__(self, label: str, moves: int) -> None:
        super().__init__()
        self.label, self.left, self.said = label, moves, list[str]()

    def show(self, label: str, done: int, total: int | None) -> None:
        if done and label.startswith(self.label):
            self.left -= 1
            if self.left == 0:
                self.stop.set()

    def say(self, text: str) -> None:
        self.said.append(text)
