"""A cache of its own for each test, and a checkpoint at every step and at the end of every part."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WORKBENCH_CHECKPOINT_SECONDS", "0")
    monkeypatch.setattr("workbench.training.loop.RARELY", 0.0)
    return tmp_path / "cache"
