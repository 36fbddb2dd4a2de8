"""GELU and SwiGLU whose backward reads inputs kept in 8 or 2 bits (or exactly),
compressed while they are in registers.

    gelu(x) = x Phi(x),              d/dx = Phi(x) + x phi(x)
    swiglu(a, b) = a sigmoid(a) b,   d/da = b s (1 + a (1 - s)),   d/db = a s,   s = sigmoid(a)

The forward is exact; only the backward sees the rounding: saved bytes fall from 2 (bf16) or 4 per value to
1.03 or 0.28. Chen et al. (2021, ActNN); Xi et al. (2024, Jetfire) for int8 activations between operators.

>>> x = torch.randn(4, 300, requires_grad=True)
>>> y = gelu(x, saved="int8")
>>> bool(torch.equal(y, torch.nn.functional.gelu(x)))
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.training.saved_activation import (
    GROUP,
    Saved,
    compress,
    empty,
    load_groups,
    save_groups,
)

SAVED = {"exact": 0, "int8": 8, "2bit": 2}
_GROUPS = 4


@jit
def _forward(
    a_ptr,
    b_ptr,
    y_ptr,
    ac_ptr,
    al_ptr,
    as_ptr,
    bc_ptr,
    bl_ptr,
    bs_ptr,
    n,
    seed,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = at < n
    live = group.to(tl.int64) * WIDTH < n
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = a * tl.sigmoid(a) * b
    else:
        y = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    if BITS:
        save_groups(a, at, inside, group, live, ac_ptr, al_ptr, as_ptr, seed, BITS, GROUPS)
        if GATED:
            save_groups(b, at, inside, group, live, bc_ptr, bl_ptr, bs_ptr, seed + 1, BITS, GROUPS)


@jit
def _backward(
    g_ptr,
    a_ptr,
    b_ptr,
    al_ptr,
    as_ptr,
    bl_ptr,
    bs_ptr,
    da_ptr,
    db_ptr,
    n,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = at < n
    live = group.to(tl.int64) * WIDTH < n
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BITS:
        a = load_groups(at, group, live, a_ptr, al_ptr, as_ptr, BITS, GROUPS)
    else:
        a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        if BITS:
            b = load_groups(at, group, live, b_ptr, bl_ptr, bs_ptr, BITS, GROUPS)
        else:
            b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        da = g * b * s * (1.0 + a * (1.0 - s))
        tl.store(db_ptr + at, narrow(g * a * s, db_ptr.dtype.element_ty), mask=inside)
    else:
        da = g * (
            0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
        )
    tl.store(da_ptr + at, narrow(da, da_ptr.dtype.element_ty), mask=inside)


def _forward_launch(
    a: torch.Tensor, b: torch.Tensor | None, bits: int, seed: int
) -> tuple[torch.Tensor, list[Saved]]:
    y = torch.empty_like(a)
    saved = [empty(a.shape, bits, a.device) for _ in range(1 if b is None else 2)] if bits else []
    if a.numel():
        slots = [t for s in saved for t in (s.codes, s.low, s.step)] or [a] * 3
        with on_device(a):
            _forward[(cdiv(a.numel(), _GROUPS * GROUP),)](
                a,
                a if b is None else b,
                y,
                *slots[:3],
                *slots[-3:],
                a.numel(),
                seed,
                GATED=b is not None,
                BITS=bits,
                GROUPS=_GROUPS,
                WIDTH=GROUP,
                num_warps=4,
            )
    return y, saved


def _backward_launch(g: torch.Tensor, tensors: list[torch.Tensor], saved: list[Saved]) -> list[torch.Tensor]:
    gated = max(len(tensors), len(saved)) == 2
    grads = [torch.empty_like(g) for _ in range(2 if gated else 1)]
    if g.numel():
        values = [s.codes for s in saved] or tensors
        scales = [t for s in saved for t in (s.low, s.step)] or [g] * 2
        with on_device(g):
            _backward[(cdiv(g.numel(), _GROUPS * GROUP),)](
                g,
                values[0],
                values[-1],
                *scales[:2],
                *scales[-2:],
                grads[0],
                grads[-1],
                g.numel(),
                GATED=gated,
                BITS=saved[0].bits if saved else 0,
                GROUPS=_GROUPS,
                WIDTH=GROUP,
                num_warps=4,
            )
    return grads


def _backward_torch(g: torch.Tensor, values: list[torch.Tensor]) -> list[torch.Tensor]:
    a, g32 = values[0].float(), g.float()
    if len(values) == 1:
        return [
            (
                g32
                * (0.5 * (1 + torch.erf(a * 0.5**0.5)) + a * torch.exp(-0.5 * a * a) * (2 * torch.pi) ** -0.5)
            ).to(g.dtype)
        ]
    s = torch.sigmoid(a)
    return [(g32 * values[1].float() * s * (1 + a * (1 - s))).to(g.dtype), (g32 * a * s).to(g.dtype)]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor | None, bits: int, seed: int, fused: bool
    ) -> torch.Tensor:
        a, b = a.contiguous(), None if b is None else b.contiguous()
        inputs = [a] if b is None else [a, b]
        if fused:
            y, saved = _forward_launch(a, b, bits, seed)
        else:
            y = F.gelu(a) if b is None else (F.silu(a.float()) * b.float()).to(a.dtype)
            saved = [compress(t, bits, seed + i) for i, t in enumerate(inputs)] if bits else []
        ctx.fused, ctx.bits, ctx.shape = fused, bits, a.shape
        ctx.save_for_backward(*([t for s in saved for t in (s.codes, s.low, s.step)] if bits else inputs))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, kept = grads[0].contiguous(), ctx.saved_tensors
        saved = (
            [Saved(kept[i], kept[i + 1], kept[i + 2], ctx.shape, ctx.bits) for i in range(0, len(kept), 3)]
            if ctx.bits
            else []
        )
        tensors = [] if ctx.bits else list(kept)
        out = (
            _backward_launch(g, tensors, saved)
            if ctx.fused
            else _backward_torch(g, [s.decompress() for s in saved] or tensors)
        )
        return out[0], out[1] if len(out) == 2 else None, None, None, None


def _bits(saved: str, seed: int) -> int:
    if saved not in SAVED:
        raise BadInput(f"saved = {saved!r}: accepted are {', '.join(SAVED)}")
    if not 0 <= seed < 2**31 - 1:
        raise BadInput(f"seed = {seed}: an integer from 0 to 2^31 - 2 is needed")
    return SAVED[saved]


def gelu(x: torch.Tensor, saved: str = "exact", seed: int = 0, backend: str = "auto") -> torch.Tensor:
    """x Phi(x), any shape; `saved` "exact", "int8" or "2bit" is how x is kept for the backward,
    `seed` the 2-bit rounding's.
    """
    return _Activation.apply(
        x, None, _bits(saved, seed), seed, use_triton("activation", x.numel(), x, backend)
    )


def swiglu(
    a: torch.Tensor, b: torch.Tensor, saved: str = "exact", seed: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """silu(a) b for gate a and value b of one shape; see `gelu` for the options."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise BadInput(
            f"a {a.dtype} {tuple(a.shape)}, b {b.dtype} {tuple(b.shape)}: gate and value must be alike"
        )
    return _Activation.apply(a, b, _bits(saved, seed), seed, use_triton("activation", a.numel(), a, backend))


def _configurations(backward: bool) -> tuple[Configuration, ...]:
    found = []
    for name, gated, bits in (
        ("gelu-exact", False, 0),
        ("gelu-int8", False, 8),
        ("gelu-2bit", False, 2),
        ("swiglu-int8", True, 8),
        ("swiglu-2bit", True, 2),
    ):
        stored = "*u8" if bits else "*bf16"
        scales = dict.fromkeys(("al_ptr", "as_ptr", "bl_ptr", "bs_ptr"), "*fp32")
        if backward:
            types = {
                "g_ptr": "*bf16",
                "a_ptr": stored,
                "b_ptr": stored,
                "da_ptr": "*bf16",
                "db_ptr": "*bf16",
            } | scales
        else:
            types = {
                "a_ptr": "*bf16",
                "b_ptr": "*bf16",
                "y_ptr": "*bf16",
                "ac_ptr": "*u8",
                "bc_ptr": "*u8",
            } | scales
        found.append(
            Configuration(
                f"{name}-bf16", types, {"GATED": gated, "BITS": bits, "GROUPS": _GROUPS, "WIDTH": GROUP}
            )
        )
    return tuple(found)


KERNELS = (
    Kernel("activation.forward", _forward, _configurations(False)),
    Kernel("activation.backward", _backward, _configurations(True)),
)


def cases() -> list[Case]:
    """SwiGLU of 8192 x 14336, forward, saving nothing more, 8 bits or 2 bits."""
    rows, columns = 8192, 14336

    def make(bits: int, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        a, b = torch.randn(2, rows, columns, device=device, dtype=torch.bfloat16).unbind(0)
        return lambda: _forward_launch(a, b, bits, 0), lambda: F.silu(a) * b

    n = rows * columns
    return [
        Case(
            "activation",
            f"swiglu {rows} x {columns} bf16, {name}",
            n,
            (6 + 2 * bits / 8) * n,
            8.0 * n,
            lambda device, bits=bits: make(bits, device),  # type: ignore[misc]
        )
        for name, bits in SAVED.items()
    ]
