"""What instruments and their results ask of each other and of the thing they are run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Asked(Protocol):
    """The instrument of a result, as far as the result knows it."""

    @classmethod
    def name(cls) -> str: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...


class OnBench(Protocol):
    """A subject, as far as instruments and results know it:
    it is saved, adopted by the run that made it, and derived again.
    """

    fingerprint: Any

    def save_into(self, folder: Path) -> None: ...

    def adopt(self, parent: Any, instrument: Any, fingerprint: str | None) -> None: ...

    def derived(self, instrument: Any, key: str, make: Callable[[], Any]) -> Any: ...
