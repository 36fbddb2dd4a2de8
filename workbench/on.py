"""What results ask of the instrument they come from, which is above them."""

from __future__ import annotations

from typing import Any, Protocol


class Asked(Protocol):
    """The instrument of a result, as far as the result and what draws it know it."""

    @classmethod
    def name(cls) -> str: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...

    def run(self, on: Any, progress: Any = None, cache: bool = True) -> Any: ...
