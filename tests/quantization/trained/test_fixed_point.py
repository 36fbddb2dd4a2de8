"""Learned binary points: integers exactly, gradients of the formula,
sums of powers of two against brute force, training and freezing.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import TrainQuantized
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.trained.fixed_point import LearnedPoint, few_powers


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_few_powers_are_the_nearest_sums(terms: int) -> None:
    """Greedy choices against all sums of so many signed powers of two that stay inside the word,
    for every 6-bit integer.
    """
    powers = [0.0] + [sign * 2.0**e for e in range(6) for sign in (-1, 1)]
    sums = torch.tensor(
        sorted({s for p in itertools.product(powers, repeat=terms) if abs(s := sum(p)) <= 31})
    )
    units = torch.arange(-31.0, 32.0)
    nearest = (units[:, None] - sums[None]).abs().min(1).values
    found = few_powers(units, terms, 31.0)
    assert torch.isin(found, sums).all() and torch.equal((units - found).abs(), nearest)


def test_products_are_those_of_integers() -> None:
    """Weights times 2^f are integers of the word, so a product with fixed-point inputs is one of integers,
    bit for bit.
    """
    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    rounding = LearnedPoint.begin(weight, 20, TrainQuantized(method={"name": "fixed", "bits": 6}))
    values, grid = rounding.final(weight)
    codes = (values * 2.0**rounding.fraction).to(torch.int64)
    assert (
        torch.equal(codes.float() * 2.0**-rounding.fraction, values)
        and codes.min() >= -32
        and codes.max() <= 31
    )
    inputs = torch.randint(-128, 128, (5, 20))
    assert torch.equal(
        (inputs @ codes.T).double() * 2.0 ** -(rounding.fraction + 7),
        (inputs.double() * 2.0**-7) @ values.double().T,
    )
    assert grid.format.name == f"fixed6.{rounding.fraction}" and torch.equal(grid.round(values), values)


def test_the_point_starts_at_the_least_error_and_its_gradient_is_that_of_a_step() -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 8)
    rounding = LearnedPoint.begin(weight, 8, TrainQuantized(method={"name": "fixed", "bits": 4}))
    errors = [float((LearnedPoint.rounded(weight, f, 4, 0) - weight).square().sum()) for f in range(8)]
    assert rounding.fraction == min(range(8), key=lambda f: errors[f])
    upstream = torch.randn(8, 8)
    (rounding.change(weight) * upstream).sum().backward()
    step = 2.0**-rounding.fraction
    units = weight / step
    inside = (units >= -8) & (units <= 7)
    slope = torch.where(
        inside, units.round() - units, units.clamp(-8, 7)
    )  # of the step, Esser et al. 2020, eq. 3
    assert rounding.place.grad is not None
    assert float(rounding.place.grad) == pytest.approx(
        float((upstream * slope).sum()) * step * -0.6931471805599453, rel=1e-4
    )


@pytest.mark.parametrize("terms", [0, 2])
def test_trains_freezes_and_opens_again(terms: int, tmp_path: Path) -> None:
    on = workbench.subject("digits-vit")
    result = TrainQuantized(
        method={"name": "fixed", "bits": 5, "nonzero_bits": terms}, steps=6, batch_size=16, test_examples=64
    ).run(on, Progress(), cache=False)
    assert result.subject is not None
    for layer in result.subject.layers("blocks"):
        name = quantizer_of(layer).grid.format.name
        codes = layer.weight.detach() * 2.0 ** int(name.split(".")[1])
        assert name.startswith("fixed5.") and torch.equal(codes, codes.round())
        if terms:
            assert torch.equal(codes, few_powers(codes, terms, 15.0))
    result.subject.save(tmp_path / "fixed")
    again = workbench.subject(tmp_path / "fixed")
    assert again.evaluate("test", limit=64)["loss"] == pytest.approx(result.facts["loss"], rel=1e-5)
    with pytest.raises(BadInput, match="nonzero_bits"):
        TrainQuantized(**{"method": "lsq", "method.nonzero_bits": 2}).run(on, Progress(), cache=False)
