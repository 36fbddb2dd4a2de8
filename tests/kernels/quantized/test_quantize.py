"""Quantizers and the transforms they are fused with: bit for bit between kernel and reference,
and right on known grids.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.identity.quantization.number_formats import NF4 as PUBLISHED
from workbench.errors import BadInput
from workbench.kernels.quantized.hadamard import hadamard, hadamard_matrix, hadamard_quantize
from workbench.kernels.quantized.kronecker import kronecker, kronecker_quantize
from workbench.kernels.quantized.numbers import NF4, Numbers
from workbench.kernels.quantized.quantize import quantize_codebook, quantize_integer, quantize_minifloat
from workbench.kernels.random_bits import random_bits, uniform

KINDS = ("integer", "minifloat", "codebook")


def quantize(kind: str, x: torch.Tensor, scale: torch.Tensor, **options: object) -> torch.Tensor:
    if kind == "integer":
        return quantize_integer(x, scale, low=-8, high=7, **options)  # type: ignore[arg-type]
    if kind == "minifloat":
        return quantize_minifloat(x, scale, exponent=3, mantissa=2, **options)  # type: ignore[arg-type]
    return quantize_codebook(x, scale, NF4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference_bit_for_bit(kind: str, seed: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(37, 6).to(dtype).t()  # (6, 37), not contiguous
    x[0, :5] = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 1e-40]).to(dtype)
    for shape in ((1, 1), (6, 1), (6, 3), (2, 37)):
        scale = torch.rand(shape) + 0.1
        results = [quantize(kind, x, scale, seed=seed, backend=backend) for backend in ("torch", "triton")]
        torch.testing.assert_close(*results, atol=0, rtol=0, equal_nan=True)
        assert results[0].dtype == dtype


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.sampled_from([None, 1]),
)
def test_any_shape(rows: int, columns: int, groups: int, kind: str, seed: int | None) -> None:
    groups = -(-columns // -(-columns // groups))
    x, scale = 3 * torch.randn(rows, columns), torch.rand(1, groups) + 0.1
    results = [quantize(kind, x, scale, seed=seed, backend=backend) for backend in ("torch", "triton")]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "exponent", "mantissa", "reserved"),
    [
        ("float8_e4m3fn", 4, 3, "nan"),
        ("float8_e5m2", 5, 2, "ieee"),
        ("float4_e2m1fn", 2, 1, "none"),
        ("float6_e3m2fn", 3, 2, "none"),
        ("float6_e2m3fn", 2, 3, "none"),
    ],
)
def test_minifloats_round_as_an_independent_implementation(
    name: str, exponent: int, mantissa: int, reserved: str
) -> None:
    kind = getattr(ml_dtypes, name)
    top = float(ml_dtypes.finfo(kind).max)
    x = torch.cat([torch.linspace(-top, top, 999), torch.randn(500), 1e-3 * torch.randn(300)])[None]
    expected = torch.from_numpy(x.numpy().astype(kind).astype(np.float32))
    for backend in ("torch", "triton"):
        assert torch.equal(
            quantize_minifloat(x, torch.ones(1, 1), exponent, mantissa, reserved, backend=backend), expected
        )
    over = quantize_minifloat(torch.tensor([[2 * top]]), torch.ones(1, 1), exponent, mantissa, reserved)
    assert over.item() == top


def test_zero_points_shift_the_integers_and_dead_groups_stay_zero() -> None:
    x = torch.tensor([[-0.2, 0.0, 0.9, 1.7], [0.0, 0.0, 0.0, 0.0]])
    scale, zero = torch.tensor([[0.1], [0.0]]), torch.tensor([[3.0], [0.0]])
    expected = torch.tensor([[-0.2, 0.0, 0.9, 1.2], [0.0, 0.0, 0.0, 0.0]])
    for backend in ("torch", "triton"):
        torch.testing.assert_close(quantize_integer(x, scale, 0, 15, zero, backend=backend), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_is_unbiased_and_hits_neighbours_only(kind: str) -> None:
    x = torch.linspace(-0.9, 0.9, 31)[None].expand(4000, 31)
    y = quantize(kind, x, torch.ones(1, 1), seed=3)
    assert all(len(column.unique()) <= 2 for column in y.t())
    spread = y.std(0) / 4000**0.5
    assert ((y.mean(0) - x[0]).abs() <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_passes_inside_and_stops_where_clipped(kind: str, backend: str) -> None:
    x = torch.tensor([[0.3, -0.4, 100.0, -100.0]], requires_grad=True)
    quantize(kind, x, torch.ones(1, 1), backend=backend).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_nf4_is_the_published_codebook() -> None:
    assert pytest.approx(list(PUBLISHED), abs=2e-6) == list(NF4)


def test_random_bits_are_spread_and_a_function_of_the_element() -> None:
    bits = random_bits(7, 4096)
    assert torch.equal(bits[100:200], random_bits(7, 100, start=100))
    ones = ((bits[:, None] >> torch.arange(32)) & 1).double().mean(0)
    assert ((ones - 0.5).abs() < 5 * 0.5 / 4096**0.5).all()
    draws = [uniform(seed, 4096).double() for seed in range(4)]
    assert all(
        abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 5 / 4096**0.5
        for pair in itertools.combinations(draws, 2)
    )
    assert abs(float(torch.corrcoef(torch.stack([draws[0][1:], draws[0][:-1]]))[0, 1])) < 5 / 4096**0.5


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_hadamard_equals_the_dense_matrix_and_its_own_inverse(n: int) -> None:
    x = torch.randn(3, 2 * n, requires_grad=True)
    expected = (x.view(3, 2, n) @ hadamard_matrix(n)).view(3, 2 * n)
    grad = torch.randn(3, 2 * n)
    for backend in ("torch", "triton"):
        y = hadamard(x, n, backend)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hadamard(y, n, backend), x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad)[0], hadamard(grad, n), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("grid", [Numbers(0, -8.0, 7.0), Numbers(1, 0.0, 6.0, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transform_fused_with_quantization_equals_the_two_steps(grid: Numbers, dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    x[2] = 0
    for a, b in zip(
        *(hadamard_quantize(x, 32, grid, backend) for backend in ("torch", "triton")), strict=True
    ):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    left, right = torch.randn(4, 4), torch.randn(16, 16)
    for a, b in zip(
        *(kronecker_quantize(x.float(), left, right, grid, backend) for backend in ("torch", "triton")),
        strict=True,
    ):
        # The two matrix products may be summed in another order:
        # a value on a rounding boundary may go the other way.
        assert ((a - b).abs() > 1e-4 * b.abs().max()).float().mean() < 0.02


def test_kronecker_equals_the_dense_matrix_with_gradients() -> None:
    x, left, right = torch.randn(4, 60), torch.randn(3, 3), torch.randn(20, 20)
    inputs = [t.requires_grad_() for t in (x, left, right)]
    grad = torch.randn(4, 60)
    dense = x @ torch.kron(left, right.t().contiguous()).t()
    expected = torch.autograd.grad(dense, inputs, grad)
    for backend in ("torch", "triton"):
        y = kronecker(x, left, right, backend)
        torch.testing.assert_close(y, dense, atol=1e-4, rtol=1e-4)
        for a, b in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_rotation_spreads_an_outlier_and_lowers_the_error() -> None:
    x = torch.randn(64, 128)
    x[:, 5] *= 40
    grid = Numbers(0, -8.0, 7.0)
    plain = quantize_integer(x, x.abs().amax(1, keepdim=True) / 7, -8, 7)
    rotated = hadamard(hadamard_quantize(x, 128, grid)[0], 128)
    assert (rotated - x).pow(2).mean() < 0.5 * (plain - x).pow(2).mean()


def test_impossible_requests_are_refused_in_words() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(BadInput, match="equal blocks"):
        quantize_integer(x, torch.ones(3, 1), 0, 15)
    with pytest.raises(BadInput, match="low = 3"):
        quantize_integer(x, torch.ones(1, 1), 3, 3)
    with pytest.raises(BadInput, match="exponent = 8"):
        quantize_minifloat(x, torch.ones(1, 1), 8, 7)
    with pytest.raises(BadInput, match="increasing"):
        quantize_codebook(x, torch.ones(1, 1), (0.0, 0.0))
    with pytest.raises(BadInput, match="power of two"):
        hadamard(x, 6)
    with pytest.raises(BadInput, match="multiply"):
        kronecker(x, torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(BadInput, match="seed = -1"):
        quantize_integer(x, torch.ones(1, 1), 0, 15, seed=-1)
