"""Instruments give what they gave when `runs.json` was recorded (see `record.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recorded.record import RECORDED, machine, read, recorded


def entries() -> list[Any]:
    return [
        pytest.param(entry, id=name, marks=() if entry.get("quick") else pytest.mark.long)
        for name, entry in read().items()
    ]


def differences(was: Any, now: Any, path: str) -> list[str]:
    """Where two recordings differ: floats by more than 1e-6, relative or absolute; anything else at all."""
    if isinstance(was, dict) and isinstance(now, dict):
        missing = [f"{path}.{key}: only before" for key in was if key not in now]
        added = [f"{path}.{key}: only now" for key in now if key not in was]
        both = [d for key in was if key in now for d in differences(was[key], now[key], f"{path}.{key}")]
        return missing + added + both
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return [
            d
            for i, (a, b) in enumerate(zip(was, now, strict=True))
            for d in differences(a, b, f"{path}[{i}]")
        ]
    if isinstance(was, float) and isinstance(now, float):
        same = now == pytest.approx(was, rel=1e-6, abs=1e-6)
    else:
        same = type(was) is type(now) and was == now
    return [] if same else [f"{path}: {was!r} before, {now!r} now"]


@pytest.mark.parametrize("entry", entries())
def test_the_run_gives_what_was_recorded(
    entry: dict[str, Any], cache: Path, checkpoints: dict[str, Path]
) -> None:
    if entry["machine"] != machine():
        pytest.skip(
            f"recorded with {entry['machine']}; this is {machine()}, "
            "and last digits of floats differ between them"
        )
    now = recorded(entry, checkpoints)
    was = {key: entry[key] for key in RECORDED if key in entry}
    assert differences(was, now, entry["name"]) == []


def test_names_are_unique_and_every_entry_is_recorded() -> None:
    import json

    from tests.recorded.record import RUNS

    names = [entry["name"] for entry in json.loads(RUNS.read_text())]
    assert len(names) == len(set(names))
    assert [name for name, entry in read().items() if "facts" not in entry] == []
