"""`prune` block by block, beside a plain implementation by hooks on the whole model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import workbench
from tests.quantization.test_in_sequence import parts_of
from tests.statistics.test_walk import moments_by_hand
from workbench.axis import Options
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.axes import SALIENCY
from workbench.pruning.engine import visited
from workbench.pruning.engine.matrices import Matrices
from workbench.quantization import Quantize

FIELDS = {"calibration_examples": 24, "predict_examples": 0}


class AtOnce(Prune):
    """With all statistics, a second dense model and a private copy of all weights."""

    def engine(self):
        return Matrices(self, self.pattern())

    @property
    def shares_weights(self):
        return False


def run(made, subject):
    return made.run(subject, Progress(), cache=False)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_wanda_is_the_published_procedure(architecture, sequential, checkpoints):
    """A block is pruned by the norms of what the pruned blocks before it give (Sun et al. 2023)."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    result = run(Prune(**FIELDS, method="wanda", sequential=sequential), subject)
    hand = subject.copy()
    layers = {layer.name: layer for layer in hand.layers()}
    every = moments_by_hand(hand, list(layers), 24, 24)
    for names in parts_of(list(layers.values()), False):
        grams = moments_by_hand(hand, names, 24, 24) if sequential else every
        for name in names:
            weight = layers[name].weight.detach()
            scores = weight.abs() * grams[name].diagonal().sqrt()
            lowest = scores.argsort(1)[:, : weight.shape[1] // 2]
            layers[name].write(weight.scatter(1, lowest, 0.0))
    for layer in result.subject.layers():
        assert ((layer.weight == 0) != (layers[layer.name].weight == 0)).float().mean() < 0.01, layer.name
    assert result.facts["loss"] == pytest.approx(hand.evaluate()["loss"], abs=2e-4)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_block_by_block_and_at_once_are_equal_bit_for_bit(architecture, checkpoints, monkeypatch):
    """How much is held at a time, and whether weights are shared, changes no bit of a run on dense inputs."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    fields = FIELDS | {"method": "sparsegpt", "predict_examples": 2, "sequential": False}
    whole = run(AtOnce(**fields), subject)
    monkeypatch.setattr(visited, "KEPT", 0)
    walked = run(Prune(**fields), subject)
    assert walked.facts == whole.facts and walked.table.equals(whole.table)
    for ours, theirs in zip(walked.subject.layers(), whole.subject.layers(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), ours.name


@pytest.mark.parametrize(
    "made",
    [
        Prune(**FIELDS, method="sparsegpt"),
        Prune(**FIELDS, method="magnitude", compensation="bias"),
        Prune(**FIELDS, method="wanda", compensation="least-squares"),
        Quantize(calibration_examples=24, predict_examples=2, test_examples=4, rounding="gptq"),
        Quantize(
            calibration_examples=24, predict_examples=0, test_examples=0, rounding="hqq", format="uint4"
        ),
        Quantize(calibration_examples=24, predict_examples=0, test_examples=0, adapter="loftq"),
    ],
    ids=["sparsegpt", "bias", "least-squares", "gptq", "hqq", "loftq"],
)
def test_the_given_subject_stays_as_it_is(made, checkpoints):
    """Kind: what works on a copy that shares memory writes into the subject it was given. GPT-2's weights lie
    the other way round, so that a layer's columns are views of them.
    """
    subject = workbench.subject(checkpoints["gpt2"], data="random", max_length=12)
    before, fingerprint = copy.deepcopy(subject.model.state_dict()), subject.fingerprint
    result = run(made, subject)
    for layer in result.subject.layers():
        layer.write(layer.weight.detach() * 2)
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert subject.fingerprint == fingerprint != result.subject.fingerprint


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_result_is_nobody_elses(method, checkpoints):
    """Kind: somebody's own training of a result writes into the subject that was pruned."""
    subject = workbench.subject(checkpoints["llama"], data="random", max_length=12)
    before = copy.deepcopy(subject.model.state_dict())
    result = run(Prune(**FIELDS, method=method), subject)
    with torch.no_grad():
        for tensor in (*result.subject.model.parameters(), *result.subject.model.buffers()):
            tensor.zero_()
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Tied(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


def test_a_weight_of_two_modules_stays_one(checkpoints):
    subject = workbench.subject(
        Tied(), data={"inputs": torch.randn(40, 6), "labels": torch.randint(6, (40,))}
    )
    shared = subject.copy(shares=True)
    shared.layers("*")[0].write(torch.zeros(6, 6))
    assert bool((shared.model.two.weight == 0).all()) and not bool((subject.model.one.weight == 0).any())


def test_an_own_entry_gets_a_private_copy_and_no_gradients_of_half_pruned_models(checkpoints):
    """Somebody's saliency may write to what it is given, or ask for what a walk does not have."""
    subject = workbench.subject(checkpoints["llama"], data="random", max_length=12)
    before = copy.deepcopy(subject.model.state_dict())

    @SALIENCY.add("writes", formula="|w|", source="a test")
    def writes(layer, calibration, pattern, options: Options):
        return layer.weight.detach().abs_()

    @SALIENCY.add("asks", formula="|g|", source="a test", needs="inputs")
    def asks(layer, calibration, pattern, options: Options):
        return calibration.factors(layer, options).mean()

    try:
        run(Prune(**FIELDS, method="magnitude", saliency="writes"), subject)
        for name, value in subject.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        with pytest.raises(BadInput, match="needs='gradients'"):
            run(Prune(**FIELDS, method="magnitude", saliency="asks"), subject)
    finally:
        for name in ("writes", "asks"):
            del SALIENCY._entries[name]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "magnitude"}, True),
        ({"method": "obert"}, True),
        ({"method": "wanda", "recovery": "finetune", "recovery_steps": 2}, True),
        ({"method": "wanda"}, False),
        ({"method": "random", "compensation": "obs"}, False),
    ],
)
def test_sequential_says_where_it_has_no_effect(fields, told):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Prune(**fields, sequential=True).check(workbench.subject("digits-vit"))
    assert any("sequential: has no effect" in str(w.message) for w in said) == told
