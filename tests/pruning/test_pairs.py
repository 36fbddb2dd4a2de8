"""Every method with every structural pattern on every architecture: the density that was asked for, or a reason why not."""

from __future__ import annotations

import re

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench import BadInput
from workbench.instruments import Progress
from workbench.pruning import Prune
from workbench.pruning.patterns import DIMENSIONS
from workbench.pruning.presets import NOT_DIMENSIONAL, PRESETS
from workbench.pruning.structures import discover

LEAST = {"gradients": 2, "calibration_examples": 2, "predict_examples": 0, "sparsity": 0.5}
ANYWHERE = {"random", "magnitude", "gradient", "obd", "taylor2", "wanda", "obert", "obert-greedy", "llm-pruner"}
VALID = {
    "channels": ANYWHERE | {"minitron"},
    "layers": ANYWHERE | {"minitron", "deeper-layers"},
    "experts": ANYWHERE | {"heapr", "premoe"},
    "heads": ANYWHERE | {"sparsegpt", "ziplm", "flap", "minitron", "adapt-pruner"},
    "neurons": ANYWHERE | {"sparsegpt", "ziplm", "flap", "minitron", "adapt-pruner", "heapr", "slimmoe"},
}
ONE_CONSUMER, OUTPUT_BIAS = {"sparsegpt", "ziplm"}, {"flap"}


def valid(pattern: str, architecture: str) -> set[str]:
    """The methods that make sense: T5 ties heads of several blocks, and Llama, T5 and Mixtral have no biases to compensate with."""
    if pattern == "experts" and architecture != "mixtral":
        return set()
    methods = VALID[pattern]
    if pattern == "heads" and architecture == "t5":
        methods = methods - ONE_CONSUMER
    return methods - OUTPUT_BIAS if architecture in ("llama", "t5", "mixtral") else methods


def small(architecture: str, checkpoints):
    """Few examples: what is checked are shapes and counts."""
    subject = workbench.subject(checkpoints[architecture], data="random")
    for columns in subject.splits.values():
        for name in columns:
            columns[name] = columns[name][:4]
    return subject


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", list(VALID))
def test_every_pair_is_exact_or_says_why_not(pattern, architecture, checkpoints):
    subject = small(architecture, checkpoints)
    head = subject.model.get_output_embeddings()
    tied = head is not None and head.weight is subject.model.get_input_embeddings().weight
    for method in PRESETS:
        prune = Prune(method=method, pattern=pattern, **LEAST)
        if method not in valid(pattern, architecture):
            with pytest.raises(BadInput) as refused:
                prune.run(subject, Progress(), cache=False)
            assert re.match(r"(method|pattern|saliency|compensation): ", str(refused.value)), refused.value
            continue
        result = prune.run(subject, Progress(), cache=False)
        model = result.subject.model
        assert torch.isfinite(torch.tensor(result.facts["loss"])) and all(bool(torch.isfinite(p).all()) for p in model.parameters())
        if pattern in DIMENSIONS:
            assert result.facts["sparsity"] == 0.5 and result.facts["parameters"] == sum(p.numel() for p in model.parameters())
        else:
            before, after = discover(subject.model, (pattern,)), discover(model, (pattern,))
            share = 1 - sum(g.units * g.experts for g in after) / sum(g.units * g.experts for g in before)
            assert share == pytest.approx(0.5, abs=1e-9 if prune.composition()[2] == "layer" else 0.13)
        if tied:
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_every_method_is_accounted_for():
    named = set().union(*VALID.values())
    assert set(PRESETS) - named == {"movement", "icbs", "pat"}  # collected in training; single weights; trained channels
    assert set(NOT_DIMENSIONAL).isdisjoint(VALID["channels"] | VALID["layers"] | VALID["experts"])
