"""Convolution by Monarch-decomposed FFTs: equal to torch.fft and to the sum in its definition."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.errors import BadInput
from workbench.kernels.sequence.fft_convolution import (
    cost,
    factors,
    fft_convolution,
    fft_convolution_reference,
    filter_spectrum,
    monarch_order,
    monarch_transform,
)


@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_matrix_products_equal_the_fft(n: int, order: int) -> None:
    x = torch.randn(2, n, dtype=torch.complex128)
    sizes = factors(n, order)
    assert math.prod(sizes) == n and len(sizes) == order
    torch.testing.assert_close(
        monarch_transform(x, sizes), torch.fft.fft(x)[:, monarch_order(sizes)], atol=1e-9, rtol=1e-9
    )


def test_reference_equals_the_definition() -> None:
    u, k = torch.randn(2, 3, 16), torch.randn(3, 16)
    expected = torch.stack([sum(k[:, s] * u[:, :, t - s] for s in range(t + 1)) for t in range(16)], -1)
    torch.testing.assert_close(fft_convolution_reference(u, k), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [128, 512])
def test_kernel_equals_the_fft_with_gradients(length: int) -> None:
    u = torch.randn(length, 2, 2).permute(1, 2, 0).requires_grad_()  # not contiguous
    k = torch.randn(2, length, requires_grad=True)
    grad = torch.randn(2, 2, length)
    expected, got = (fft_convolution(u, k, backend) for backend in ("torch", "triton"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(got, (u, k), grad), torch.autograd.grad(expected, (u, k), grad), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_in_norm(kind: torch.dtype) -> None:
    u, k = torch.randn(1, 2, 128).to(kind), torch.randn(2, 128) / 12
    expected = fft_convolution_reference(u.float(), k)
    got = fft_convolution(u, k, "triton").float()
    assert (got - expected).norm() < (0.02 if kind == torch.bfloat16 else 0.003) * expected.norm()


def test_empty_batch_and_nan_stay_where_they_are() -> None:
    k = torch.randn(2, 128)
    assert fft_convolution(torch.zeros(0, 2, 128), k, "triton").shape == (0, 2, 128)
    u = torch.randn(2, 2, 128)
    u[0, 1, 5] = float("nan")
    y = fft_convolution(u, k, "triton")
    assert y[0, 1].isnan().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()


def test_dropping_high_frequencies_of_a_smooth_filter_changes_little() -> None:
    time = torch.arange(512) / 512
    k = torch.exp(-8 * time)[None] * torch.cos(20 * time)[None]
    whole = filter_spectrum(k, (32, 32))
    errors = [
        float((filter_spectrum(k, (32, 32), kept) - whole).norm() / whole.norm()) for kept in (1.0, 0.5, 0.25)
    ]
    assert errors[0] == 0 and errors[0] < errors[1] < errors[2] < 0.2


def test_longer_sequences_want_higher_orders() -> None:
    device = {"bandwidth": 3.35e12, "tensor": 989e12, "on_chip": 3e13}
    best = [min((1, 2, 3, 4), key=lambda order: cost(n, order, 1, **device)) for n in (2**8, 2**12, 2**20)]
    assert best == sorted(best) and best[0] < best[-1]


def test_impossible_shapes_are_refused_in_words() -> None:
    with pytest.raises(BadInput, match="power of two"):
        fft_convolution(torch.zeros(1, 2, 100), torch.zeros(2, 100))
    with pytest.raises(BadInput, match="order = 3"):
        factors(4, 3)
