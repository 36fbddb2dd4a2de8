"""Merges of single tensors against closed forms and brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from workbench.arithmetic import MERGE, Models, Source, side_by_side
from workbench.arithmetic.merging.averages import on_the_sphere
from workbench.arithmetic.merging.merging import Setting, streamed
from workbench.arithmetic.merging.model_stock import share_of_mean
from workbench.arithmetic.merging.task_vectors import cut_of, disjoint_mean, dropped, trimmed
from workbench.arithmetic.order_statistics import keys, ranked, value

NAMES = {"layers.0.weight": (8, 6), "layers.1.weight": (4, 8), "bias": (4,)}


def source(name: str, tensors: dict[str, torch.Tensor]) -> Source:
    return Source(name, name, {k: tuple(v.shape) for k, v in tensors.items()}, tensors.__getitem__)


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}


def models(count: int = 3, alike: bool = False) -> Models:
    parents = [source(f"p{i}", drawn(1 if alike else 1 + i)) for i in range(count)]
    return side_by_side(source("base", drawn(0)), parents)


def merge(name: str, on: Models, strength: float = 1.0, **options: Any) -> dict[str, torch.Tensor]:
    chosen = MERGE.chosen(name, **options)
    rule = chosen.value(Setting(on, (), "validation", 1, lambda found: 0.0), chosen.options)
    return dict(streamed(on, rule, strength))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in NAMES])


@pytest.mark.parametrize(
    ("name", "strength", "options"),
    [
        ("uniform", 1.0, {}),
        ("wise-ft", 1.0, {}),
        ("model-stock", 1.0, {}),
        ("task-arithmetic", 1 / 3, {}),
        ("ties", 1.0, {"density": 1.0}),
        ("dare", 1 / 3, {"density": 1.0}),
        ("momentum-interpolation", 1.0, {"decay": 0.0}),
    ],
)
def test_copies_of_one_model_merge_to_it(name, strength, options):
    same = models(3, alike=True)
    found = merge(name, same, strength, **options)
    assert torch.allclose(flat(found), flat(drawn(1)), atol=1e-6)


def test_wise_ft_ends_at_the_base_and_at_the_model():
    one = models(1)
    assert torch.equal(flat(merge("wise-ft", one, 0.0)), flat(drawn(0)))
    assert torch.equal(flat(merge("wise-ft", one, 1.0)), flat(drawn(1)))
    halfway = (flat(drawn(0)) + flat(drawn(1))) / 2
    assert torch.allclose(flat(merge("wise-ft", one, 0.5)), halfway, atol=1e-6)


def test_slerp_keeps_the_length_and_divides_the_angle():
    first, last = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    third = on_the_sphere(first, last, 1 / 3)
    assert torch.allclose(third, 3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(on_the_sphere(first, first * 2, 0.5), first * 1.5)
    two = models(2)
    assert torch.allclose(flat(merge("slerp", two, 1.0)), flat(drawn(2)), atol=1e-6)


def test_momentum_is_a_geometric_sum():
    found = merge("momentum-interpolation", models(2), decay=0.75)
    expected = 0.75**2 * flat(drawn(0)) + 0.75 * 0.25 * flat(drawn(1)) + 0.25 * flat(drawn(2))
    assert torch.allclose(flat(found), expected, atol=1e-6)


def test_task_arithmetic_adds_differences():
    found = merge("task-arithmetic", models(2), 0.5)
    base = flat(drawn(0))
    assert torch.allclose(flat(found), base + 0.5 * (flat(drawn(1)) + flat(drawn(2)) - 2 * base), atol=1e-6)


def test_ties_is_its_algorithm_written_as_loops():
    """Algorithm 1 entry by entry, the trimming over all of a model's numbers."""
    density, scale = 0.3, 0.7
    base = flat(drawn(0)).tolist()
    vectors = [[a - b for a, b in zip(flat(drawn(i)).tolist(), base, strict=True)] for i in (1, 2, 3)]
    kept = []
    for vector in vectors:
        count = int(density * len(vector)) + 1  # the authors' threshold is itself kept
        least = sorted((abs(v) for v in vector), reverse=True)[count - 1]
        kept.append([v if abs(v) >= least - 1e-7 else 0.0 for v in vector])
    expected = []
    for place, start in enumerate(base):
        column = [vector[place] for vector in kept]
        sign = 1 if sum(column) >= 0 else -1
        same = [v for v in column if v * sign > 0]
        expected.append(start + scale * (sum(same) / len(same) if same else 0.0))
    found = merge("ties", models(3), scale, density=density)
    assert torch.allclose(flat(found), torch.tensor(expected), atol=1e-5)


def test_trimming_a_tensor_keeps_the_largest():
    difference = torch.tensor([0.1, -0.5, 0.3, -0.2])
    assert trimmed(difference, cut_of(difference, 0.5)).tolist() == pytest.approx([0.0, -0.5, 0.3, 0.0])
    assert torch.equal(trimmed(difference, cut_of(difference, 1.0)), difference)


def test_the_mean_is_of_those_with_the_elected_sign():
    columns = torch.tensor([[1.0, 0.0, -2.0], [3.0, 0.0, 1.0], [-1.0, 0.5, -4.0]])
    assert disjoint_mean(columns).tolist() == [2.0, 0.5, -3.0]


def test_random_drops_are_unbiased():
    """To three standard errors of the mean over 4,000 draws."""
    difference = torch.tensor([1.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([dropped(difference, 0.9, True, generator) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert bool(((draws.mean(0) - difference).abs() < 3 * error).all())
    assert draws[:, 0].unique().tolist() == pytest.approx([0.0, 10.0])


def test_dare_draws_the_same_again_and_another_seed_otherwise():
    one, again = merge("dare", models(2)), merge("dare", models(2))
    assert torch.equal(flat(one), flat(again))
    other = side_by_side(source("base", drawn(0)), [source(f"p{i}", drawn(1 + i)) for i in range(2)], seed=5)
    assert not torch.equal(flat(one), flat(merge("dare", other)))


def test_model_stock_takes_the_share_of_the_paper():
    """n cos / (1 + (n - 1) cos): with two at 60 degrees 2/3, with orthogonal ones none of the mean."""
    half = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2]])
    assert share_of_mean(half) == pytest.approx(2 / 3)
    assert share_of_mean(torch.eye(3)) == pytest.approx(0.0)
    assert share_of_mean(torch.ones(4, 5)) == pytest.approx(1.0)
    assert share_of_mean(torch.zeros(2, 3)) == 0.0


def test_model_stock_is_the_foot_of_the_perpendicular_from_the_centre():
    """The centre c is where (d_1 - c), (d_2 - c) and -c are orthogonal to each other (the paper's section 3);
    with c = p + h, h orthogonal to the plane, this asks that (d_1 - p)(d_2 - p) = (0 - p)(d_1 - p).
    """
    d = models(2).parts("layers.0.weight").differences.flatten(1)
    d = d / d.norm(dim=1, keepdim=True)
    point = share_of_mean(d) * d.mean(0)
    assert float((d[0] - point) @ (d[1] - point)) == pytest.approx(float(-point @ (d[0] - point)), abs=1e-6)


def test_pcb_is_its_equations_on_whole_vectors():
    """The same with sorts and whole vectors in float64."""
    base = flat(drawn(0)).double()
    vectors = torch.stack([flat(drawn(i)) for i in (1, 2, 3)]).double() - base
    n, d = vectors.shape
    density = 0.25

    def clamp(x, low, high):
        ordered = x.sort(1).values
        return torch.minimum(
            torch.maximum(x, ordered[:, int(d * low), None]), ordered[:, int(d * (1 - high) - 1), None]
        )

    def unit(x):
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    sizes = clamp(vectors.abs(), 1e-4, 1e-4)
    balance = torch.exp(n * unit(sizes) ** 2) * torch.tanh(vectors * vectors.sum(0))
    weights = unit(clamp(balance, 1 - density, 0.0))
    expected = base + 0.8 * (vectors.sign() * sizes * weights).sum(0) / weights.sum(0).clamp_min(1e-12)
    found = merge("pcb-merging", models(3), 0.8, density=density)
    assert torch.allclose(flat(found).double(), expected, atol=1e-5)


def test_ranks_of_a_stream_are_those_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) for size in (17, 400, 3)]
    parts[0][:5] = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 65504.0])
    whole = torch.cat(parts).sort().values
    places = [0, 1, 200, 210, 419]
    assert ranked(lambda: iter(parts), places) == whole[places].tolist()


def test_keys_are_in_the_order_of_the_numbers():
    numbers = torch.tensor([-3.0, -1e-30, 0.0, 1e-45, 2.5, 3.4e38])
    found = keys(numbers)
    assert bool((found.diff() > 0).all())
    assert [value(int(key)) for key in found] == numbers.tolist()
