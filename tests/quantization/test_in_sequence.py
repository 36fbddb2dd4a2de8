"""`quantize` block by block, beside a plain implementation by hooks on the whole model."""

from __future__ import annotations

import copy

import pytest
import torch

import workbench
from tests.statistics.test_walk import moments_by_hand
from workbench.quantization import Quantize, rounding_order
from workbench.quantization.number.grid import fit

GPTQ = {
    "rounding": "gptq",
    "format": "int3",
    "granularity": "channel",
    "calibration_examples": 24,
    "predict_examples": 4,
    "test_examples": 8,
}


def gptq_by_hand(weight: torch.Tensor, gram: torch.Tensor, format: object) -> torch.Tensor:
    """Algorithm 1 of Frantar et al. 2023, column by column, in double precision."""
    grid = fit(weight, format, "channel", 64, "auto", None)
    work, hessian = weight.double().clone(), gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rounded = torch.empty_like(work)
    for i in range(work.shape[1]):
        step = grid.scale[:, 0].double()
        rounded[:, i] = format.element.round((work[:, i] / step).float()).double() * step
        error = (work[:, i] - rounded[:, i]) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return rounded


def parts_of(layers, within):
    """Names of layers that are calibrated together, block after block."""
    for block in range(2):
        names = [layer.name for layer in layers if f".{block}." in layer.name]
        if not within:
            yield names
            continue
        for part in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            yield [name for name in names if name.endswith(part)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_gptq_is_the_published_procedure(architecture, sequential, checkpoints, cache):
    """A block is calibrated on what the quantized ones before it give, and its dense weights are rounded."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    settings = Quantize(**GPTQ, sequential=sequential)
    result = settings.run(subject)
    hand = subject.copy()
    layers = {layer.name: layer for layer in hand.layers()}
    every = moments_by_hand(hand, list(layers), 24, 24)
    for names in parts_of(list(layers.values()), False):
        grams = moments_by_hand(hand, names, 24, 24) if sequential else every
        for name in names:
            layers[name].write(gptq_by_hand(layers[name].weight, grams[name], settings.format_for(name)))
    for layer in result.subject.layers():
        ours, theirs = layer.weight.detach(), layers[layer.name].weight.detach()
        assert (ours - theirs).abs().gt(1e-4).float().mean() < 0.01, layer.name
    assert result.facts["loss"] == pytest.approx(hand.evaluate("test", limit=8)["loss"], abs=2e-3)


def test_inside_a_block_too(checkpoints, cache):
    """`within`: layers that read what the block's own quantized layers give are calibrated on that."""
    subject = workbench.subject(checkpoints["llama"], data="random", max_length=12)
    settings = Quantize(**GPTQ, sequential=True, within=True)
    result = settings.run(subject)
    hand = subject.copy()
    layers = {layer.name: layer for layer in hand.layers()}
    for names in parts_of(list(layers.values()), True):
        grams = moments_by_hand(hand, names, 24, 24)
        for name in names:
            layers[name].write(gptq_by_hand(layers[name].weight, grams[name], settings.format_for(name)))
    for layer in result.subject.layers():
        ours, theirs = layer.weight.detach(), layers[layer.name].weight.detach()
        assert (ours - theirs).abs().gt(1e-4).float().mean() < 0.01, layer.name


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_block_by_block_and_at_once_are_equal_bit_for_bit(architecture, checkpoints, cache, monkeypatch):
    """How much is held at a time changes no bit of a run on dense inputs."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    settings = Quantize(**GPTQ, sequential=False)
    whole = settings.run(subject, cache=False)
    monkeypatch.setattr(rounding_order, "KEPT", 0)
    walked = settings.run(subject, cache=False)
    assert walked.facts == whole.facts
    assert walked.table.set_index("layer").sort_index().equals(whole.table.set_index("layer").sort_index())
    for ours, theirs in zip(walked.subject.layers(), whole.subject.layers(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), ours.name


def test_the_subject_is_left_alone_and_the_prediction_is_at_the_dense_weights(checkpoints, cache):
    """What is predicted after the walk is predicted for the dense model."""
    subject = workbench.subject(checkpoints["llama"], data="random", max_length=12)
    dense = copy.deepcopy(subject.model.state_dict())
    result = Quantize(**(GPTQ | {"format": "int8"}), sequential=True).run(subject)
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, dense[name])
    assert result.facts["predicted_change"] == pytest.approx(result.facts["measured_change"], abs=2e-5)
