"""2:4 sparsity: of every four neighbouring weights two are kept,
stored as their values and two 2-bit positions.

A row of K weights becomes K/2 values and K/4 half-bytes: 9/16 of the memory of bf16. The kernel expands tiles
on the chip and multiplies on dense tensor cores (Triton does not reach the sparse ones), so it wins where
the weight's bytes are the time: small batches. Mishra et al. (2021); training with it:
Mozaffari et al. (2025, SLoPe), Huang et al. (2025, AST).

>>> w = torch.tensor([[1.0, -3.0, 0.5, 2.0, 0.0, 0.0, 4.0, 0.1]])
>>> compressed = compress_2_4(w)
>>> compressed.values
tensor([[-3.0000,  2.0000,  4.0000,  0.1000]])
>>> compressed.dense()
tensor([[ 0.0000, -3.0000,  0.0000,  2.0000,  0.0000,  0.0000,  4.0000,  0.1000]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, mma, narrow, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


@dataclass(frozen=True)
class SemiStructured:
    """`values` (out, in / 2); `positions` (out, in / 4) uint8:
    first | second << 2, each 0..3, first < second.
    """

    values: torch.Tensor
    positions: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]

    def dense(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The full matrix (out, in); differentiable in `values`."""
        values = self.values if values is None else values
        out, width = self.shape
        places = torch.stack([self.positions & 3, self.positions >> 2], -1).long()
        dense = values.new_zeros(out, width // 4, 4)
        return dense.scatter(2, places, values.view(out, width // 4, 2)).view(out, width)


def mask_2_4(weight: torch.Tensor, saliency: torch.Tensor | None = None) -> torch.Tensor:
    """Bool mask that keeps the two most salient of every four
    (magnitude by default; of equal ones the first).
    """
    score = (weight.abs() if saliency is None else saliency).reshape(-1, 4)
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :2], True).view(weight.shape)


def compress_2_4(weight: torch.Tensor, mask: torch.Tensor | None = None) -> SemiStructured:
    """Compress a weight (out, in), in a multiple of 4; `mask` (two of each four)
    defaults to the larger magnitudes.
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise BadInput(f"weight.shape = {tuple(weight.shape)}: need (out, in) with in a multiple of 4")
    mask = mask_2_4(weight) if mask is None else mask
    groups = mask.view(weight.shape[0], -1, 4)
    if not bool((groups.sum(2) == 2).all()):
        raise BadInput("mask: every four neighbouring columns must keep exactly two")
    places = groups.nonzero(as_tuple=True)[2].view(weight.shape[0], -1, 2)
    values = weight.reshape(groups.shape).gather(2, places).flatten(1)
    return SemiStructured(values.contiguous(), (places[..., 0] | places[..., 1] << 2).to(torch.uint8))


def double_prune(weight: torch.Tensor) -> torch.Tensor:
    """2:4 along rows, then at most 2 of 4 along columns too: the mask for the input gradient (SLoPe).

    The second pruning removes another 9.375 % of all weights on average for random ones.
    """
    rows = mask_2_4(weight)
    columns = mask_2_4((weight.abs() * rows).t().contiguous()).t()
    return rows & columns


@jit
def _linear(
    x_ptr,
    v_ptr,
    p_ptr,
    y_ptr,
    tokens,
    out_features,
    width,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + t[:, None].to(tl.int64) * x_stride + k[None, :],
            mask=(t < tokens)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        g = first // 4 + tl.arange(0, DEPTH // 4)
        here = (n < out_features)[:, None] & (g < width // 4)[None, :]
        base = n[:, None].to(tl.int64) * (width // 4) + g[None, :]
        places = tl.load(p_ptr + base, mask=here, other=4)
        v0 = tl.load(v_ptr + 2 * base, mask=here, other=0.0)
        v1 = tl.load(v_ptr + 2 * base + 1, mask=here, other=0.0)
        p0 = places & 3
        p1 = places >> 2
        zero = tl.zeros_like(v0)
        d0 = tl.where(p0 == 0, v0, zero)  # the second position is never 0, the first never 3
        d1 = tl.where(p0 == 1, v0, tl.where(p1 == 1, v1, zero))
        d2 = tl.where(p0 == 2, v0, tl.where(p1 == 2, v1, zero))
        d3 = tl.where(p1 == 3, v1, zero)
        w = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), [COLUMNS, DEPTH])
        acc = mma(x, tl.trans(w), acc)
    out = y_ptr + t[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(
        out, narrow(acc, y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & (n < out_features)[None, :]
    )


def _tile(tokens: int) -> dict[str, int]:
    return (
        {"ROWS": 16, "COLUMNS": 64, "DEPTH": 128}
        if tokens <= 16
        else {"ROWS": 64, "COLUMNS": 64, "DEPTH": 64}
    )


def _launch(x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, width, out = x.shape[0], x.shape[1], values.shape[0]
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = _tile(tokens)
        with on_device(x):
            _linear[(cdiv(out, tile["COLUMNS"]), cdiv(tokens, tile["ROWS"]))](
                x, values, positions, y, tokens, out, width, x.stride(0), **tile, num_warps=4, num_stages=3
            )
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, weight: SemiStructured) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        ctx.weight = weight
        return _launch(x, values.contiguous(), weight.positions)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Both products are dense by nature: the transpose of a 2:4 matrix is not 2:4."""
        x, values = ctx.saved_tensors
        g, weight = grads[0], ctx.weight
        dx = g @ weight.dense(values) if ctx.needs_input_grad[0] else None
        dv = None
        if ctx.needs_input_grad[1]:
            places = torch.stack([weight.positions & 3, weight.positions >> 2], -1).long()
            dv = (g.t() @ x).view(weight.shape[0], -1, 4).gather(2, places).view(values.shape)
        return dx, dv, None


def semi_structured_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    weight: SemiStructured,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x (..., in) times the transpose of a 2:4 weight, plus bias;
    differentiable in x, values (out, in / 2) and bias.
    """
    if x.shape[-1] != weight.shape[1] or values.shape != weight.values.shape:
        raise BadInput(
            f"x {tuple(x.shape)}, values {tuple(values.shape)}: "
            f"need (..., {weight.shape[1]}) and {tuple(weight.values.shape)}"
        )
    flat = x.reshape(-1, weight.shape[1])
    if use_triton("semi_structured", 2 * flat.shape[0] * weight.shape[0] * weight.shape[1], x, backend):
        y = _Linear.apply(flat, values, weight)
        y = y if bias is None else y + bias
    else:
        y = F.linear(flat, weight.dense(values), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


KERNELS = (
    Kernel(
        "semi_structured.forward",
        _linear,
        tuple(
            Configuration(
                f"{kind}-t{tokens}",
                {"x_ptr": f"*{kind}", "v_ptr": f"*{kind}", "p_ptr": "*u8", "y_ptr": f"*{kind}"},
                _tile(tokens),
            )
            for kind, tokens in (("bf16", 16), ("bf16", 64), ("fp16", 16))
        ),
    ),
)


def cases() -> list[Case]:
    """4096 x 14336, batch 1 to 16."""
    out, width = 4096, 14336

    def make(tokens: int, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        dense = torch.randn(out, width, device=device, dtype=torch.bfloat16)
        weight = compress_2_4(dense)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        return lambda: _launch(x, weight.values, weight.positions), lambda: x @ dense.t()

    return [
        Case(
            "semi_structured",
            f"{t} x {width} x {out} bf16",
            2 * t * out * width,
            1.25 * out * width + 2.0 * t * (width + out),
            2.0 * t * out * width,
            lambda device, t=t: make(t, device),  # type: ignore[misc]
            "bf16",
            "dense matmul",
        )
        for t in (1, 16)
    ]
