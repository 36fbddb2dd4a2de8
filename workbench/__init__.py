"""A bench for people who train and compress transformers:
one subject, many instruments, every number beside its prediction.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workbench.version import __version__

if TYPE_CHECKING:
    from workbench.errors import BadInput
    from workbench.instruments import Instrument
    from workbench.names import Method, catalog, method, methods
    from workbench.progress import Progress
    from workbench.results import Result
    from workbench.subjects.loaders import subject
    from workbench.subjects.subject import Subject

#: name -> the module that defines it, imported when the name is first used: torch alone takes seconds
_HOMES = {
    "BadInput": "workbench.errors",
    "Instrument": "workbench.instruments",
    "Method": "workbench.names",
    "Progress": "workbench.progress",
    "Result": "workbench.results",
    "Subject": "workbench.subjects",
    "catalog": "workbench.names",
    "method": "workbench.names",
    "methods": "workbench.names",
    "subject": "workbench.subjects",
}

__all__ = [
    "BadInput",
    "Instrument",
    "Method",
    "Progress",
    "Result",
    "Subject",
    "__version__",
    "catalog",
    "method",
    "methods",
    "subject",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
