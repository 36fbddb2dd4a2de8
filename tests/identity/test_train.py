"""Pairs of training and curvature that need nobody's code: second derivations in float64."""

from __future__ import annotations

import pytest

from tests.identity import batch_sizes, layer_optimizers, schedules, spectra
from tests.identity.pairs import PAIRS, Pair, measured

MODULES = {module.__name__ for module in (batch_sizes, layer_optimizers, schedules, spectra)}
DERIVED = [p for p in PAIRS if p.kind == "second derivation in fp64" and p.run.__module__ in MODULES]


@pytest.mark.parametrize("pair", DERIVED, ids=lambda pair: pair.run.__name__)
def test_equals_its_second_derivation(pair: Pair) -> None:
    record = measured(pair, "")
    assert record["equal"], (record["theirs"], record["ours"], record["difference"])
