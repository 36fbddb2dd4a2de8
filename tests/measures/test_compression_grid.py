"""What a report measures follows from the model's size, and from what somebody chose."""

from __future__ import annotations

from typing import Any

import pytest

import workbench
from workbench.measures.compression import grid as compression_grid
from workbench.measures.compression.grid import grid_for


def test_a_small_model_gets_every_width_and_a_large_one_few_runs_on_few_examples(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: a default that a real model's memory does not hold."""
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    small = grid_for(on)
    assert small.on is on and small.test_examples == on.size("test")
    assert list(small.methods) == ["magnitude", "Wanda", "oBERT"] and small.predict_examples
    monkeypatch.setattr(compression_grid, "LARGE", 1000)
    large = grid_for(on)
    assert list(large.methods) == ["magnitude", "Wanda", "SparseGPT"] and not large.predict_examples
    assert large.sparsities == [0.5] and large.bits == [3, 4] and not large.combined
    assert large.on.size("test") == large.test_examples == min(32, on.size("test"))
    assert on.layers(large.curvature_layers) == [
        layer for layer in on.layers() if layer.name.startswith("model.layers.1.")
    ]


def test_what_is_chosen_stands(checkpoints: Any) -> None:
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    found = grid_for(on, bits=[5], sparsities=[], test_examples=4, gradients=0)
    assert found.bits == [5] and found.sparsities == grid_for(on).sparsities and found.gradients == 128
    assert found.on.size("test") == 4 and on.size("test") > 4
    assert "5 bits" in found._repr_html_() and "4 examples" in found._repr_html_()
