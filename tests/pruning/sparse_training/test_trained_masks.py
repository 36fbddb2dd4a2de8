"""Masks that are chosen while training: their gradients against closed forms, and what they leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import workbench
from workbench.pruning.pattern import obeys, parse
from workbench.pruning.sparse_training import block_movement
from workbench.pruning.sparse_training.trained_masks import (
    AdaptiveMask,
    Gates,
    LowRankScores,
    MovementScores,
    freeze,
    mask_in_force,
)
from workbench.subjects import LowRank, Mask


def one_layer(out=6, width=8, seed=0):
    torch.manual_seed(seed)
    subject = workbench.subject(
        nn.Linear(width, out), data={"inputs": torch.randn(20, width), "labels": torch.randint(out, (20,))}
    )
    (layer,) = subject.layers("*")
    return subject, layer, torch.randn(out, width)


def test_gradient_of_a_gate_is_the_sum_over_its_block():
    _, layer, upstream = one_layer()
    score = torch.tensor([[1.0, -9.0], [2.0, 3.0], [-9.0, 1.0]])
    layer.attach(Gates(score, 2, 4, 0.1))
    (layer.weight * upstream).sum().backward()
    (gate,) = layer.changes
    products = (upstream * layer.original.detach()).reshape(3, 2, 2, 4).sum((1, 3))
    assert torch.allclose(gate.score.grad, products, atol=1e-6)  # shut gates get theirs too: straight through
    kept = (score > torch.logit(torch.tensor(0.1))).repeat_interleave(2, 0).repeat_interleave(4, 1)
    assert torch.equal(layer.weight != 0, kept) and torch.equal(layer.original.grad, upstream * kept)


def test_a_neurons_row_and_column_share_one_gate():
    torch.manual_seed(0)
    score = nn.Parameter(torch.tensor([[1.0], [-9.0], [1.0]]))
    row, column = Gates(score, 1, 0, 0.1), Gates(score, 0, 1, 0.1, turned=True)
    first, second = torch.randn(3, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    one, two = row.change(first), column.change(second)
    assert (
        one[1].abs().sum() == 0
        and two[:, 1].abs().sum() == 0
        and (one[[0, 2]] != 0).all()
        and (two[:, [0, 2]] != 0).all()
    )
    up, down = torch.randn(3, 5), torch.randn(4, 3)
    ((one * up).sum() + (two * down).sum()).backward()
    assert torch.allclose(score.grad[:, 0], (up * first).sum(1) + (down * second).sum(0), atol=1e-6)
    assert (row.expected((3, 5)) + column.expected((4, 3))).item() == pytest.approx(
        (score.sigmoid() * 9).sum().item()
    )


def test_an_adaptive_mask_lets_the_gradient_through_and_pulls_what_it_prunes():
    _, layer, upstream = one_layer()
    layer.attach(AdaptiveMask(torch.ones(8), "2:4"))
    (change,) = layer.changes
    change.decay = 0.3
    (layer.weight * upstream).sum().backward()
    w, mask = layer.original.detach(), mask_in_force(layer)
    assert obeys(mask, parse("2:4")) and torch.equal(
        mask, torch.stack([r >= r.sort(-1).values[..., 2:3] for r in w.abs().reshape(6, 2, 4)]).reshape(6, 8)
    )
    assert torch.allclose(layer.original.grad, upstream + 0.3 * w * ~mask)
    change.norm.copy_(torch.tensor([9.0, 9, 0, 0, 9, 9, 0, 0]))  # Wanda's scores: two inputs that never fire
    assert torch.equal(mask_in_force(layer)[0], torch.tensor([True, True, False, False] * 2))


def test_movement_scores_fall_by_the_gradient_of_the_masked_weight_times_the_weight():
    """Sanh et al. 2020, eq. 3 and 4: for what is pruned as well, so a pruned weight comes back."""
    _, layer, upstream = one_layer()
    layer.attach(MovementScores(torch.randn(6, 8), sparsity=0.5))
    (change,) = layer.changes
    (layer.weight * upstream).sum().backward()
    w, mask = layer.original.detach(), change.score > change.score.flatten().sort().values[23]
    assert torch.equal(change.score.grad, upstream * w) and torch.equal(layer.original.grad, upstream * mask)
    with torch.no_grad():
        change.score[~mask] += 9
    assert not bool((mask_in_force(layer) & mask).any())


def test_structured_scores_get_the_gradients_of_their_formula():
    _, layer, upstream = one_layer()
    parts = torch.randn(6, 2), torch.randn(2, 8), torch.randn(6, 1), torch.randn(1, 8)
    layer.attach(LowRankScores(*(p.clone() for p in parts), sparsity=0.5))
    (change,) = layer.changes
    (layer.weight * upstream).sum().backward()
    w = layer.original.detach()
    scores, grown = w.abs() + parts[0] @ parts[1] + parts[2] + parts[3], upstream * w
    mask = scores > scores.flatten().sort().values[23]
    assert torch.equal(mask_in_force(layer), mask) and torch.equal(layer.original.grad, upstream * mask)
    assert torch.allclose(change.left.grad, grown @ parts[1].T, atol=1e-5) and torch.allclose(
        change.right.grad, parts[0].T @ grown, atol=1e-5
    )
    assert torch.allclose(change.row.grad, grown.sum(1, keepdim=True), atol=1e-5) and torch.allclose(
        change.column.grad, grown.sum(0, keepdim=True), atol=1e-5
    )


def test_freezing_keeps_the_mask_in_force_and_the_changes_beneath():
    subject, layer, _ = one_layer()
    layer.attach(LowRank(torch.randn(6, 2), torch.randn(2, 8)))
    layer.attach(AdaptiveMask(torch.ones(8), "unstructured", 0.25))
    before, original = layer.weight.detach().clone(), layer.original
    freeze(layer)
    assert (
        [type(c) for c in layer.changes] == [LowRank, Mask]
        and torch.equal(layer.weight, before)
        and layer.original is original
    )
    assert subject.model.weight is not None


def test_taking_the_last_change_off_leaves_copies_alone():
    subject, layer, _ = one_layer()
    layer.attach(Mask(torch.ones(6, 8) > 0))
    twin = copy.deepcopy(subject.model)
    parameter = layer.original
    layer.detach(layer.changes[0])
    assert layer.changes == [] and subject.model.weight is parameter and type(subject.model) is nn.Linear
    assert twin.weight.shape == (6, 8) and twin(torch.ones(8)).shape == (
        6,
    )  # the copy is still parametrized, and works


def test_hybrid_gates_leave_heads_and_neurons_that_can_be_removed_without_a_change():
    subject = workbench.subject("digits-vit").copy()
    layers = subject.layers()
    block_movement.attach_gates(subject, layers, "hybrid 8x8", 0.1)
    by_name = {layer.name: layer for layer in layers}
    with torch.no_grad():
        neurons = by_name["vit.layers.0.mlp.fc1"].changes[0].score
        assert by_name["vit.layers.0.mlp.fc2"].changes[0].score is neurons and neurons.shape == (96, 1)
        neurons[:40] = -9.0
        by_name["vit.layers.1.attention.o_proj"].changes[0].score[:, :2] = -9.0
    batch = next(subject.batches("test", 16))
    for layer in layers:
        freeze(layer)
    before = subject.task.output(subject.model, batch).detach()
    kept = block_movement.remove_dead(subject)
    assert {name: int((~k).sum()) for name, k in kept.items()}["vit.layers.0.mlp"] == 40
    assert torch.allclose(subject.task.output(subject.model, batch), before, atol=1e-5)
    assert sum(int((~k).sum()) for name, k in kept.items() if "attention" in name) >= 1
