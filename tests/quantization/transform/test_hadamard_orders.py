"""Hadamard matrices of the widths that models have: orthogonal, entries of one size, every feature mixed."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from workbench.quantization.transform.coordinates import Transform
from workbench.quantization.transform.hadamard_orders import (
    core,
    has_paley,
    is_prime,
    matrix_of_order,
    mixed,
    paley,
    power_of_two,
    widest,
)

#: The orders whose tables the authors of QuaRot ship, but for those no construction here gives.
PUBLISHED = (12, 20, 28, 36, 40, 60, 108, 140)


@pytest.mark.parametrize("order", [m for m in range(4, 257, 4) if has_paley(m)])
def test_paleys_matrices_are_hadamard(order: int) -> None:
    matrix = paley(order)
    assert matrix.shape == (order, order) and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", PUBLISHED)
def test_orders_that_others_have_as_tables(order: int) -> None:
    assert widest(order) == order


@pytest.mark.parametrize(
    ("width", "factor"),
    [(384, 12), (576, 36), (768, 12), (896, 28), (1536, 12), (2560, 20), (4864, 76), (5632, 44), (14336, 28)],
)
def test_widths_of_models_are_mixed_whole(width: int, factor: int) -> None:
    assert (core(width), widest(width)) == (factor, width)


def test_a_width_without_a_matrix_is_mixed_in_blocks() -> None:
    assert core(11008) == 0 and widest(11008) == 256
    assert core(9) == 0 and widest(9) == 1
    assert core(18) == 0 and widest(18) == 2, "no Hadamard matrix has an order that 4 does not divide"


@pytest.mark.parametrize("order", [1, 2, 64])
def test_powers_of_two_are_sylvesters(order: int) -> None:
    expected = torch.from_numpy(scipy.linalg.hadamard(order)) * order**-0.5
    assert torch.allclose(matrix_of_order(order), expected.double(), atol=1e-12)


@pytest.mark.parametrize(("width", "order"), [(576, 576), (40, 20), (44, 44), (1152, 576), (96, 32), (7, 1)])
def test_rows_are_multiplied_with_the_matrix_and_back(width: int, order: int) -> None:
    rows = torch.randn(3, width, dtype=torch.float64)
    matrix = torch.block_diag(*[matrix_of_order(order)] * (width // order))
    assert torch.allclose(mixed(rows, order), rows @ matrix, atol=1e-12)
    assert torch.allclose(mixed(rows, order, back=True), rows @ matrix.T, atol=1e-12)
    assert torch.allclose(mixed(mixed(rows, order), order, back=True), rows, atol=1e-12)


@pytest.mark.parametrize("width", [44, 576])  # a skew matrix, a symmetric one
def test_weights_and_inputs_meet_in_the_rotated_coordinates(width: int) -> None:
    signs = torch.randint(0, 2, (width,)).double() * 2 - 1
    transform = Transform(signs=signs, block=widest(width))
    weight, inputs = torch.randn(5, width, dtype=torch.float64), torch.randn(4, width, dtype=torch.float64)
    turned = transform.inputs(inputs) @ transform.weight(weight).T
    assert torch.allclose(turned, inputs @ weight.T, atol=1e-10)
    assert torch.allclose(transform.weight_back(transform.weight(weight)), weight, atol=1e-12)
    assert torch.allclose(transform.inputs_back(transform.inputs(inputs)), inputs, atol=1e-12)


def test_one_large_feature_is_spread_over_all() -> None:
    rows = torch.zeros(1, 576)
    rows[0, 5] = 1
    assert torch.allclose(mixed(rows, 576).abs(), torch.full((1, 576), 576**-0.5), atol=1e-6)
    assert int((mixed(rows, power_of_two(576)) != 0).sum()) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_type_stays(dtype: torch.dtype) -> None:
    assert mixed(torch.randn(2, 24).to(dtype), 12).dtype == dtype


def test_primes() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
