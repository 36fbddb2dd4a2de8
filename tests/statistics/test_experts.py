"""An expert that no calibration token reaches is named, and what is done with it is what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import workbench
from workbench.measures import compare
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.rounding.nearest import rounded
from workbench.quantization.rounding.problem import Problem
from workbench.statistics import ExpertsSeen, second_moments
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


def own_errors(layer: Any, changed: Any, moments: Any) -> tuple[float, float]:
    """(of the starved expert on all tokens of the layer, mean of the others on their own)"""
    gram = moments.gram.double()
    before, after = (each.weight.detach().double() for each in (layer, changed))

    def share(expert: int, by: torch.Tensor) -> float:
        delta = after[expert] - before[expert]
        lost, whole = (torch.einsum("oi,ij,oj->", w, by, w) for w in (delta, before[expert]))
        return float(lost / whole)

    others = [e for e in range(len(before)) if e != STARVED]
    return share(STARVED, gram.sum(0)), sum(share(e, gram[e]) for e in others) / len(others)


@pytest.mark.parametrize(
    ("made", "rival"),
    [
        (Quantize(**GRID, rounding="gptq", sequential=False, predict_examples=0), "rounded on all tokens"),
        (
            Prune(method="wanda", calibration_examples=8, sequential=False, predict_examples=0),
            "pruned by magnitude",
        ),
    ],
)
def test_what_the_fallback_costs_is_measured(starved: Subject, made: Any, rival: str) -> None:
    """Kind: that something else was done is said, and not what it costs."""
    said = Listening()
    result = made.run(starved, said, cache=False)
    layer = first_experts(starved)
    moments = second_moments(starved, [layer], "calibration", 8)[layer.name]
    table = result.tables["unseen_experts"].set_index("layer")
    row = table.loc[layer.name]
    mine, others = own_errors(layer, first_experts(result.subject), moments)
    assert row["expert"] == STARVED and row["rival"].startswith(rival)
    assert row["output_error"] == pytest.approx(mine, rel=1e-4)
    assert row["reached_error"] == pytest.approx(others, rel=1e-4)
    for name in ("output_error", "rival_error", "reached_error"):
        assert result.facts[f"unseen_{name}"] == pytest.approx(table[name].mean())
    better = min if made.name() == "prune" else max
    assert better(row["output_error"], row["rival_error"]) == row["output_error"]
    assert result.facts["unseen_kl"] == 0.0, "no token of the test reaches it either"
    assert any(rival in line for line in said.said)


def test_the_other_treatment_is_the_method_on_the_tokens_of_all(starved: Subject) -> None:
    result = Quantize(**GRID, rounding="gptq", sequential=False, predict_examples=0).run(
        starved, Listening(), cache=False
    )
    layer = first_experts(starved)
    moments = second_moments(starved, [layer], "calibration", 8)[layer.name]
    assert moments.gram is not None
    pooled = moments.gram.sum(0)
    problem = Problem(layer.weight.detach()[STARVED], pooled, NUMBER_FORMAT.chosen("int4")(), "group", 16)
    values, _ = rounded(problem, "gptq")
    delta = (values - problem.weight).double()
    lost, whole = (
        torch.einsum("oi,ij,oj->", w, pooled.double(), w) for w in (delta, problem.weight.double())
    )
    row = result.tables["unseen_experts"].set_index("layer").loc[layer.name]
    assert row["rival_error"] == pytest.approx(float(lost / whole), rel=1e-4)


def test_an_expert_that_only_the_test_reaches_makes_a_part_of_the_distance(
    checkpoints: dict[str, Path],
) -> None:
    """A further example: starved of calibration tokens alone, so the guess decides what the test sees."""
    on = workbench.subject(checkpoints["mixtral"], data="random")
    model: Any = on.model
    half = model.config.vocab_size // 2
    with torch.no_grad():
        model.model.embed_tokens.weight[:half, 0] = 5.0
        model.model.embed_tokens.weight[half:, 0] = -5.0
        for block in model.model.layers:
            block.mlp.gate.weight[:, 0] = 0.0
        experts = first_experts(on).module
        for weight in experts.parameters():
            weight *= 20.0
        model.lm_head.weight *= 20.0
        gate = model.model.layers[0].mlp.gate
        gate.weight[STARVED] = 0.0
        gate.weight[STARVED, 0] = -100.0
    few = {
        name: value % half if name != "attention_mask" else value
        for name, value in on.split("calibration").items()
    }
    on = on.with_split("calibration", few)
    result = Quantize(**GRID, rounding="gptq", predict_examples=0).run(on, Listening(), cache=False)
    assert f"{first_experts(on).name}: {STARVED}" in result.facts["unseen_experts"]
    assert 0 < result.facts["unseen_kl"] < result.facts["kl"]
    back = on.copy()
    for layer, changed in zip(back.layers("blocks"), result.subject.layers("blocks"), strict=True):
        weight = changed.weight.detach().clone()
        if weight.ndim == 3 and ".0." in layer.name:
            weight[STARVED] = layer.weight.detach()[STARVED]
        layer.write(weight)
    left = compare(on, back).measures()["kl"]
    assert result.facts["unseen_kl"] == pytest.approx(result.facts["kl"] - left, rel=1e-3)


def test_an_interrupted_run_goes_on_with_what_it_had_found(starved: Subject) -> None:
    """Kind: what a walk has noted of a block holds less than what is reported of it."""
    layers = [layer for layer in starved.layers("blocks") if len(layer.shape) == 3]
    whole, rest = ExpertsSeen(), ExpertsSeen()
    found = second_moments(starved, layers, "calibration", 8)
    for layer in layers:
        weight = layer.weight.detach()
        whole.add(layer.name, found[layer.name])
        whole.measure(layer.name, found[layer.name], weight, weight * 0.9, "left alone", lambda e: None)
    for layer in layers:
        rest.take(json.loads(json.dumps(whole.record([layer]))))
    assert [row["output_error"] for row in whole.errors] == pytest.approx([0.01] * 2)
    for name, table in whole.tables().items():
        pd.testing.assert_frame_equal(rest.tables()[name], table)
    assert rest.facts(Progress(), "cut") == whole.facts(Progress(), "cut")
    assert "unseen_rival_error" not in rest.facts(Progress(), "cut")


def test_nothing_is_said_where_every_expert_is_reached(checkpoints: dict[str, Path]) -> None:
    said = Listening()
    on = workbench.subject(checkpoints["mixtral"], data="random")
    result = Quantize(**GRID, rounding="gptq").run(on, said, cache=False)
    assert "unseen_experts" not in result.facts and not said.said
    assert (result.tables["experts"]["tokens"] > 0).all()
    plain = Quantize(**GRID).run(workbench.subject(checkpoints["llama"], data="random"), cache=False)
    assert "experts" not in plain.tables
