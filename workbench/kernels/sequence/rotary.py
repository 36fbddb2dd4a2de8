"""Rotary position embedding of packed queries and keys (Su et al., 2021; halves layout of Llama),
forward and backward.

    y1 = x1 cos - s x2 sin,   y2 = x2 cos + s x1 sin,   x = [x1, x2],
        s = 1 forward, -1 backward (the transposed rotation)

>>> x = torch.randn(5, 2, 8)
>>> cos, sin = rotary_tables(16, 8)
>>> y = rotary(x, cos, sin, torch.tensor([0, 1, 2, 0, 1]))
>>> bool(torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)), bool((y[3] == x[3]).all())
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


def rotary_tables(
    length: int, head_dim: int, theta: float = 10000.0, device: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (length, head_dim / 2) fp32: angle of position p and pair i is p * theta^(-2
    i / head_dim).
    """
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * inverse
    return angles.cos().float(), angles.sin().float()


def rotary_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, sign: float = 1.0
) -> torch.Tensor:
    """The rotation in plain PyTorch; x (tokens, heads, head_dim), computed in fp32, returned in x's type."""
    c, s = cos[positions][:, None], sign * sin[positions][:, None]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype)


@jit
def _rotary(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    y_ptr,
    tokens,
    heads,
    stride_token,
    stride_head,
    sign,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # a row is one head of one token
    inside = rows < tokens * heads
    token = rows // heads
    head = rows % heads
    pair = tl.arange(0, BLOCK_HALF)
    mask = inside[:, None] & (pair < HALF)[None, :]
    position = tl.load(positions_ptr + token, mask=inside, other=0).to(tl.int64)
    cos = tl.load(cos_ptr + position[:, None] * HALF + pair[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position[:, None] * HALF + pair[None, :], mask=mask, other=0.0) * sign
    first = x_ptr + token[:, None].to(tl.int64) * stride_token + head[:, None] * stride_head + pair[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    out = y_ptr + rows[:, None].to(tl.int64) * (2 * HALF) + pair[None, :]
    tl.store(out, narrow(x1 * cos - x2 * sin, y_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, narrow(x2 * cos + x1 * sin, y_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, sign: float
) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, dim = x.shape
    if y.numel():
        half = dim // 2
        with on_device(x):
            _rotary[(cdiv(tokens * heads, 16),)](
                x,
                cos,
                sin,
                positions,
                y,
                tokens,
                heads,
                x.stride(0),
                x.stride(1),
                sign,
                HALF=half,
                BLOCK_HALF=power_of_two(half),
                ROWS=16,
                num_warps=4,
            )
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, positions)
        return _launch(x, cos, sin, positions, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin, positions = ctx.saved_tensors
        return _launch(grads[0], cos, sin, positions, -1.0), None, None, None


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Rotate x (tokens, heads, head_dim) by the angles at `positions` (tokens,);
    tables (length, head_dim / 2) fp32.
    """
    if x.ndim != 3 or x.shape[-1] % 2 or cos.shape[-1] * 2 != x.shape[-1]:
        raise BadInput(
            f"x.shape = {tuple(x.shape)}, cos.shape = {tuple(cos.shape)}: "
            "need (tokens, heads, even dim) and (length, dim / 2)"
        )
    if use_triton("rotary", x.numel(), x, backend):
        return _Rotary.apply(x, cos.contiguous(), sin.contiguous(), positions)
    return rotary_reference(x, cos, sin, positions)


KERNELS = (
    Kernel(
        "rotary.forward_backward",
        _rotary,
        tuple(
            Configuration(
                f"{kind}-d{dim}",
                {
                    "x_ptr": f"*{kind}",
                    "cos_ptr": "*fp32",
                    "sin_ptr": "*fp32",
                    "positions_ptr": "*i64",
                    "y_ptr": f"*{kind}",
                    "sign": "fp32",
                },
                {"HALF": dim // 2, "BLOCK_HALF": dim // 2, "ROWS": 16},
            )
            for kind, dim in (("bf16", 64), ("bf16", 128), ("fp32", 64))
        ),
    ),
)


def cases() -> list[Case]:
    """Queries of a 7B model, 16,384 tokens."""
    tokens, heads, dim = 16384, 32, 128

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(tokens, heads, dim, device=device, dtype=torch.bfloat16)
        cos, sin = rotary_tables(4096, dim, device=device)
        positions = torch.arange(tokens, device=device) % 4096
        return lambda: rotary(x, cos, sin, positions, "triton"), lambda: rotary_reference(
            x, cos, sin, positions
        )

    n = tokens * heads * dim
    return [Case("rotary", f"{tokens} x {heads} x {dim} bf16", n, 4.0 * n, 3.0 * n, make)]
