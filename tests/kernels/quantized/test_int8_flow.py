"""int8 from operator to operator: kernels against the definition, the definition against autograd,
and the error of its blocks.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.quantized.int8_flow import (
    add_int8,
    decode_blocks,
    gelu_int8,
    gelu_int8_backward,
    layer_norm_int8,
    layer_norm_int8_backward,
)
from workbench.kernels.quantized.scaled_matmul import quantize_blocks


def agree(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Scales to fp32 rounding; codes equal but for values that lie between two codes to that rounding."""
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-12)
    apart = (one[0].int() - other[0].int()).abs()
    assert apart.numel() == 0 or (apart.max() <= 1 and apart.float().mean() < 0.01)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(0, 3), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_pointwise_kernels_equal_the_definition(rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (quantize_blocks(3 * torch.randn(32 * rows, 32 * columns, generator=draw)) for _ in range(2))
    agree(gelu_int8(*a, backend="triton"), quantize_blocks(F.gelu(decode_blocks(*a))))
    agree(add_int8(a, b, backend="triton"), quantize_blocks(decode_blocks(*a) + decode_blocks(*b)))
    agree(gelu_int8_backward(b, a, backend="triton"), gelu_int8_backward(b, a, backend="torch"))


def test_gelu_backward_is_the_gradient() -> None:
    x, g = quantize_blocks(torch.randn(32, 64)), quantize_blocks(torch.randn(32, 64))
    value = decode_blocks(*x).requires_grad_()
    F.gelu(value).backward(decode_blocks(*g))
    for backend in ("torch", "triton"):
        agree(gelu_int8_backward(g, x, backend), quantize_blocks(value.grad))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "shift", [0.0, 1000.0]
)  # a mean far above the spread would cancel in a one-pass variance
def test_layer_norm_and_its_gradients(backend: str, shift: float) -> None:
    x, g = quantize_blocks(torch.randn(64, 96) + shift), quantize_blocks(torch.randn(64, 96))
    w, b = torch.rand(96) + 0.5, torch.randn(96)
    value, weight, bias = (
        decode_blocks(*x).requires_grad_(),
        w.clone().requires_grad_(),
        b.clone().requires_grad_(),
    )
    exact = F.layer_norm(value, (96,), weight, bias)
    exact.backward(decode_blocks(*g))
    y, mean, inverse = layer_norm_int8(*x, w, b, backend=backend)
    torch.testing.assert_close(decode_blocks(*y), exact.detach(), rtol=0, atol=float(y[1].max()) * 0.51)
    torch.testing.assert_close(mean, decode_blocks(*x).mean(1), rtol=1e-5, atol=1e-5)
    dx, dw, db = layer_norm_int8_backward(g, x, w, mean, inverse, backend=backend)
    torch.testing.assert_close(decode_blocks(*dx), value.grad, rtol=0, atol=float(dx[1].max()) * 0.51)
    torch.testing.assert_close(dw, weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(db, bias.grad, rtol=1e-4, atol=1e-3)


def test_strided_codes_zeros_and_the_backends_agree() -> None:
    codes, scales = quantize_blocks(torch.randn(64, 128))
    wide = torch.zeros(64, 256, dtype=torch.int8)
    wide[:, ::2] = codes
    agree(gelu_int8(wide[:, ::2], scales, "triton"), gelu_int8(codes, scales, "triton"))
    zero = torch.zeros(32, 32, dtype=torch.int8), torch.zeros(1, 1)
    for backend in ("torch", "triton"):
        assert not gelu_int8(*zero, backend=backend)[0].any()
        assert torch.isfinite(
            layer_norm_int8(*zero, torch.ones(32), torch.zeros(32), backend=backend)[0][1]
        ).all()


def test_blocks_keep_an_outlier_channel_to_itself() -> None:
    """Why blocks: one channel a hundred times the others spoils every row's scale,
    or only its own column of blocks.
    """
    x = torch.randn(128, 128)
    x[:, 5] *= 100
    rest = [c for c in range(128) if c >= 32]
    tokens = x.abs().amax(1, keepdim=True) / 127
    by_token = torch.round(x / tokens) * tokens
    by_block = decode_blocks(*quantize_blocks(x))
    assert (by_block - x)[:, rest].norm() < 0.05 * (by_token - x)[:, rest].norm()


def test_wrong_shapes_are_named() -> None:
    codes, scales = quantize_blocks(torch.randn(32, 64))
    with pytest.raises(BadInput, match="add: codes"):
        add_int8((codes, scales), (codes[:, :32], scales[:, :1]))
    with pytest.raises(BadInput, match="scale for each 32 x 32 block"):
        gelu_int8(codes, scales[:, :1])
    with pytest.raises(BadInput, match="int8"):
        gelu_int8(codes.float(), scales)
