"""LayerNorm and RMSNorm, optionally of x + residual, whose backward reads normalized inputs kept in 8 or 2
bits (or exactly).

    h = x + r,   xh = (h - mean h) / sqrt(var h + eps)  (RMSNorm: h / sqrt(mean h^2 + eps)),   y = w xh + b
    dh = (w g - mean(w g) - xh mean(w g xh)) / sqrt(var h + eps)  (RMSNorm: without the middle term),
        dw = sum g xh,   db = sum g

One pass forward, one backward; the weight's gradient is summed per program in a fixed order. xh is what is
kept: it has unit variance, so groups of 256 columns compress well.
Ba et al. (2016), Zhang and Sennrich (2019); add + norm: Zhai et al. (2023).

>>> x, w = torch.randn(5, 96, requires_grad=True), torch.ones(96)
>>> bool(torch.allclose(layer_norm(x, w), torch.nn.functional.layer_norm(x, (96,)), atol=1e-5))
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.training.activation import SAVED, _bits
from workbench.kernels.training.saved_activation import (
    GROUP,
    Saved,
    compress,
    empty,
    load_groups,
    save_groups,
)


@jit
def _forward(
    x_ptr,
    r_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    inverse_ptr,
    width,
    x_stride,
    r_stride,
    eps,
    seed,
    RMS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < width
    h = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(r_ptr + row * r_stride + column, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        h = tl.where(inside, h - tl.sum(tl.sum(h, 1), 0) / width, 0.0)
    inverse = tl.div_rn(1.0 + 0.0 * eps, tl.sqrt_rn(tl.sum(tl.sum(h * h, 1), 0) / width + eps))
    tl.store(inverse_ptr + row, inverse)
    xh = h * inverse
    y = xh * tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if BITS:
        groups = (width + WIDTH - 1) // WIDTH
        place = row * groups + group
        at = row * groups * WIDTH + column
        save_groups(
            xh, at, column >= 0, place, group < groups, codes_ptr, low_ptr, step_ptr, seed, BITS, GROUPS
        )
    else:
        tl.store(codes_ptr + row * width + column, narrow(xh, codes_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    g_ptr,
    w_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    inverse_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    width,
    per_program,
    RMS: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < width
    groups = (width + WIDTH - 1) // WIDTH
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([GROUPS, WIDTH], tl.float32)
    db = tl.zeros([GROUPS, WIDTH], tl.float32)
    first = tl.program_id(0) * per_program
    for index in range(first, tl.minimum(first + per_program, rows)):
        row = (tl.zeros([], tl.int64) + index).to(tl.int64)
        g = tl.load(g_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if BITS:
            xh = load_groups(
                row * groups * WIDTH + column,
                row * groups + group,
                group < groups,
                codes_ptr,
                low_ptr,
                step_ptr,
                BITS,
                GROUPS,
            )
            xh = tl.where(inside, xh, 0.0)
        else:
            xh = tl.load(codes_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        wg = w * g
        dx = wg - xh * (tl.sum(tl.sum(wg * xh, 1), 0) / width)
        if not RMS:
            dx -= tl.sum(tl.sum(wg, 1), 0) / width
        dx *= tl.load(inverse_ptr + row)
        tl.store(dx_ptr + row * width + column, narrow(dx, dx_ptr.dtype.element_ty), mask=inside)
        dw += g * xh
        db += g
    out = tl.program_id(0).to(tl.int64) * width + column
    tl.store(dw_ptr + out, dw, mask=inside)
    if BIAS:
        tl.store(db_ptr + out, db, mask=inside)


def _blocks(width: int) -> dict[str, int]:
    return {"GROUPS": power_of_two(cdiv(width, GROUP)), "WIDTH": GROUP}


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        w: torch.Tensor,
        b: torch.Tensor | None,
        rms: bool,
        eps: float,
        bits: int,
        seed: int,
        fused: bool,
    ) -> torch.Tensor:
        rows, width = x.shape
        padded = torch.Size((rows, cdiv(width, GROUP) * GROUP))
        if fused:
            x = x if x.stride(1) == 1 else x.contiguous()
            residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
            y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
            inverse = torch.empty(rows, device=x.device)
            saved = empty(padded, bits, x.device) if bits else None
            kept = [saved.codes, saved.low, saved.step] if saved else [torch.empty_like(y), inverse, inverse]
            if rows:
                r = x if residual is None else residual
                with on_device(x):
                    _forward[(rows,)](
                        x,
                        r,
                        w,
                        w if b is None else b,
                        y,
                        *kept,
                        inverse,
                        width,
                        x.stride(0),
                        r.stride(0),
                        eps,
                        seed,
                        RMS=rms,
                        RESIDUAL=residual is not None,
                        BIAS=b is not None,
                        BITS=bits,
                        **_blocks(width),
                        num_warps=_warps(width),
                    )
        else:
            h = x.float() if residual is None else x.float() + residual.float()
            h = h if rms else h - h.mean(1, keepdim=True)
            inverse = 1 / torch.sqrt((h * h).mean(1) + eps)
            xh = h * inverse[:, None]
            y = (xh * w.float() if b is None else xh * w.float() + b.float()).to(x.dtype)
            saved = compress(F.pad(xh, (0, padded[1] - width)), bits, seed) if bits else None
            kept = [saved.codes, saved.low, saved.step] if saved else [xh.to(x.dtype), inverse, inverse]
        ctx.save_for_backward(w, b, inverse, *kept)
        ctx.options = rms, bits, fused, padded, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, b, inverse, *kept = ctx.saved_tensors
        rms, bits, fused, padded, residual = ctx.options
        g = grads[0].contiguous()
        rows, width = g.shape
        if fused:
            dx = torch.empty_like(g)
            programs = max(1, min(rows, 256))
            per_program = cdiv(max(rows, 1), programs)
            dw = torch.zeros(programs, width, device=g.device)
            db = torch.zeros(programs if b is not None else 1, width, device=g.device)
            with on_device(g):
                _backward[(programs,)](
                    g,
                    w,
                    *kept,
                    inverse,
                    dx,
                    dw,
                    db,
                    rows,
                    width,
                    per_program,
                    RMS=rms,
                    BIAS=b is not None,
                    BITS=bits,
                    **_blocks(width),
                    num_warps=_warps(width),
                )
            dw, db = dw.sum(0), db.sum(0)
        else:
            xh = (
                Saved(kept[0], kept[1], kept[2], padded, bits).decompress()[:, :width]
                if bits
                else kept[0].float()
            )
            g32 = g.float()
            wg = w.float() * g32
            dx = wg - xh * (wg * xh).mean(1, keepdim=True)
            dx = ((dx if rms else dx - wg.mean(1, keepdim=True)) * inverse[:, None]).to(g.dtype)
            dw, db = (g32 * xh).sum(0), g32.sum(0)
        return (
            dx,
            dx if residual else None,
            dw.to(w.dtype),
            None if b is None else db.to(b.dtype),
            *[None] * 5,
        )


def _norm(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    residual: torch.Tensor | None,
    rms: bool,
    eps: float,
    saved: str,
    seed: int,
    backend: str,
) -> torch.Tensor:
    if (
        w.shape != x.shape[-1:]
        or (b is not None and b.shape != w.shape)
        or (residual is not None and residual.shape != x.shape)
    ):
        raise BadInput(
            f"x {tuple(x.shape)}, weight {tuple(w.shape)}: weight and bias need ({x.shape[-1]},), "
            "a residual the shape of x"
        )
    if not 1 <= x.shape[-1] <= 32768:
        raise BadInput(f"x.shape = {tuple(x.shape)}: rows of 1 to 32768 columns are normalized")
    flat, res = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, residual))
    return _Norm.apply(
        flat, res, w, b, rms, eps, _bits(saved, seed), seed, use_triton("norm", x.numel(), x, backend)
    ).view(x.shape)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    saved: str = "exact",
    seed: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm over the last dimension of x, or of x + residual;
    `saved` "exact", "int8" or "2bit" is how xh is kept.

    Differentiable in x, residual, weight and bias. Computed in fp32, returned in x's type.
    """
    return _norm(x, weight, bias, residual, False, eps, saved, seed, backend)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    saved: str = "exact",
    seed: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """RMSNorm over the last dimension of x, or of x + residual; options as `layer_norm`."""
    return _norm(x, weight, None, residual, True, eps, saved, seed, backend)


def _configurations(backward: bool) -> tuple[Configuration, ...]:
    found = []
    for name, rms, bits, width in (
        ("layer-exact-768", False, 0, 768),
        ("layer-int8-768", False, 8, 768),
        ("rms-exact-4096", True, 0, 4096),
        ("rms-int8-4096", True, 8, 4096),
        ("rms-2bit-4096", True, 2, 4096),
    ):
        types = {
            "w_ptr": "*bf16",
            "codes_ptr": "*u8" if bits else "*bf16",
            "low_ptr": "*fp32",
            "step_ptr": "*fp32",
            "inverse_ptr": "*fp32",
        }
        constants = {"RMS": rms, "BIAS": not rms, "BITS": bits} | _blocks(width)
        if backward:
            types |= {"g_ptr": "*bf16", "dx_ptr": "*bf16", "dw_ptr": "*fp32", "db_ptr": "*fp32"}
        else:
            types |= {"x_ptr": "*bf16", "r_ptr": "*bf16", "b_ptr": "*bf16", "y_ptr": "*bf16", "eps": "fp32"}
            constants["RESIDUAL"] = not rms
        found.append(Configuration(f"{name}-bf16", types, constants, warps=_warps(width)))
    return tuple(found)


KERNELS = (
    Kernel("norm.forward", _forward, _configurations(False)),
    Kernel("norm.backward", _backward, _configurations(True)),
)


def cases() -> list[Case]:
    """RMSNorm of 16384 x 4096, forward."""
    rows, width = 16384, 4096

    def make(saved: str, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        w = torch.ones(width, device=device, dtype=torch.bfloat16)
        return lambda: rms_norm(x, w, saved=saved, backend="triton"), lambda: F.rms_norm(x, (width,), w)

    n = rows * width
    return [
        Case(
            "norm",
            f"rms {rows} x {width} bf16, {saved}",
            n,
            (4 + (bits / 8 if bits else 2)) * n,
            4.0 * n,
            lambda device, saved=saved: make(saved, device),  # type: ignore[misc]
        )
        for saved, bits in SAVED.items()
    ]
