"""The walk over blocks gives what the whole model gives, and carries on from changed blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench
from tests.conftest import ARCHITECTURES
from workbench.statistics import Walk, second_moments


def moments_by_hand(subject, names, examples, batch_size):
    """name -> sum of x^T x over the unpadded tokens of a plain linear's inputs, by forward hooks."""
    found: dict[str, torch.Tensor] = {}
    masks: list[torch.Tensor | None] = [None]

    def hook(name):
        def see(module, args):
            rows, mask = args[0].detach(), masks[0]
            if mask is not None and rows.shape[:2] == mask.shape:
                rows = rows[mask]
            rows = rows.reshape(-1, rows.shape[-1])
            found[name] = found.get(name, 0) + rows.T @ rows

        return see

    modules = dict(subject.model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in subject.batches("calibration", batch_size, examples):
            mask = batch.get("attention_mask")
            masks[0] = None if mask is None else mask.bool()
            subject.task.output(subject.model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layers", ["blocks", "*", "*.1.*"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_inputs_are_those_of_the_whole_model_bit_for_bit(architecture, layers, checkpoints):
    """A visit collects what a pass over the whole model collects, for layers outside the blocks too."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    chosen = subject.layers(layers)
    wanted = second_moments(subject, chosen, examples=7, batch_size=3)
    seen = []
    for visit in Walk(subject, chosen, examples=7, batch_size=3, sequential=False):
        for layer in visit.layers:
            layer.write(torch.zeros(layer.shape))  # a change that the dense walk must not see
            for name in ("gram", "square", "total", "tokens"):
                found, whole = getattr(visit.moments[layer.name], name), getattr(wanted[layer.name], name)
                assert torch.equal(found, whole), (layer.name, name)
            seen.append(layer.name)
    assert sorted(seen) == sorted(layer.name for layer in chosen)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "vit"])
def test_inputs_in_sequence_are_those_of_the_model_as_changed_so_far(architecture, within, checkpoints):
    """By hooks on the whole model, run anew at every visit."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    visits = 0
    chosen = subject.layers()
    blocks = [name for name, _ in subject.blocks()]
    for visit in Walk(subject, chosen, examples=7, batch_size=3, within=within):
        by_hand = moments_by_hand(subject, [layer.name for layer in visit.layers], 7, 7)
        for layer in visit.layers:
            gram = visit.moments[layer.name].gram
            torch.testing.assert_close(gram[0], by_hand[layer.name], rtol=2e-4, atol=2e-3)
            layer.write(layer.weight * 0.5)
        visits += 1
    assert visits == (8 if within else 2) and len(blocks) == 2


@pytest.mark.parametrize("architecture", ["t5", "mixtral"])
def test_encoders_decoders_and_experts_in_sequence(architecture, checkpoints):
    """Every layer is visited once, and reads what the whole model with the changes so far gives it."""
    subject = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    chosen = subject.layers()
    seen = []
    for visit in Walk(subject, chosen, examples=7, batch_size=3):
        wanted = second_moments(subject, visit.layers, examples=7, batch_size=3)
        for layer in visit.layers:
            assert torch.equal(visit.moments[layer.name].gram, wanted[layer.name].gram), layer.name
        for layer in visit.layers:
            layer.write(layer.weight * 0.5)
            seen.append(layer.name)
    assert sorted(seen) == sorted(layer.name for layer in chosen)


class Skips(nn.Module):
    """Blocks of which the last reads what the first gave."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first) + first)


class Twice(nn.Module):
    """One block that is called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh())])

    def forward(self, x):
        return self.blocks[0](self.blocks[0](x))


class Writes(nn.Module):
    """Blocks that write to their inputs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x.add_(self.linear(x))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("model", "visits"), [(Skips, 1), (Twice, 1), (Writes, 3)])
def test_what_is_no_chain_of_blocks_is_one_block(model, visits):
    """An architecture that the blocks' order does not describe gets right numbers, not wrong ones."""
    splits = {
        name: {"inputs": torch.randn(8, 4), "labels": torch.randint(4, (8,))}
        for name in ("train", "calibration", "validation", "test")
    }
    subject = workbench.subject(model(), data=splits)
    chosen = subject.layers()
    wanted = second_moments(subject, chosen, examples=8, batch_size=3)
    found = list(Walk(subject, chosen, examples=8, batch_size=3, sequential=False))
    assert len(found) == visits
    for visit in found:
        for layer in visit.layers:
            assert torch.equal(visit.moments[layer.name].gram, wanted[layer.name].gram)
    found = []
    for visit in Walk(subject, chosen, examples=8, batch_size=3):
        now = second_moments(subject, visit.layers, examples=8, batch_size=3)
        for layer in visit.layers:
            assert torch.equal(visit.moments[layer.name].gram, now[layer.name].gram)
            layer.write(layer.weight * 0.5)
