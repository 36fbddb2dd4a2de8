"""An expert that no calibration token reaches is named, and what is done with it is what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.statistics import second_moments
from workbench.subjects import Subject

STARVED = 2
GRID = {"format": "int4", "granularity": "group", "group_size": 16, "calibration_examples": 8}


class Listening(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def starved(checkpoints: dict[str, Path]) -> Subject:
    """A mixture whose router never chooses one expert of the first block."""
    on = workbench.subject(checkpoints["mixtral"], data="random")
    model: Any = on.model
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0  # a feature that every token has
        for block in model.model.layers:
            block.mlp.gate.weight[:, 0] = 0.0
        gate = model.model.layers[0].mlp.gate
        gate.weight[STARVED] = 0.0
        gate.weight[STARVED, 0] = -100.0
    return on


def first_experts(on: Subject) -> Any:
    return next(layer for layer in on.layers("blocks") if len(layer.shape) == 3)


def test_gptq_rounds_it_to_the_nearest_and_says_so(starved: Subject) -> None:
    said = Listening()
    result = Quantize(**GRID, rounding="gptq").run(starved, said, cache=False)
    layer = first_experts(starved)
    assert f"{layer.name}: {STARVED}" in result.facts["unseen_experts"]
    assert "layers.1" not in result.facts["unseen_experts"]
    assert any(f"{layer.name}: {STARVED}" in line and "no calibration token" in line for line in said.said)
    table = result.tables["experts"].set_index(["layer", "expert"])
    assert table.loc[(layer.name, STARVED), "tokens"] == 0
    assert table.groupby("layer")["share"].sum().tolist() == pytest.approx([1.0] * table.index.levshape[0])
    nearest = Quantize(**GRID, rounding="nearest").run(starved, Progress(), cache=False)
    found, expected = (first_experts(r.subject).weight for r in (result, nearest))
    assert torch.equal(found[STARVED], expected[STARVED])
    assert not torch.equal(found[STARVED - 1], expected[STARVED - 1])


def test_wanda_prunes_it_by_what_the_other_experts_read(starved: Subject) -> None:
    """Scores that are all zero leave the choice to the order of the weights, and nobody is told."""
    layer = first_experts(starved)
    moments = second_moments(starved, [layer], "calibration", 8)[layer.name]
    assert moments.tokens[STARVED] == 0
    norm = (moments.square.sum(0) / moments.tokens.sum()).sqrt()
    scores = layer.weight.detach()[STARVED].abs() * norm
    said = Listening()
    made = Prune(method="wanda", sparsity=0.5, calibration_examples=8, sequential=False, predict_examples=0)
    result = made.run(starved, said, cache=False)
    kept = first_experts(result.subject).weight.detach()[STARVED] != 0
    half = scores.shape[1] // 2
    assert kept.sum(1).eq(half).all()
    assert torch.where(kept, scores, torch.inf).amin(1).ge(torch.where(kept, 0.0, scores).amax(1)).all()
    assert f"{layer.name}: {STARVED}" in result.facts["unseen_experts"] and said.said


def test_nothing_is_said_where_every_expert_is_reached(checkpoints: dict[str, Path]) -> None:
    said = Listening()
    on = workbench.subject(checkpoints["mixtral"], data="random")
    result = Quantize(**GRID, rounding="gptq").run(on, said, cache=False)
    assert "unseen_experts" not in result.facts and not said.said
    assert (result.tables["experts"]["tokens"] > 0).all()
    plain = Quantize(**GRID).run(workbench.subject(checkpoints["llama"], data="random"), cache=False)
    assert "experts" not in plain.tables
