"""Pairs whose other side is written out here, in float64: they need nothing that is not installed."""

from __future__ import annotations

import dataclasses

import pytest
from torch import Tensor

from tests.identity.pairs import Draw, Pair, every_pair, measured
from workbench.storage.identity import FP64

DERIVED = [pair for pair in every_pair() if pair.kind == FP64]


@pytest.mark.parametrize("pair", DERIVED, ids=lambda pair: f"{pair.methods[0]}-{pair.run.__name__}")
def test_a_second_derivation_agrees(pair: Pair) -> None:
    record = measured(pair, pair.version)
    assert record["equal"], (record["difference"], record["theirs"], record["ours"])


def test_two_numbers_that_differ_are_told() -> None:
    """The kind: a pair of which one side is off by more than is allowed."""
    pair = DERIVED[0]

    def off(draw: Draw) -> tuple[Tensor, Tensor]:
        theirs, ours = pair.run(draw)
        return theirs, ours + 2 * pair.tolerance

    assert not measured(dataclasses.replace(pair, run=off), "")["equal"]
