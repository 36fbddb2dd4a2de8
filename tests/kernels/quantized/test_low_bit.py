"""Low-bit products: the kernel equals a product with the decoded weight;
decoding equals independent implementations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.quantized.low_bit_linear import FORMATS, _launch, low_bit_linear, pack_weight
from workbench.kernels.quantized.scaled_matmul import (
    blocked_linear_int8,
    quantize_blocks,
    quantize_rows,
    scaled_matmul,
    scaled_matmul_reference,
)

#: Largest relative error of one weight against the largest of its group, by format.
STEP = {"int4": 0.5 / 7, "int8": 0.5 / 127, "nf4": 0.16, "e4m3": 1 / 16, "e2m1": 1 / 3}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out", "width", "group"), [(5, 128, 32), (70, 64, 16)])
def test_decoding_is_within_half_a_step_and_the_kernel_equals_the_decoded_product(
    format: str, out: int, width: int, group: int
) -> None:
    w = torch.randn(out, width)
    w[0, :group] = 0
    weight = pack_weight(w, format, group)
    assert weight.shape == (out, width)
    largest = w.view(out, -1, group).abs().amax(2, keepdim=True)
    error = (weight.dense() - w).view(out, -1, group).abs()
    assert (error <= STEP[format] * largest + 1e-7).all()
    x, bias = torch.randn(3, width), torch.randn(out)
    expected = F.gelu(x @ weight.dense().t() + bias)
    for backend in ("torch", "triton"):
        torch.testing.assert_close(
            low_bit_linear(x, weight, bias, "gelu", backend), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_zero_points_fit_a_one_sided_range(format: str) -> None:
    w = torch.rand(6, 64) + 1.0
    symmetric, shifted = (pack_weight(w, format, 32, zero_point=z) for z in (False, True))
    assert (shifted.dense() - w).abs().max() <= (symmetric.dense() - w).abs().max() * 1.2
    x = torch.randn(20, 64)
    torch.testing.assert_close(
        low_bit_linear(x, shifted, backend="triton"), x @ shifted.dense().t(), atol=1e-4, rtol=1e-4
    )


def test_every_fp8_code_decodes_as_the_hardware_type() -> None:
    weight = pack_weight(torch.randn(16, 16), "e4m3", 16)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight = type(weight)(codes, torch.ones(16, 1), "e4m3", 16)
    decoded = _launch(torch.eye(16), weight, None, False).t()
    finite = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.isnan(decoded).any(1), torch.isnan(finite).any(1))
    rows = ~torch.isnan(finite).any(1)
    assert torch.equal(decoded[rows], finite[rows])


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from(FORMATS),
    st.sampled_from([1, 2, 4]),
)
def test_any_shape_and_any_split_of_the_sum(
    tokens: int, out: int, groups: int, format: str, splits: int
) -> None:
    weight = pack_weight(torch.randn(out, 32 * groups), format, 32)
    x = torch.randn(tokens, 32 * groups)
    torch.testing.assert_close(
        _launch(x, weight, None, False, splits), x @ weight.dense().t(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_reaches_the_input_through_the_frozen_weight(backend: str) -> None:
    weight = pack_weight(torch.randn(8, 64), "nf4", 64)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    grad = torch.randn(3, 8)
    dx, db = torch.autograd.grad(low_bit_linear(x, weight, bias, backend=backend), (x, bias), grad)
    torch.testing.assert_close(dx, grad @ weight.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(db, grad.sum(0))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_activations_from_a_strided_view(kind: torch.dtype) -> None:
    weight = pack_weight(torch.randn(20, 64), "int4", 32)
    x = torch.randn(64, 5).to(kind).t()
    y = low_bit_linear(x, weight, backend="triton")
    assert y.dtype == kind
    torch.testing.assert_close(y.float(), x.float() @ weight.dense().t(), atol=0.15, rtol=2e-2)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 5, 40), (20, 70, 128), (0, 4, 32)])
def test_scaled_product_equals_the_product_of_the_decoded_matrices(
    kind: torch.dtype, rows: int, columns: int, width: int
) -> None:
    x, w = quantize_rows(torch.randn(rows, width), kind), quantize_rows(torch.randn(columns, width), kind)
    bias = torch.randn(columns)
    expected = scaled_matmul_reference(*x, *w, bias, "gelu")
    for backend in ("torch", "triton"):
        torch.testing.assert_close(
            scaled_matmul(*x, *w, bias, "gelu", backend=backend), expected, atol=1e-4, rtol=1e-4
        )


def test_blocked_int8_keeps_an_outlier_channel_from_spoiling_the_others() -> None:
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    x[:, 3] *= 100
    blocked = scaled_matmul(*quantize_blocks(x), *quantize_blocks(w), backend="triton")
    torch.testing.assert_close(
        blocked, scaled_matmul_reference(*quantize_blocks(x), *quantize_blocks(w)), atol=1e-3, rtol=1e-4
    )
    codes, scale = quantize_blocks(x)
    by_block = codes * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes, scale = quantize_rows(x)
    by_row = codes * scale[:, None]
    clean = torch.arange(128) // 32 > 0  # columns of the blocks without the outlier
    assert (by_block - x)[:, clean].norm() < 0.1 * (by_row - x)[:, clean].norm()


@pytest.mark.parametrize("rows", [32, 96])
def test_int8_in_int8_out_equals_the_wide_product_quantized_after(rows: int) -> None:
    x, w, bias = torch.randn(rows, 64), torch.randn(96, 64), torch.randn(96)
    results = [
        blocked_linear_int8(*quantize_blocks(x), *quantize_blocks(w), bias, "gelu", backend)
        for backend in ("torch", "triton")
    ]
    (codes, scales), (kernel_codes, kernel_scales) = results
    assert kernel_codes.dtype == torch.int8 and kernel_scales.shape == (rows // 32, 3)
    torch.testing.assert_close(kernel_scales, scales, atol=1e-6, rtol=1e-4)
    difference = (kernel_codes.int() - codes.int()).abs()
    assert (
        difference.max() <= 1 and difference.float().mean() < 0.01
    )  # sums in another order: a tie may round the other way
    exact = torch.nn.functional.gelu(x @ w.t() + bias)
    decoded = kernel_codes * kernel_scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert (decoded - exact).norm() < 0.02 * exact.norm()


def test_int8_sums_are_exact_at_the_extremes() -> None:
    x = torch.full((2, 512), -128, dtype=torch.int8)
    w = torch.full((3, 512), 127, dtype=torch.int8)
    y = scaled_matmul(x, torch.ones(2), w, torch.ones(3), backend="triton")
    assert (y == -128 * 127 * 512).all()


def test_impossible_requests_are_refused_in_words() -> None:
    w = torch.zeros(4, 48)
    with pytest.raises(BadInput, match="format = 'int3'"):
        pack_weight(w, "int3")
    with pytest.raises(BadInput, match="group = 32"):
        pack_weight(w, "int4", 32)
    with pytest.raises(BadInput, match="zero_point"):
        pack_weight(w, "nf4", 16, zero_point=True)
    with pytest.raises(BadInput, match="48 input features"):
        low_bit_linear(torch.zeros(2, 32), pack_weight(w, "int4", 16))
    with pytest.raises(BadInput, match="two int8"):
        scaled_matmul(w, torch.ones(4), w, torch.ones(4))
