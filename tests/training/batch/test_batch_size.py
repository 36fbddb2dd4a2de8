"""Batch-size rules: an unbiased noise scale, the norm test, ghost batch norm, weight standardisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.test_loop import small
from workbench.errors import BadInput
from workbench.subjects import Layer, Subject
from workbench.subjects.tasks import CustomLoss, ModuleTask
from workbench.training import NormTest, fit
from workbench.training.batch.batch_size import (
    gradient_groups,
    gradient_variance,
    log_slope,
    next_batch,
    noise_scale,
    noise_scale_interval,
)
from workbench.training.batch.normalisation import (
    BatchChannelNorm,
    GhostBatchNorm,
    WeightStandardization,
)
from workbench.training.models.model_change import MODEL_CHANGE


def test_noise_scale_is_unbiased_on_a_known_covariance() -> None:
    """Per-example gradients N(G, Sigma): the means of both estimates over 4,000 experiments equal |G|^2
    and tr(Sigma) within 4 errors.
    """
    rng = np.random.default_rng(0)
    mean, scale = np.array([1.0, -0.5, 0.25]), np.array([2.0, 1.0, 3.0])
    groups, size, found = 6, 5, []
    for _ in range(4000):
        gradients = mean + rng.standard_normal((groups, size, 3)) * scale
        batch = gradients.mean(1)
        estimate = noise_scale(batch @ batch.T, size)
        found.append((estimate.square_norm, estimate.trace))
    values, errors = np.mean(found, 0), np.std(found, 0) / math.sqrt(len(found))
    assert abs(values[0] - mean @ mean) < 4 * errors[0] and abs(values[1] - scale @ scale) < 4 * errors[1]


def test_noise_scale_equals_the_two_batch_formula() -> None:
    """McCandlish et al. (2018), eq. A.2 and A.3, with B_small one group and B_big all of them."""
    rng = np.random.default_rng(1)
    batch = rng.standard_normal((7, 4)) + 1.0
    small_square, big_square, b, k = (batch**2).sum(1).mean(), (batch.mean(0) ** 2).sum(), 3, 7
    square = (k * b * big_square - b * small_square) / (k * b - b)
    trace = (small_square - big_square) / (1 / b - 1 / (k * b))
    found = noise_scale(batch @ batch.T, b)
    assert found.square_norm == pytest.approx(square) and found.trace == pytest.approx(trace)


def test_noise_interval_covers() -> None:
    rng = np.random.default_rng(2)
    mean, scale, hits = np.full(20, 0.5), np.full(20, 1.5), 0
    truth = (scale @ scale) / (mean @ mean)
    for _ in range(300):
        batch = (mean + rng.standard_normal((24, 8, 20)) * scale).mean(1)
        low, high = noise_scale_interval(batch @ batch.T, 8, 0.9)
        hits += low <= truth <= high
    assert 0.83 <= hits / 300 <= 0.97


def test_gradient_groups_of_a_quadratic() -> None:
    """Loss |w - x|^2 / 2: the gradient of a batch is w minus its mean, so the Gram matrix is known."""
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, 0.0, -1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * (self.w - x).square().sum(-1)

    on = Subject(
        "point", Point(), CustomLoss(lambda output, batch: output.mean()), {"train": {"inputs": inputs}}
    )
    gram = gradient_groups(on, groups=4, size=3)
    gradient = on.model.w.detach() - inputs
    everything = noise_scale(gram, 3)
    mean_gradient = gradient.mean(0)
    assert float(gram.sum()) / 16 == pytest.approx(float(mean_gradient.square().sum()), rel=1e-5)
    # groups of one: the exact sample covariance of the examples
    single = noise_scale(gradient_groups(on, groups=12, size=1), 1)
    assert single.trace == pytest.approx(float(gradient.var(0, unbiased=True).sum()), rel=1e-5)
    assert everything.trace > 0
    with pytest.raises(BadInput, match="more than"):
        gradient_groups(on, groups=5, size=3)


def test_norm_test_rule() -> None:
    gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, -3.0]])
    variance, square = gradient_variance(gradients)
    assert float(variance) == pytest.approx((1 + 1 + 9 + 9) / 3) and float(square) == pytest.approx(4.0)
    assert next_batch(20.0, 4.0, 6, eta=1.0, largest=100) == 6  # 20 / 6 <= 4
    assert next_batch(20.0, 4.0, 4, eta=1.0, largest=100) == 5  # ceil(20 / 4)
    assert (
        next_batch(20.0, 4.0, 4, eta=0.1, largest=100) == 100
        and next_batch(20.0, 0.0, 4, eta=1.0, largest=64) == 64
    )
    assert next_batch(20.0, 4.0, 50, eta=1.0, largest=100) == 50


def test_norm_test_grows_the_batch_in_the_loop() -> None:
    rule = NormTest(eta=0.8, largest=40, sample=8)
    run = fit(
        small(),
        steps=40,
        batch_size=4,
        learning_rate=0.05,
        optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
        before_step=[rule],
    )
    assert (
        rule.sizes[0] == 4
        and rule.sizes[-1] > 8
        and sorted(rule.sizes) == rule.sizes
        and max(rule.sizes) <= 40
    )
    assert run.position == sum(rule.sizes) and run.history.batch_size.tolist() == rule.sizes


def test_the_norm_test_reads_gradients_that_are_not_clipped_yet() -> None:
    sizes = []
    for clip in (None, 1e-3):
        rule = NormTest(eta=0.8, largest=40, sample=8)
        fit(small(), steps=2, batch_size=4, learning_rate=0.05, clip=clip, batch_rule=rule)
        sizes.append(rule.sizes)
    assert sizes[0] == sizes[1] and sizes[0][1] < 40  # clipped gradients ask for the largest batch at once


def test_ghost_batch_norm() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 5, 3)
    plain, ghost = nn.BatchNorm1d(5), GhostBatchNorm(5, ghost=24)
    torch.testing.assert_close(ghost(inputs), plain(inputs))
    torch.testing.assert_close(ghost.running_var, plain.running_var)
    torch.testing.assert_close(ghost.eval()(inputs), plain.eval()(inputs))
    ghost, plain = GhostBatchNorm(5, ghost=8), nn.BatchNorm1d(5)
    torch.testing.assert_close(ghost(inputs), torch.cat([plain(part) for part in inputs.split(8)]))
    torch.testing.assert_close(ghost.running_mean, plain.running_mean)
    assert GhostBatchNorm(5, ghost=8)(torch.randn(9, 5)).shape == (
        9,
        5,
    )  # a last ghost of one example joins its neighbour
    model = GhostBatchNorm.replacing(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), 8)
    assert isinstance(model[1], GhostBatchNorm)
    for dtype in (torch.float64, torch.bfloat16):  # a model keeps its precision, whatever norms it has
        for norm in (nn.BatchNorm1d(5), nn.LayerNorm(5)):
            columns = {"inputs": torch.randn(8, 3, dtype=dtype), "labels": torch.zeros(8, dtype=torch.int64)}
            on = Subject(
                "small", nn.Sequential(nn.Linear(3, 5), norm).to(dtype), ModuleTask(), {"train": columns}
            )
            made = MODEL_CHANGE.chosen("ghost-batch-norm", "model_change", ghost=4)(on).model.train()
            assert {value.dtype for value in made.state_dict().values()} == {dtype}
            assert made(columns["inputs"]).dtype == dtype
    with pytest.raises(BadInput, match="ghost"):
        GhostBatchNorm(3, ghost=1)


def test_batch_channel_norm() -> None:
    """Estimates first moved, then used for normalising, without a gradient into them; group norm after."""
    torch.manual_seed(0)
    inputs, layer = torch.randn(6, 4, 3, dtype=torch.float64), BatchChannelNorm(4, 2, rate=0.25).double()
    with torch.no_grad():
        layer.weight.mul_(1.5).add_(torch.arange(4)), layer.bias.add_(0.3)
    values = inputs.transpose(0, 1).flatten(1)
    mean, var = 0.25 * values.mean(1), 0.75 + 0.25 * values.var(1)
    normed = (inputs - mean[:, None]) / (var[:, None] + 1e-5).sqrt() * layer.weight[:, None] + layer.bias[
        :, None
    ]
    torch.testing.assert_close(layer(inputs), nn.functional.group_norm(normed, 2, eps=1e-5))
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    torch.testing.assert_close(layer.eval()(inputs), nn.functional.group_norm(normed, 2, eps=1e-5))
    first = layer.train()(inputs.requires_grad_())
    second = layer(inputs)  # gradient accumulation: both passes are still differentiable
    (first.sum() + second.sum()).backward()
    single = BatchChannelNorm(2, 1, rate=1.0)
    single(torch.tensor([[3.0, -2.0]]))
    torch.testing.assert_close(single.running_var, torch.tensor([9.0, 4.0]))


def test_weight_standardisation() -> None:
    on = small()
    layer = Layer("0", on.model[0])
    layer.attach(WeightStandardization())
    weight = layer.weight.detach()
    torch.testing.assert_close(weight.mean(1), torch.zeros(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.std(1, unbiased=False), torch.ones(16), atol=1e-5, rtol=0)
    run = fit(on, steps=30, learning_rate=1e-2)
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    torch.testing.assert_close(layer.weight.detach().mean(1), torch.zeros(16), atol=1e-6, rtol=0)
    # the gradient lives in the tangent space: orthogonal to constants and to the weight itself
    # (Qiao et al. 2019, section 3.3)
    gradient = torch.autograd.grad((layer.weight * torch.randn(16, 8)).sum(), layer.original)[0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(16), atol=1e-4, rtol=0)


def test_log_slope() -> None:
    batch = np.array([8.0, 16, 32, 64])
    found = log_slope(batch, 3 * batch**0.5)
    assert (
        found["slope"] == pytest.approx(0.5)
        and found["low"] == pytest.approx(0.5)
        and found["high"] == pytest.approx(0.5)
    )
    with pytest.raises(BadInput, match="3 points"):
        log_slope([1, 2], [1, 2])
