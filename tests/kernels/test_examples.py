"""The examples in the docstrings run and say what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "workbench" / "kernels"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    loaded = importlib.import_module(f"workbench.kernels.{module}")
    # A module that shares its name with its function would be hidden by it, were it not imported by path.
    result = doctest.testmod(
        loaded, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted > 0
    assert result.failed == 0
