from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench
from workbench.pruning.pattern import NM, nm_mask, obeys
from workbench.pruning.sparse_training.side_terms import SideLowRank
from workbench.pruning.sparse_training.slope import DoublePruned, extra_zero_share, second_mask
from workbench.subjects import Mask


def test_extra_zeros_are_the_formula_and_what_random_masks_show():
    assert extra_zero_share(2, 4) == 0.09375
    assert extra_zero_share(1, 2) == pytest.approx(
        0.125
    )  # two of four pairs of a column pair lie in one row: 1/4 x 1/2
    torch.manual_seed(0)
    for keep, of in ((2, 4), (1, 4), (2, 8)):
        weight = torch.randn(2048, 512)
        once = weight * nm_mask(torch.rand(weight.shape), NM(keep, of))
        twice = second_mask(once, keep, of)
        assert obeys(twice, NM(keep, of)) and obeys(twice, NM(keep, of, -2))
        share = float(((once != 0) & ~twice).float().mean())
        spread = (extra_zero_share(keep, of) / (weight.numel() / of)) ** 0.5
        assert share == pytest.approx(extra_zero_share(keep, of), abs=6 * spread)


def test_only_the_gradient_of_the_inputs_is_pruned_twice(masked_pair):
    subject, layers = masked_pair((8, 12, 4), lambda layer: nm_mask(layer.weight.detach().abs(), NM(2, 4)))
    net = subject.model
    mode, x = DoublePruned(layers, 2, 4), torch.randn(5, 8, requires_grad=True)
    exact = net(x)
    with mode:
        y = net(x)
    assert torch.equal(y, exact)
    up = torch.randn(5, 4)
    y.backward(up)
    first, second = (layer.weight.detach() for layer in layers)
    first_back, second_back = (w * second_mask(w, 2, 4) for w in (first, second))
    hidden = torch.tanh(x @ first.T + net[0].bias)
    inner = (up @ second_back) * (1 - hidden**2)
    assert torch.allclose(x.grad, inner @ first_back, atol=1e-6)
    assert torch.allclose(layers[1].original.grad, (up.T @ hidden) * (second != 0), atol=1e-5)
    assert torch.allclose(layers[0].original.grad, (inner.T @ x.detach()) * (first != 0), atol=1e-5)


def test_adapters_beside_the_sparse_weight_go_back_in_full():
    torch.manual_seed(0)
    net = nn.Linear(8, 8, bias=False)
    subject = workbench.subject(net, data={"inputs": torch.randn(20, 8), "labels": torch.randint(8, (20,))})
    (layer,) = subject.layers("*")
    layer.attach(Mask(nm_mask(torch.rand(8, 8), NM(2, 4))))
    sparse = layer.weight.detach().clone()
    mode = DoublePruned([layer], 2, 4)
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    layer.attach(SideLowRank(up.clone(), down.clone()))
    x = torch.randn(3, 8, requires_grad=True)
    with mode:
        y = subject.model(x)
    y.sum().backward()
    assert torch.allclose(
        x.grad, torch.ones(3, 8) @ (sparse * second_mask(sparse, 2, 4) + up @ down), atol=1e-5
    )
