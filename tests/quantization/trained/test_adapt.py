"""Adaptive fixed-point words: the fewest bits that keep a histogram, bits by gradient diversity, training."""

from __future__ import annotations

import math

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.quantization import TrainQuantized
from workbench.quantization.number.formats import named
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.trained.adapt import AdaptiveWord, fraction_of, lost, pushed_down, pushed_up


def test_a_weight_of_few_bits_keeps_them() -> None:
    """Multiples of 1/8 within (-1, 1) need a sign and three bits; their histogram loses nothing with four."""
    weight = (torch.randint(-7, 8, (64, 64)) / 8).float()
    assert pushed_down(weight, 100, 1e-6) == 4 and fraction_of(weight, 4) == 3
    assert torch.equal(named("fixed4.3").element.round(weight), weight)


def test_the_fewest_bits_are_those_of_a_search_through_all() -> None:
    weight = 0.3 * torch.randn(96, 64)
    found = pushed_down(weight, 100, 0.01)
    losses = {}
    for bits in range(2, 16):
        word = named(f"fixed{bits}.{fraction_of(weight, bits)}").element
        losses[bits] = lost(weight, word.round(weight), 100)
    assert losses[found] <= 0.01 and all(losses[bits] > 0.01 for bits in range(2, found))


def test_the_divergence_is_that_of_the_counts() -> None:
    weight, rounded = torch.tensor([[0.0, 0.1, 0.9, 1.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    mine, theirs = (3 / 6, 3 / 6), (4 / 6, 2 / 6)  # one count is added to each of two bins
    expected = sum(a * math.log(a / b) for a, b in zip(mine, theirs, strict=True))
    assert lost(weight, rounded, 2) == pytest.approx(expected, rel=1e-5)
    assert lost(weight, weight, 2) == 0


@pytest.mark.parametrize(
    ("diversity", "fraction", "bits"),
    [
        (1.0, 4, 1),  # gradients that agree
        (math.e, 4, 1),  # l = 0
        (math.exp(1.5), 4, 4),  # l = 1/2: min(4, 8 - 4)
        (math.exp(1.5), 6, 2),  # min(4, 8 - 6)
        (math.exp(3.0), 4, 1),  # l = 2: min(1, 32 - 4)
        (math.inf, 4, 1),
    ],
)
def test_bits_by_diversity(diversity: float, fraction: int, bits: int) -> None:
    assert pushed_up(diversity, fraction) == bits


def test_gradients_count_with_norm_one_and_rounding_is_unbiased() -> None:
    weight = torch.nn.Parameter(torch.full((200, 200), 0.3))
    word = AdaptiveWord(torch.zeros(200, 200), bits=4)
    word.fraction.fill_(2)
    values = word.change(weight)
    assert set(values.unique().tolist()) == {0.25, 0.5}
    assert float(values.detach().mean()) == pytest.approx(0.3, abs=5 * 0.25 * (0.16 / 40000) ** 0.5)
    upstream = torch.randn(200, 200)
    values.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    word.add(-3 * upstream)
    assert int(word.seen) == 2 and float(word.total.norm()) < 1e-6


def test_words_change_in_training_and_end_as_a_grid() -> None:
    on = workbench.subject("digits-vit")
    fields = {"name": "adapt", "look_back": 2}
    result = TrainQuantized(method=fields, steps=8, batch_size=16, test_examples=64).run(
        on, Progress(), cache=False
    )
    assert result.subject is not None and result.table["average_width"].nunique() > 1
    for layer in result.subject.layers("blocks"):
        grid = quantizer_of(layer).grid
        assert grid.format.name.startswith("fixed") and torch.equal(grid.round(layer.weight), layer.weight)
