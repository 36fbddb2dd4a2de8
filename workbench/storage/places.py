"""Where things are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from workbench.errors import notice


def cache_folder() -> Path:
    """Where fine-tuned subjects and finished results are kept;
    `WORKBENCH_CACHE` overrides the per-user default.
    """
    folder = os.environ.get("WORKBENCH_CACHE") or platformdirs.user_cache_dir("model-workbench")
    return Path(folder)


def data_folder() -> Path:
    """The project's data: `data/` of a source checkout, or the copy that an installed wheel carries."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_data"
    return installed if installed.is_dir() else package.parent / "data"


def evidence_folders() -> tuple[Path, Path]:
    """Where evidence is read: what this user measured, then what the project ships;
    `WORKBENCH_EVIDENCE` overrides the first.
    """
    own = (
        os.environ.get("WORKBENCH_EVIDENCE")
        or Path(platformdirs.user_data_dir("model-workbench")) / "evidence"
    )
    return Path(own), data_folder() / "evidence"


def evidence_record(family: str, name: str) -> dict[str, Any] | None:
    """The stored measurement of a method, or None. A file that is damaged is named and counts for nothing."""
    for folder in evidence_folders():
        file = folder / family / f"{name}.json"
        if file.exists():
            try:
                return measured(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, RecursionError) as error:
                notice(
                    f"evidence: {str(file)!r} cannot be read ({error}) and counts for nothing; "
                    "delete it or measure again"
                )
    return None


def measured_methods() -> set[tuple[str, str]]:
    """(family, name) of every method of which a measurement is stored."""
    return {
        (file.parent.name, file.stem)
        for folder in evidence_folders()
        for file in folder.glob("*/*.json")
        if file.parent.name != "identity"  # numbers beside others' code: no measurement of an effect
    }


def measured(record: Any) -> dict[str, Any]:
    """A record with the fields that a verdict needs; `ValueError` for anything else."""
    if not isinstance(record, dict):
        raise ValueError(f"it holds {type(record).__name__}, a record is an object")
    if not isinstance(record.get("holds"), (bool, type(None))):
        raise ValueError(f"holds is {str(record['holds'])[:60]!r}, neither true, false nor null")
    return record


#: What can be said of a claim after looking at its measurement.
VERDICTS = ("holds", "does not hold", "cannot be shown here", "not measured")


def verdict(record: Mapping[str, Any] | None) -> str:
    """One of `VERDICTS`. A record cannot show its claim where its `holds` is null,
    or where the gate that says so of its subject was not passed (`gate: {passed: false}`).
    """
    if record is None:
        return "not measured"
    gate = record.get("gate")
    if record.get("holds") is None or (isinstance(gate, Mapping) and gate.get("passed") is False):
        return "cannot be shown here"
    return "holds" if record["holds"] else "does not hold"


def evidence_target() -> Path:
    """Where evidence is written: the project's folder in a source checkout that may be written to,
    else the user's own.
    """
    own, shipped = evidence_folders()
    checkout = (data_folder().parent / "pyproject.toml").is_file()
    return shipped if checkout and os.access(data_folder(), os.W_OK) else own
