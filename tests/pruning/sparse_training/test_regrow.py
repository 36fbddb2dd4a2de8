from __future__ import annotations

import math

import pytest
import torch

import workbench
from workbench.pruning.schedule import annealed, geometric, late
from workbench.pruning.sparse_training.regrow import dense_gradients, exchange, exchanged_share
from workbench.pruning.sparse_training.trained_masks import mask_in_force


def sparse(layer):
    return torch.rand(layer.shape) < 0.4


def test_an_exchange_keeps_every_layers_budget_and_is_the_brute_force_choice(masked_pair):
    subject, layers = masked_pair((6, 8, 3), sparse)
    before = [mask_in_force(layer).clone() for layer in layers]
    gradients = {
        k: v.abs() for k, v in dense_gradients(subject, layers, next(subject.batches("train", 40))).items()
    }
    optimizer = torch.optim.AdamW(subject.model.parameters(), 0.01)
    subject.loss(next(subject.batches("train", 40))).backward()
    optimizer.step()
    weights = [layer.weight.detach().abs().flatten() for layer in layers]
    count = exchange(layers, gradients, 0.3, optimizer)
    assert count == sum(round(0.3 * int(old.sum())) for old in before)
    for layer, was, sizes in zip(layers, before, weights, strict=True):
        old, new = was.flatten(), mask_in_force(layer).flatten()
        moved = round(0.3 * int(old.sum()))
        assert int(new.sum()) == int(old.sum()) and moved > 0
        kept, free = old.nonzero().flatten(), (~old).nonzero().flatten()
        wanted = gradients[layer.name].flatten()[free]
        smallest = set(kept[sizes[kept].argsort()[:moved]].tolist())
        largest = set(free[wanted.argsort(descending=True)[:moved]].tolist())
        assert set((old & ~new).nonzero().flatten().tolist()) == smallest
        assert set((new & ~old).nonzero().flatten().tolist()) == largest
    for layer, was in zip(layers, before, strict=True):
        moved = mask_in_force(layer) != was
        assert bool((layer.original[moved] == 0).all()) and bool(
            (optimizer.state[layer.original]["exp_avg"][moved] == 0).all()
        )


def test_dense_gradients_are_those_of_a_plain_weight(masked_pair):
    subject, layers = masked_pair((6, 8, 3), sparse)
    batch = next(subject.batches("train", 40))
    found = dense_gradients(subject, layers, batch)
    plain = workbench.subjects.bake(subject.copy().model)
    subject.task.loss(plain, batch).backward()
    assert torch.allclose(found[layers[0].name], plain[0].weight.grad, atol=1e-6) and torch.allclose(
        found[layers[1].name], plain[2].weight.grad, atol=1e-6
    )


def test_schedules():
    assert (
        exchanged_share(0.4, 0, 100) == 0.4
        and exchanged_share(0.4, 50, 100) == pytest.approx(0.2)
        and exchanged_share(0.4, 100, 100) == 0
    )
    densities = [1 - s for s in geometric(1 - 0.8**4.5, 8)]
    assert densities == pytest.approx([0.8 ** (1 + 3.5 * k / 7) for k in range(8)])
    assert math.log(densities[0]) / math.log(0.8) == pytest.approx(1.0)
    assert geometric(0.1, 3) == pytest.approx([0.1] * 3) and geometric(0.5, 1) == [0.5]
    assert late(0.5, 3) == [0, 0, 0.5]
    assert annealed(2.0, 0.125) == 1.0 and annealed(2.0, 0.5) == 2.0 and annealed(2.0, 0.75) == 0.0
