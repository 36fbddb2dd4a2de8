"""Kronecker-factored transform of rows with quantization fused in:
y_t = A x_t B for each row x seen as an a x b matrix.

    y = (A kron B^T) x,   A (a, a), B (b, b), a b = columns;
        then y is quantized with one scale per row (per token)

Sun et al. (2025, FlatQuant): a dense n x n transform costs n^2 multiplications per row, the two factors n
(a + b), and the row never leaves the chip between them and the quantizer.

>>> x, A, B = torch.randn(3, 12), torch.randn(3, 3), torch.randn(4, 4)
>>> bool(torch.allclose(kronecker(x, A, B), x @ torch.kron(A, B.T.contiguous()).T, atol=1e-5))
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import jit, mma, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.quantized.numbers import Numbers, limits
from workbench.kernels.quantized.quantize import quantize_block
from workbench.kernels.quantized.quantize_reference import quantize_reference
from workbench.kernels.registry import Case, Configuration, Kernel


def kronecker_reference(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A X_t B in fp32 or wider, returned in x's type; differentiable in all three.

    Factors may be stacks (..., a, a) and (..., b, b), one for each matrix of rows in x (..., rows, a b).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).unflatten(-1, (left.shape[-1], right.shape[-1]))
    left, right = left.to(wide).unsqueeze(-3), right.to(wide).unsqueeze(-3)
    return (left @ rows @ right).flatten(-2).to(x.dtype)


@jit
def _kronecker(
    x_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    scale_ptr,
    low,
    high,
    A: tl.constexpr,
    B: tl.constexpr,
    A_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, A_PAD)
    j = tl.arange(0, B_PAD)
    inside = (i < A)[:, None] & (j < B)[None, :]
    offsets = i[:, None] * B + j[None, :]
    x = tl.load(x_ptr + row * (A * B) + offsets, mask=inside, other=0.0)
    a = tl.load(a_ptr + i[:, None] * A + i[None, :], mask=(i < A)[:, None] & (i < A)[None, :], other=0.0).to(
        x.dtype
    )
    b = tl.load(b_ptr + j[:, None] * B + j[None, :], mask=(j < B)[:, None] & (j < B)[None, :], other=0.0).to(
        x.dtype
    )
    half = mma(a, x, tl.zeros([A_PAD, B_PAD], tl.float32))
    y = mma(narrow(half, x.dtype), b, tl.zeros([A_PAD, B_PAD], tl.float32))
    if QUANTIZE:
        s = tl.div_rn(tl.max(tl.max(tl.abs(y), 1), 0), high + 0.0)
        tl.store(scale_ptr + row, s)
        s = s + tl.zeros_like(y)
        y = quantize_block(
            y, s, tl.zeros_like(y), low, high, scale_ptr, y, KIND, EXPONENT, MANTISSA, 0, False
        )
    tl.store(y_ptr + row * (A * B) + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, grid: Numbers | None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    a, b = left.shape[0], right.shape[0]
    rows = x.numel() // (a * b)
    scale = torch.empty(max(rows, 1) if grid else 1, dtype=torch.float32, device=x.device)
    low, high = limits(grid) if grid else (0.0, 1.0)
    if rows:
        with on_device(x):
            _kronecker[(rows,)](
                x,
                left.contiguous(),
                right.contiguous(),
                y,
                scale,
                low,
                high,
                A=a,
                B=b,
                A_PAD=power_of_two(a, 16),
                B_PAD=power_of_two(b, 16),
                QUANTIZE=grid is not None,
                KIND=grid.kind if grid else 0,
                EXPONENT=grid.exponent if grid else 0,
                MANTISSA=grid.mantissa if grid else 0,
                num_warps=4,
            )
    return y, scale[:rows]


class _Kronecker(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, left, right)
        return _launch(x, left, right, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dX = A^T G B^T by the same kernel; dA = sum_t G (X B)^T and dB = sum_t
        (A X)^T G are two batched products.
        """
        x, left, right = ctx.saved_tensors
        g = grads[0].contiguous()
        dx = _Kronecker.apply(g, left.t(), right.t())
        rows, g32 = (t.reshape(-1, left.shape[0], right.shape[0]).float() for t in (x, g))
        da = torch.einsum("tij,tkj->ik", g32, rows @ right.float())
        db = torch.einsum("tik,til->kl", left.float() @ rows, g32)
        return dx, da.to(left.dtype), db.to(right.dtype)


def _check(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    square = all(m.ndim >= 2 and m.shape[-1] == m.shape[-2] for m in (left, right))
    if not square or left.shape[-1] * right.shape[-1] != x.shape[-1]:
        raise BadInput(
            f"factors {tuple(left.shape)}, {tuple(right.shape)} and {x.shape[-1]} columns: "
            "need square factors whose sizes multiply to the columns"
        )


def _fused(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, backend: str) -> bool:
    fits = left.ndim == right.ndim == 2 and max(len(left), len(right)) <= 128 and x.dtype != torch.float64
    return fits and use_triton("kronecker", x.numel(), x, backend)


def kronecker(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """A X_t B for each row of x (..., a b), left A (a, a), right B (b, b); differentiable in all three.
    Stacked factors (see the reference), and ones above 128, go through PyTorch.
    """
    _check(x, left, right)
    if _fused(x, left, right, backend):
        return _Kronecker.apply(x, left, right)
    return kronecker_reference(x, left, right)


def kronecker_quantize(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, grid: Numbers, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform and quantize-dequantize each row with scale max|.| / grid.high;
    returns (result, scales (...)). Forward only.
    """
    _check(x, left, right)
    if grid.kind == 2:
        raise BadInput(
            "grid: a codebook cannot be fused with the transform; use kronecker, then quantize_codebook"
        )
    if _fused(x, left, right, backend):
        y, scale = _launch(x, left, right, grid)
        return y, scale.view(x.shape[:-1])
    y = kronecker_reference(x.float(), left, right).reshape(-1, x.shape[-1])
    scale = y.abs().amax(1, keepdim=True) / grid.high
    return quantize_reference(y, scale, None, grid, x.shape[-1]).view(x.shape).to(x.dtype), scale.view(
        x.shape[:-1]
    )


KERNELS = (
    Kernel(
        "kronecker.forward",
        _kronecker,
        tuple(
            Configuration(
                f"{a}x{b}{'-int' if quantize else ''}",
                {
                    "x_ptr": "*bf16",
                    "a_ptr": "*bf16",
                    "b_ptr": "*bf16",
                    "y_ptr": "*bf16",
                    "scale_ptr": "*fp32",
                    "low": "fp32",
                    "high": "fp32",
                },
                {
                    "A": a,
                    "B": b,
                    "A_PAD": power_of_two(a, 16),
                    "B_PAD": power_of_two(b, 16),
                    "QUANTIZE": quantize,
                    "KIND": 0,
                    "EXPONENT": 0,
                    "MANTISSA": 0,
                },
            )
            for a, b, quantize in ((64, 64, False), (64, 64, True), (24, 16, True))
        ),
    ),
)


def cases() -> list[Case]:
    """8192 tokens of width 4096 = 64 x 64, to int4 per token."""
    rows, a = 8192, 64

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, a * a, device=device, dtype=torch.bfloat16)
        left, right = (torch.linalg.qr(torch.randn(a, a, device=device))[0].to(x.dtype) for _ in "ab")
        grid = Numbers(0, -8, 7)
        return lambda: _launch(x, left, right, grid), lambda: kronecker_quantize(
            x, left, right, grid, "torch"
        )

    n = rows * a * a
    return [
        Case("kronecker", f"{rows} x {a * a} bf16 = {a} x {a}, int4", n, 4.0 * n, 4.0 * n * a, make, "bf16")
    ]
