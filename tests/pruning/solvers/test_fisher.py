from __future__ import annotations

import itertools
from itertools import combinations, pairwise

import pytest
import torch

import workbench
from workbench.evidence.oracles.exact import best_subset, obs_path, refit
from workbench.kernels.sparse.block_fisher import block_fisher, block_fisher_inverse
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.axes import SALIENCY, Gradients
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import NM, Tiles, make_mask
from workbench.pruning.solvers import fisher
from workbench.statistics import GradientFactors, StackedGradients, example_gradients, gradient_factors
from workbench.subjects import Mask


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_factored_gradients_are_autograds(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    layers = subject.layers()[:9]
    layers[1].attach(Mask(torch.rand(layers[1].shape) < 0.5))
    rows = list(example_gradients(subject, layers, "train", examples=6))
    found = gradient_factors(subject, layers, "train", examples=6, batch_size=4)
    for i, layer in enumerate(layers):
        want = torch.stack([r[i] for r in rows])
        got = found[layer.name]
        assert torch.allclose(got.rows(0, layer.shape[0]), want, atol=1e-6 + 1e-4 * float(want.abs().max()))
        assert torch.allclose(got.mean(), want.mean(0), atol=1e-5)
        if layer.name != layers[1].name:
            assert got.square_sum() == pytest.approx(float(want.square().sum()), rel=1e-3)


@pytest.mark.parametrize("examples", [3, 40])
def test_inverse_blocks_equal_the_rank_one_recursion_and_the_dense_inverse(examples):
    g = torch.randn(5, examples, 8, dtype=torch.float64)
    damp = 0.1
    rows = g.transpose(0, 1).flatten(1)
    got = block_fisher_inverse(rows, 8, damp)
    inverse = torch.eye(8, dtype=torch.float64).repeat(5, 1, 1) / damp  # Singh and Alistarh 2020, eq. 10
    for k in range(examples):
        v = torch.einsum("bij,bj->bi", inverse, g[:, k])
        inverse = inverse - v[:, :, None] * v[:, None, :] / (examples + (g[:, k] * v).sum(-1))[:, None, None]
    assert torch.allclose(got, inverse, atol=1e-10)
    assert torch.allclose(got, torch.linalg.inv(block_fisher(rows, 8, damping=damp)), atol=1e-10)


def dense_fisher(gradients: torch.Tensor, damp: float) -> torch.Tensor:
    flat = gradients.flatten(1)
    return flat.T @ flat / len(flat) + damp * torch.eye(flat.shape[1], dtype=flat.dtype)


def test_update_is_the_dense_minimiser_on_a_layer_of_64_weights():
    """One block holds the whole row; against the brute-force solution with the dense inverse, row by row."""
    torch.manual_seed(1)
    weight, gradients = torch.randn(4, 16, dtype=torch.float64), torch.randn(30, 4, 16, dtype=torch.float64)
    mask = torch.rand(4, 16) < 0.4
    damp = 0.05
    got = fisher.update(weight, mask, StackedGradients(gradients), damp, 16)
    for r in range(4):
        hessian = dense_fisher(gradients[:, r], damp)
        want, loss = refit(weight[r], hessian, mask[r])
        assert torch.allclose(got[r], want, atol=1e-9)
        one_by_one = (
            -torch.linalg.inv(hessian)[:, ~mask[r]]
            @ torch.linalg.inv(torch.linalg.inv(hessian)[~mask[r]][:, ~mask[r]])
            @ weight[r][~mask[r]]
        )
        assert torch.allclose(got[r] - weight[r], one_by_one, atol=1e-9)  # eq. 4 of the paper
        delta = weight[r] * mask[r] - weight[r]
        assert loss <= float(delta @ hessian @ delta) / 2


def test_saliency_is_the_loss_of_removing_one_weight_and_greedy_follows_the_obs_path():
    torch.manual_seed(2)
    weight, gradients = torch.randn(3, 10, dtype=torch.float64), torch.randn(40, 3, 10, dtype=torch.float64)
    damp = 0.02
    rho = fisher.saliency(weight, StackedGradients(gradients), damp, 10)
    greedy = fisher.saliency(weight, StackedGradients(gradients), damp, 10, greedy=True)
    for r in range(3):
        hessian = dense_fisher(gradients[:, r], damp)
        for q in range(10):
            kept = torch.ones(10, dtype=torch.bool)
            kept[q] = False
            assert float(rho[r, q]) == pytest.approx(refit(weight[r], hessian, kept)[1], rel=1e-8)
        path = obs_path(weight[r], hessian)
        steps = torch.tensor([path[0][1]] + [b[1] - a[1] for a, b in pairwise(path)], dtype=torch.float64)
        want = torch.empty(10, dtype=torch.float64)
        want[[q for q, _ in path]] = steps.cummax(0).values
        assert torch.allclose(greedy[r], want, atol=1e-9)
        assert best_subset(weight[r], hessian, 9)[1] == pytest.approx(path[0][1])


def test_two_of_four_takes_the_pair_with_the_smallest_joint_loss():
    torch.manual_seed(3)
    weight, gradients = torch.randn(2, 8, dtype=torch.float64), torch.randn(30, 2, 8, dtype=torch.float64)
    scores = fisher.nm_scores(weight, StackedGradients(gradients), 0.05, 8, NM(2, 4))
    mask = make_mask(scores, NM(2, 4), 0.5)
    for r in range(2):
        hessian = dense_fisher(gradients[:, r], 0.05)
        for start in (0, 4):
            losses = {}
            for pair in combinations(range(start, start + 4), 2):
                kept = torch.ones(8, dtype=torch.bool)
                kept[list(pair)] = False
                losses[pair] = refit(weight[r], hessian, kept)[1]
            gone = tuple((~mask[r, start : start + 4]).nonzero().flatten().add(start).tolist())
            assert gone == min(losses, key=losses.get)  # type: ignore[arg-type]


def test_a_tile_costs_the_loss_of_removing_it_with_the_rest_of_its_rows_refitted():
    torch.manual_seed(4)
    weight, gradients = torch.randn(4, 12, dtype=torch.float64), torch.randn(30, 4, 12, dtype=torch.float64)
    scores = fisher.tile_scores(weight, StackedGradients(gradients), 0.05, 13, Tiles(2, 4))
    for top, left in itertools.product((0, 2), (0, 4, 8)):
        losses = []
        for r in (top, top + 1):
            kept = torch.ones(12, dtype=torch.bool)
            kept[left : left + 4] = False
            losses.append(refit(weight[r], dense_fisher(gradients[:, r], 0.05), kept)[1])
        assert float(scores[top : top + 2, left : left + 4].sum()) == pytest.approx(sum(losses), rel=1e-9)


def test_blocks_of_four_go_by_their_joint_cost(checkpoints):
    subject = workbench.subject(checkpoints["bert"], data="random")
    calibration, layer = Calibration(subject, subject.layers()), subject.layers()[0]
    options = {"name": "fisher", "gradients": 8}
    single, four = (SALIENCY.chosen(options)(layer, calibration, p) for p in (Tiles(1, 1), Tiles(1, 4)))
    costs = four.unflatten(-1, (-1, 4)).sum(-1)
    assert torch.equal(four.unflatten(-1, (-1, 4)).amax(-1), four.unflatten(-1, (-1, 4)).amin(-1))
    assert not torch.allclose(costs / single.unflatten(-1, (-1, 4)).sum(-1), torch.ones(()), atol=1e-3)


def test_rows_are_padded_when_the_block_does_not_divide_them():
    weight, gradients = torch.randn(2, 13, dtype=torch.float64), torch.randn(20, 2, 13, dtype=torch.float64)
    stack = StackedGradients(gradients)
    rho = fisher.saliency(weight, stack, 0.1, 5)
    inverse = torch.linalg.inv(dense_fisher(gradients[:, 1, 5:10], 0.1))
    assert torch.allclose(rho[1, 5:10], weight[1, 5:10].square() / (2 * inverse.diagonal()))
    assert fisher.update(weight, torch.ones(2, 13, dtype=torch.bool), stack, 0.1, 5).allclose(weight)


def test_short_factors_give_the_rows_of_their_float_products_rounded_once():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (
        [torch.randn(3, 7, n, generator=generator).bfloat16() for _ in range(2)] for n in (20, 12)
    )
    short = GradientFactors(inputs, outputs).rows(2, 9)
    whole = GradientFactors([x.float() for x in inputs], [d.float() for d in outputs]).rows(2, 9)
    assert short.dtype == torch.float32 and torch.allclose(short, whole, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "mixtral"])
def test_gradients_of_small_batches_are_means_of_examples(architecture, checkpoints):
    subject = workbench.subject(checkpoints[architecture], data="random")
    layers = subject.layers()
    calibration = Calibration(subject, layers)
    single, means = (Gradients(gradients=count, gradient_batch=size) for count, size in ((6, 1), (3, 2)))
    for layer in layers:
        whole, rows = calibration.factors(layer, single), calibration.factors(layer, means)
        expected = whole.rows(0, 8).unflatten(0, (3, 2)).mean(1)
        assert rows.examples == 3 and torch.allclose(
            rows.rows(0, 8), expected, atol=0.02 * float(expected.abs().max())
        )
    assert calibration.absolute_damp(means, 0.01) < calibration.absolute_damp(single, 0.01)  # means vary less
    few = {"name": "fisher", "gradients": 3, "gradient_batch": 2}
    result = Prune(saliency=few, compensation=few, calibration_examples=4, predict_examples=0).run(
        subject, Progress(), cache=False
    )
    assert result.facts["sparsity"] == pytest.approx(0.5, abs=1e-3)
