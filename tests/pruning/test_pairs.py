"""Every method with every structural pattern on every architecture:
the density that was asked for, or a reason why not.
"""

from __future__ import annotations

import re

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.axes import DIMENSIONS, PRUNING_METHOD
from workbench.pruning.engine.structures import EXPERT_STEP
from workbench.pruning.pattern import parse
from workbench.subjects import all_layers
from workbench.subjects.structure.units import discover

LEAST = {"calibration_examples": 2, "predict_examples": 0, "sparsity": 0.5}
ANYWHERE = {
    "random",
    "magnitude",
    "gradient",
    "obd",
    "taylor2",
    "wanda",
    "obert",
    "obert-greedy",
    "llm-pruner",
}
VALID = {
    "channels": ANYWHERE | {"minitron"},
    "layers": ANYWHERE | {"minitron", "deeper-layers"},
    "experts": ANYWHERE | {"heapr", "premoe"},
    "heads": ANYWHERE | {"sparsegpt", "ziplm", "flap", "minitron", "adapt-pruner"},
    "neurons": ANYWHERE | {"sparsegpt", "ziplm", "flap", "minitron", "adapt-pruner", "heapr", "slimmoe"},
    "heads+neurons": ANYWHERE | {"sparsegpt", "ziplm", "flap", "minitron", "adapt-pruner"},
}
ONE_CONSUMER, OUTPUT_BIAS = {"sparsegpt", "ziplm"}, {"flap"}


def valid(pattern: str, architecture: str) -> set[str]:
    """The methods that make sense: T5 ties heads of several blocks, and T5
    and Mixtral have no place for the biases that compensate.
    """
    if pattern == "experts" and architecture != "mixtral":
        return set()
    methods = VALID[pattern]
    if "heads" in pattern and architecture == "t5":
        methods = methods - ONE_CONSUMER
    return methods - OUTPUT_BIAS if architecture in ("t5", "mixtral") else methods


def small(architecture: str, checkpoints):
    """Few examples: what is checked are shapes and counts."""
    subject = workbench.subject(checkpoints[architecture], data="random")
    for columns in subject.splits.values():
        for name in columns:
            columns[name] = columns[name][:4]
    return subject


def pruned(subject, pattern, accepted, **fields):
    """(method, instrument, result) of every method in `accepted`,
    with finite weights and tied weights still tied; the others say why not.
    """
    head = subject.model.get_output_embeddings()
    tied = head is not None and head.weight is subject.model.get_input_embeddings().weight
    for method in PRUNING_METHOD:
        prune = Prune(**{"method": method, "pattern": pattern} | LEAST | fields).with_gradients(2)
        if method not in accepted:
            with pytest.raises(BadInput) as refused:
                prune.run(subject, Progress(), cache=False)
            assert re.match(
                r"(method|pattern|saliency|compensation|sparsity_schedule): ", str(refused.value)
            ), refused.value
            continue
        result = prune.run(subject, Progress(), cache=False)
        model = result.subject.model
        assert torch.isfinite(torch.tensor(result.facts["loss"])) and all(
            bool(torch.isfinite(p).all()) for p in model.parameters()
        )
        if tied:
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        yield method, prune, result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", list(VALID))
def test_every_pair_is_exact_or_says_why_not(pattern, architecture, checkpoints):
    subject = small(architecture, checkpoints)
    for _, prune, result in pruned(subject, pattern, valid(pattern, architecture)):
        model = result.subject.model
        if pattern in DIMENSIONS:
            assert result.facts["sparsity"] == 0.5 and result.facts["parameters"] == sum(
                p.numel() for p in model.parameters()
            )
        else:
            before = discover(subject.model, parse(pattern).kinds)
            names = {member.layer.name for group in before for member in group.members}
            weights, left = (
                sum(layer.original.numel() for layer in all_layers(m) if layer.name in names)
                for m in (subject.model, model)
            )
            step = [g.experts * g.weights_per_unit() * (EXPERT_STEP if g.experts > 1 else 1) for g in before]
            # One threshold over all groups is off by half of the largest unit at most,
            # shares of blocks by half a unit each.
            allowed = {"layer": 0.0, "global": max(step) / 2, "adaptive": sum(step) / 2}[prune.allocation]
            assert weights - left == pytest.approx(weights / 2, abs=allowed)


def test_every_method_is_accounted_for():
    named = set().union(*VALID.values())
    assert set(PRUNING_METHOD) - named == {"icbs", "pat"}  # single weights; trained channels
    assert set(PRUNING_METHOD.with_trait("not dimensions")).isdisjoint(
        VALID["channels"] | VALID["layers"] | VALID["experts"]
    )
