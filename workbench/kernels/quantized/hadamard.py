"""Fast Walsh-Hadamard transform of rows, orthonormal, with quantization of the result fused in
(QuaRot, HALO, INT4 training).

    y = H x / sqrt(n),   H the n x n Sylvester matrix, applied to each block of n = 2^k columns

A block is read once, goes through its log2 n butterflies in registers and shared memory, and is written once.
H is symmetric and orthogonal, so the transform is its own inverse and its own backward (Hadamard quantizers:
Xi et al., 2023; Ashkboos et al., 2025).

>>> x = torch.randn(3, 64)
>>> bool(torch.allclose(hadamard(hadamard(x)), x, atol=1e-5))
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, tl, use_triton
from workbench.kernels.quantized.numbers import Numbers, limits
from workbench.kernels.quantized.quantize import quantize_block
from workbench.kernels.quantized.quantize_reference import quantize_reference
from workbench.kernels.registry import Case, Configuration, Kernel


def hadamard_matrix(
    n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The orthogonal Sylvester-Hadamard matrix of a power of two (Sylvester 1867), symmetric: entry (i, j) is
    (-1) to the number of ones in i AND j, over sqrt(n).

    >>> hadamard_matrix(4)[3]
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """
    found = torch.ones(1, 1, device=device, dtype=dtype)
    while len(found) < n:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(n)


#: The widest block whose product with the dense matrix is as fast on a processor as the butterflies.
DENSE = 512


def hadamard_reference(x: torch.Tensor, block: int, along: int = -1) -> torch.Tensor:
    """The transform in fp32 or wider, returned in x's type; x (..., columns), columns a multiple of block."""
    if block > DENSE:
        return butterflies(x, block) if along == -1 else butterflies(x.mT, block).mT
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(along, (-1, block))
    matrix = hadamard_matrix(block, x.device, wide.dtype)
    y = (wide @ matrix).flatten(-2) if along == -1 else (matrix @ wide).flatten(-3, -2)
    return y.to(x.dtype)


def butterflies(x: torch.Tensor, block: int) -> torch.Tensor:
    """The same in n log n, sums and differences in the kernel's order, bit for bit."""
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, block)
    width = 1
    while width < block:
        pairs = y.view(-1, block // (2 * width), 2, width)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(-1, block)
        width *= 2
    return (y * block**-0.5).view(x.shape).to(x.dtype)


@jit
def _butterflies(x, ROWS: tl.constexpr, N: tl.constexpr, LOG: tl.constexpr):
    """Sum and difference over one binary digit of the column number at a time; no data leaves the block."""
    for digit in tl.static_range(LOG):
        y = tl.reshape(x, [ROWS, N >> (digit + 1), 2, 1 << digit])
        y = tl.permute(y, [0, 1, 3, 2])
        a, b = tl.split(y)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, N])
    return x


@jit
def _hadamard(
    x_ptr,
    y_ptr,
    scale_ptr,
    blocks,
    norm,
    low,
    high,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None].to(tl.int64) * N + tl.arange(0, N)[None, :]
    inside = (rows < blocks)[:, None]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = _butterflies(x, ROWS, N, LOG) * norm
    if QUANTIZE:
        # The scale of a block is its own largest magnitude, known only now that the block is transformed.
        s = tl.div_rn(tl.max(tl.abs(y), 1), high + tl.zeros([ROWS], tl.float32))
        tl.store(scale_ptr + rows, s, mask=rows < blocks)
        s = s[:, None] + tl.zeros_like(y)
        y = quantize_block(
            y, s, tl.zeros_like(y), low, high, scale_ptr, y, KIND, EXPONENT, MANTISSA, 0, False
        )
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def _launch(x: torch.Tensor, block: int, grid: Numbers | None) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks = x.numel() // block
    scale = torch.empty(blocks if grid else 1, dtype=torch.float32, device=x.device)
    low, high = limits(grid) if grid else (0.0, 1.0)
    if blocks:
        rows = max(1, 2048 // block)
        with on_device(x):
            _hadamard[(cdiv(blocks, rows),)](
                x,
                y,
                scale,
                blocks,
                block**-0.5,
                low,
                high,
                ROWS=rows,
                N=block,
                LOG=int(math.log2(block)),
                QUANTIZE=grid is not None,
                KIND=grid.kind if grid else 0,
                EXPONENT=grid.exponent if grid else 0,
                MANTISSA=grid.mantissa if grid else 0,
                num_warps=4,
            )
    return y, scale


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: int) -> torch.Tensor:
        ctx.block = block
        return _launch(x, block, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Hadamard.apply(grads[0], ctx.block), None


#: The widest block that the kernel keeps on the chip.
WIDEST = 8192


def _check(x: torch.Tensor, block: int | None, along: int = -1) -> int:
    if along not in (-1, -2):
        raise BadInput(f"along = {along}: -1 (columns) or -2 (rows) is needed")
    columns = x.shape[along]
    block = block or (columns & -columns)
    if block < 1 or block & (block - 1) or columns % block:
        raise BadInput(
            f"block = {block} with {columns} columns: a power of two that divides the columns is needed"
        )
    return block


def _fused(x: torch.Tensor, block: int, backend: str) -> bool:
    fits = 2 <= block <= WIDEST and x.dtype != torch.float64
    return fits and use_triton("hadamard", x.numel(), x, backend)


def hadamard(
    x: torch.Tensor, block: int | None = None, backend: str = "auto", along: int = -1
) -> torch.Tensor:
    """Orthonormal transform of each `block` columns of x (..., columns), differentiable any number of times.

    `block` defaults to the largest power of two that divides the columns; `along=-2` transforms rows instead.
    Computed in fp32 (fp64 for fp64), returned in x's type. Blocks of 1 and above `WIDEST` go through PyTorch.
    """
    block = _check(x, block, along)
    if not _fused(x, block, backend):
        return hadamard_reference(x, block, along)
    return _Hadamard.apply(x, block) if along == -1 else _Hadamard.apply(x.mT, block).mT


def hadamard_quantize(
    x: torch.Tensor, block: int, grid: Numbers, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform and quantize-dequantize each block with scale max|.| / grid.high;
    returns (result, scales (..., columns / block)).

    Forward only. `grid` is a symmetric integer or minifloat grid.
    """
    block = _check(x, block)
    if grid.kind == 2:
        raise BadInput(
            "grid: a codebook cannot be fused with the transform; use hadamard, then quantize_codebook"
        )
    shape = (*x.shape[:-1], x.shape[-1] // block)
    if _fused(x, block, backend):
        y, scale = _launch(x, block, grid)
        return y, scale.view(shape)
    y = butterflies(x.float(), block).view(-1, block)
    scale = y.abs().amax(1, keepdim=True) / grid.high
    return quantize_reference(y, scale, None, grid, block).view(x.shape).to(x.dtype), scale.view(shape)


KERNELS = (
    Kernel(
        "hadamard.forward_backward",
        _hadamard,
        tuple(
            Configuration(
                name,
                {
                    "x_ptr": "*bf16",
                    "y_ptr": "*bf16",
                    "scale_ptr": "*fp32",
                    "norm": "fp32",
                    "low": "fp32",
                    "high": "fp32",
                },
                {
                    "ROWS": max(1, 2048 // n),
                    "N": n,
                    "LOG": int(math.log2(n)),
                    "QUANTIZE": quantize,
                    "KIND": kind,
                    "EXPONENT": e,
                    "MANTISSA": m,
                },
            )
            for name, n, quantize, kind, e, m in (
                ("n128", 128, False, 0, 0, 0),
                ("n4096", 4096, False, 0, 0, 0),
                ("n128-int", 128, True, 0, 0, 0),
                ("n32-e2m1", 32, True, 1, 2, 1),
            )
        ),
    ),
)


def cases() -> list[Case]:
    """8192 tokens of width 4096: whole rows, and blocks of 128 with int4."""
    rows, columns = 8192, 4096

    def make(
        block: int, grid: Numbers | None, device: torch.device
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        matrix = hadamard_matrix(block, device).to(x.dtype)
        return lambda: _launch(x, block, grid), lambda: (x.view(-1, block) @ matrix).view(x.shape)

    n = rows * columns
    return [
        Case(
            "hadamard",
            f"{rows} x {columns} bf16, block {block}{' int4' if grid else ''}",
            n,
            4.0 * n,
            n * math.log2(block),
            lambda device, block=block, grid=grid: make(block, grid, device),  # type: ignore[misc]
            comparator="dense matmul",
        )
        for block, grid in ((4096, None), (128, Numbers(0, -8, 7)))
    ]
