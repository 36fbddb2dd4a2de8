"""Equations of quantization derived a second time: each pair once more, as the stored records say."""

from __future__ import annotations

import importlib

import pytest

from tests.identity.pairs import PAIRS, Pair, measured

MODULES = (
    "block_types",
    "courses",
    "learned_roundings",
    "quantized_attention",
    "quantized_training_derived",
    "quantizers",
    "reconstruction",
    "transforms",
    "width_solvers",
    "widths",
)
HERE = {importlib.import_module(f"tests.identity.{name}").__name__ for name in MODULES}
DERIVED = [pair for pair in PAIRS if pair.kind == "second derivation in fp64" and pair.run.__module__ in HERE]


@pytest.mark.parametrize("pair", DERIVED, ids=lambda pair: pair.run.__name__)
def test_a_second_derivation_agrees(pair: Pair) -> None:
    record = measured(pair, pair.version)
    assert record["equal"], (record["difference"], record["theirs"], record["ours"])
