"""A method's measurement by its name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from workbench.code_version import NOT_COMPUTING, closure, digest
from workbench.errors import BadInput
from workbench.names import methods
from workbench.progress import Progress

EVIDENCE = "workbench.evidence"


def measurable(name: str) -> bool:
    """True when the method called `name` has a measurement to run."""
    return name in importlib.import_module(f"{EVIDENCE}.{methods()[name].family}").MEASURES


def measure(name: str, progress: Progress) -> dict[str, Any]:
    """Measure a method's claim: a record with at least `holds` and a `note`."""
    if not measurable(name):
        raise BadInput(f"method: {name} has no measurement to run; choose one that has, or leave it out")
    measures = importlib.import_module(f"{EVIDENCE}.{methods()[name].family}").MEASURES
    record: dict[str, Any] = measures[name](name, progress)
    return record


def code(name: str) -> str:
    """Hash of the files that the measurements of this method's family reach:
    their own, and those of what they measure.
    """
    family = methods()[name].family
    files = (Path(__file__).parent / family).glob("*.py")
    return digest(
        closure(
            [f"{EVIDENCE}.{family}.{file.stem}" for file in files if file.stem != "__init__"],
            left_out=set(NOT_COMPUTING) - {"evidence"},
        )
    )
