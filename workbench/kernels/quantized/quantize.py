"""Quantize-dequantize: integers, small floats and codebooks, per group of any kind, nearest or stochastic,
in one pass.

    integer    q = clamp(round(x / s + z), lo, hi),        y = s (q - z)
    minifloat  y = s E(x / s), E the nearest number with `exponent` and `mantissa` bits (subnormals included,
               saturating)
    codebook   y = s c_k, c_k the entry nearest to x / s

x is a matrix cut into equal blocks by its scales (and zero points) of shape (r, groups): (1, 1) is per
tensor, (rows, 1) per channel, (rows, columns / 128) per group of 128, (rows / 32, columns / 32) per 32 x 32
block (Jetfire). Rounding is to nearest even or stochastic, up with probability equal
to the fraction, from `random_bits` (seed, element). The backward is the straight-through estimator
(Bengio et al., 2013): the gradient passes where x was representable and stops where it was clipped. The
Triton kernel and the reference agree bit for bit, which is why division is by IEEE rules and fused
multiply-add is off.

>>> x = torch.tensor([[0.24, -0.76, 1.2, 9.0]])
>>> quantize_integer(x, torch.tensor([[0.5]]), low=-8, high=7)
tensor([[ 0.0000, -1.0000,  1.0000,  3.5000]])
>>> quantize_minifloat(x, torch.tensor([[1.0]]), exponent=2, mantissa=1)  # E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6
tensor([[ 0., -1.,  1.,  6.]])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, power_of_two, round_even, tl, use_triton
from workbench.kernels.quantized.numbers import Numbers, limits, minifloat_max
from workbench.kernels.quantized.quantize_reference import quantize_reference, rounded_in_groups
from workbench.kernels.random_bits import uniform_block
from workbench.kernels.registry import Case, Configuration, Kernel


@jit
def _round(x, unit, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        low = tl.floor(x)
        return tl.where(unit < x - low, low + 1.0, low)
    else:
        return round_even(x)


@jit
def quantize_block(
    x,
    s,
    z,
    low,
    high,
    code_ptr,
    unit,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    CODES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Quantize-dequantize an fp32 block with fp32 scales; shared with the kernels that quantize what they
    have just computed.
    """
    u = tl.div_rn(x, s)
    if KIND == 0:
        q = _round(u + z, unit, STOCHASTIC)
        q = tl.minimum(
            tl.maximum(q, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL
        )
        y = (q - z) * s
    elif KIND == 1:
        exponent = ((u.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        exponent = tl.minimum(tl.maximum(exponent, 2 - (1 << (EXPONENT - 1))), 126) - MANTISSA
        step = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        q = _round(tl.div_rn(u, step), unit, STOCHASTIC) * step
        y = (
            tl.minimum(
                tl.maximum(q, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL
            )
            * s
        )
    else:
        below = tl.load(code_ptr) + tl.zeros_like(u)
        if STOCHASTIC:
            above = tl.load(code_ptr + 1) + tl.zeros_like(u)
            for k in tl.static_range(1, CODES - 1):
                entry = tl.load(code_ptr + k)
                passed = u >= entry
                below = tl.where(passed, entry, below)
                above = tl.where(passed, tl.load(code_ptr + k + 1), above)
            y = tl.where(unit < tl.div_rn(u - below, above - below), above, below)
        else:
            y = below
            for k in tl.static_range(1, CODES):
                entry = tl.load(code_ptr + k)
                y = tl.where(u > (entry + tl.load(code_ptr + k - 1)) * 0.5, entry, y)
        y = tl.where(u != u, u, y) * s
    return tl.where(s == 0.0, 0.0, y)


@jit
def _quantize(
    x_ptr,
    scale_ptr,
    zero_ptr,
    code_ptr,
    y_ptr,
    rows,
    columns,
    row_stride,
    column_stride,
    group,
    groups,
    low,
    high,
    seed,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    CODES: tl.constexpr,
    ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    x = tl.load(x_ptr + row * row_stride + offsets.to(tl.int64) * column_stride, mask=inside, other=0.0).to(
        tl.float32
    )
    place = row * groups + offsets // group
    s = tl.load(scale_ptr + place, mask=inside, other=1.0)
    z = tl.zeros_like(s)
    if ZERO:
        z = tl.load(zero_ptr + place, mask=inside, other=0.0)
    unit = tl.zeros_like(s)
    if STOCHASTIC:
        unit = uniform_block(seed, row * columns + offsets)
    y = quantize_block(x, s, z, low, high, code_ptr, unit, KIND, EXPONENT, MANTISSA, CODES, STOCHASTIC)
    tl.store(y_ptr + row * columns + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    group: int,
    seed: int | None,
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows, columns = x.shape
    code = torch.tensor(grid.codebook or (0.0,), dtype=torch.float32, device=x.device)
    block = min(1024, power_of_two(columns, 16))
    low, high = limits(grid)
    with on_device(x):
        _quantize[(rows, cdiv(columns, block))](
            x,
            scale,
            scale if zero is None else zero,
            code,
            y,
            rows,
            columns,
            x.stride(0),
            x.stride(1),
            group,
            scale.shape[1],
            low,
            high,
            seed or 0,
            KIND=grid.kind,
            EXPONENT=grid.exponent,
            MANTISSA=grid.mantissa,
            CODES=len(grid.codebook),
            ZERO=zero is not None,
            STOCHASTIC=seed is not None,
            BLOCK=block,
            num_warps=4,
        )
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        grid: Numbers,
        group: int,
        seed: int | None,
        fused: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.grid, ctx.group = grid, group
        return (_launch if fused else quantize_reference)(x, scale, zero, grid, group, seed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        s = scale.repeat_interleave(ctx.group, 1)[:, : x.shape[1]]
        u = x.float() / s
        if ctx.grid.kind == 2:
            low, high = ctx.grid.codebook[0], ctx.grid.codebook[-1]
        else:
            low, high = limits(ctx.grid)
        if zero is not None and ctx.grid.kind == 0:
            u = u + zero.repeat_interleave(ctx.group, 1)[:, : x.shape[1]]
        slack = 0.5 if ctx.grid.kind == 0 else 0.0  # what rounds to the last integer is not clipped
        return torch.where((u >= low - slack) & (u <= high + slack) | (s == 0), grads[0], 0).to(x.dtype), *[
            None
        ] * 6


def _quantized(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    seed: int | None,
    backend: str,
) -> torch.Tensor:
    columns = x.shape[-1]
    flat = x.reshape(-1, columns) if x.numel() else x.new_zeros(0, columns)
    rows, groups = flat.shape[0], scale.shape[-1]
    if (
        scale.ndim != 2
        or not scale.numel()
        or rows % scale.shape[0]
        or (columns % groups and groups != cdiv(columns, cdiv(columns, groups)))
    ):
        raise BadInput(
            f"scale.shape = {tuple(scale.shape)}: need (r, groups) that cut {rows} rows and {columns} "
            "columns into equal blocks"
        )
    if zero is not None and zero.shape != scale.shape:
        raise BadInput(
            f"zero.shape = {tuple(zero.shape)}: one zero point per scale is needed, {tuple(scale.shape)}"
        )
    group = cdiv(columns, groups) if columns else 1
    scale = scale.float().repeat_interleave(rows // scale.shape[0], 0).contiguous()
    zero = None if zero is None else zero.float().repeat_interleave(rows // zero.shape[0], 0).contiguous()
    if seed is not None and not 0 <= seed < 2**31:
        raise BadInput(f"seed = {seed}: an integer from 0 to 2^31 - 1 is needed, or None for nearest")
    fused = use_triton("quantize", x.numel(), x, backend)
    return _StraightThrough.apply(flat, scale, zero, grid, group, seed, fused).view(x.shape)


def quantize_dequantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    group: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Nearest rounding of x (..., rows, columns), all numbers, with one positive scale (and zero point) for
    each `group` columns of a row or of all rows, (..., rows or 1, ceil(columns / group)): what the product
    calls. The reference is differentiable in the scales, and taken where somebody needs that.
    """
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, zero))
    plain = (grid.kind != 0 and zero is not None) or wants or x.dtype == torch.float64
    if plain or not use_triton("quantize", x.numel(), x, backend):
        return rounded_in_groups(x, scale, scale, zero, grid, group)
    rows = (*x.shape[:-1], scale.shape[-1])

    def each_row(t: torch.Tensor) -> torch.Tensor:
        return t.float().expand(rows).reshape(-1, rows[-1]).contiguous()

    zeros = None if zero is None else each_row(zero)
    return _launch(x.reshape(-1, x.shape[-1]), each_row(scale), zeros, grid, group, None).view(x.shape)


def quantize_integer(
    x: torch.Tensor,
    scale: torch.Tensor,
    low: int,
    high: int,
    zero: torch.Tensor | None = None,
    seed: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Round x (..., columns) to the integers low..high times scale (r, groups),
    around an optional zero point.

    `seed` makes the rounding stochastic. Differentiable in x (straight-through). Symmetric int4:
    low=-8, high=7.
    """
    if not low < high or high - low > 2**20:
        raise BadInput(f"low = {low}, high = {high}: need low < high with at most 2^20 steps")
    return _quantized(x, scale, zero, Numbers(0, float(low), float(high)), seed, backend)


def quantize_minifloat(
    x: torch.Tensor,
    scale: torch.Tensor,
    exponent: int,
    mantissa: int,
    reserved: str = "none",
    seed: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Round x (..., columns) to floats of `exponent` (2 to 6) and `mantissa` (0 to 10) bits times scale
    (r, groups); saturates.

    `reserved` says which codes are no numbers, see `minifloat_max`.
    E4M3 is (4, 3, "nan"), E5M2 (5, 2, "ieee"), E2M1 (2, 1).
    """
    if not (2 <= exponent <= 6 and 0 <= mantissa <= 10) or reserved not in ("none", "nan", "ieee"):
        raise BadInput(
            f"exponent = {exponent}, mantissa = {mantissa}, reserved = {reserved!r}: "
            "need 2..6, 0..10, none | nan | ieee"
        )
    return _quantized(
        x,
        scale,
        None,
        Numbers(1, 0.0, minifloat_max(exponent, mantissa, reserved), exponent, mantissa),
        seed,
        backend,
    )


def quantize_codebook(
    x: torch.Tensor,
    scale: torch.Tensor,
    codebook: tuple[float, ...],
    seed: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Round x (..., columns) to the entries of an increasing codebook (2 to 256) times scale (r, groups);
    NF4 is `NF4`.
    """
    if not 2 <= len(codebook) <= 256 or any(a >= b for a, b in itertools.pairwise(codebook)):
        raise BadInput(f"codebook of {len(codebook)} entries: need 2 to 256, strictly increasing")
    return _quantized(
        x, scale, None, Numbers(2, codebook=tuple(float(c) for c in torch.tensor(codebook))), seed, backend
    )


_POINTERS = {"scale_ptr": "*fp32", "zero_ptr": "*fp32", "code_ptr": "*fp32", "low": "fp32", "high": "fp32"}


def _configuration(name: str, kind: str = "bf16", **constants: Any) -> Configuration:
    base = {
        "KIND": 0,
        "EXPONENT": 0,
        "MANTISSA": 0,
        "CODES": 0,
        "ZERO": False,
        "STOCHASTIC": False,
        "BLOCK": 1024,
    }
    return Configuration(name, {"x_ptr": f"*{kind}", "y_ptr": f"*{kind}", **_POINTERS}, base | constants)


KERNELS = (
    Kernel(
        "quantize.forward",
        _quantize,
        (
            _configuration("int-bf16"),
            _configuration("int-zero-fp32", "fp32", ZERO=True),
            _configuration("int-stochastic-bf16", STOCHASTIC=True),
            _configuration("e4m3-bf16", KIND=1, EXPONENT=4, MANTISSA=3),
            _configuration("e2m1-stochastic-bf16", KIND=1, EXPONENT=2, MANTISSA=1, STOCHASTIC=True),
            _configuration("nf4-bf16", KIND=2, CODES=16),
            _configuration("nf4-stochastic-bf16", KIND=2, CODES=16, STOCHASTIC=True),
        ),
    ),
)


def cases() -> list[Case]:
    """A 4096 x 14336 weight, int4 symmetric in groups of 128, and E4M3 per channel."""
    rows, columns = 4096, 14336

    def make(name: str, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        group = 128 if name == "int4" else columns
        scale = x.float().view(rows, -1, group).abs().amax(2) / 7
        grid = Numbers(0, -8, 7) if name == "int4" else Numbers(1, 0.0, 448.0, 4, 3)
        return lambda: _launch(x, scale, None, grid, group, None), lambda: quantize_reference(
            x, scale, None, grid, group
        )

    return [
        Case(
            "quantize",
            f"{rows} x {columns} bf16 {name}",
            rows * columns,
            4.0 * rows * columns,
            10.0 * rows * columns,
            lambda device, name=name: make(name, device),  # type: ignore[misc]
        )
        for name in ("int4", "e4m3")
    ]
