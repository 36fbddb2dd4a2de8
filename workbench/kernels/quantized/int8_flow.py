"""GELU, residual sum and LayerNorm from int8 to int8: each 32 x 32 block has its scale,
and nothing wider reaches memory.

    x = s_x[m / 32, n / 32] X[m, n],   y = f(x) in fp32,   s_y = max |y over the block| / 127,
        Y = round(y / s_y)

With `scaled_matmul.blocked_linear_int8` between them, a transformer's activations and their gradients stay
int8 between operators, half the bytes of bf16: Xi et al. (2024, Jetfire, sec. 4 and 5). The paper leaves
the order of the backward's sums open; here the sums over a row and over rows are fp32,
and weight gradients leave as fp32.

>>> x = torch.randn(64, 96)
>>> codes, scales = gelu_int8(*quantize_blocks(x))
>>> y = decode_blocks(codes, scales)
>>> bool((y - F.gelu(x)).norm() / F.gelu(x).norm() < 0.02)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import jit, on_device, round_even, tl, use_triton
from workbench.kernels.quantized.low_bit_linear import gelu
from workbench.kernels.quantized.scaled_matmul import quantize_blocks
from workbench.kernels.registry import Case, Configuration, Kernel

BLOCK = 32
Coded = tuple[torch.Tensor, torch.Tensor]


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 values of int8 codes (rows, columns) with scales (rows / 32, columns / 32)."""
    rows, columns = codes.shape
    tiles = codes.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK) * scales[:, None, :, None]
    return tiles.view(rows, columns)


@jit
def _load(x_ptr, s_ptr, row, column, columns, BLOCK: tl.constexpr):
    """Block (row, column) of the grid of blocks, decoded to fp32."""
    m = row * BLOCK + tl.arange(0, BLOCK)
    n = column * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(x_ptr + m[:, None].to(tl.int64) * columns + n[None, :])
    return codes.to(tl.float32) * tl.load(s_ptr + row * (columns // BLOCK) + column)


@jit
def _store(y_ptr, s_ptr, y, row, column, columns, BLOCK: tl.constexpr):
    """Quantize one block to int8 with its own scale and write both."""
    largest = tl.max(tl.max(tl.abs(y), 1), 0)
    scale = tl.div_rn(largest, 127.0 + tl.zeros_like(largest))
    tl.store(s_ptr + row * (columns // BLOCK) + column, scale)
    codes = round_even(tl.div_rn(y, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(y)))
    m = row * BLOCK + tl.arange(0, BLOCK)
    n = column * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + m[:, None].to(tl.int64) * columns + n[None, :], codes.to(tl.int8))


@jit
def _pointwise(a_ptr, as_ptr, b_ptr, bs_ptr, y_ptr, ys_ptr, columns, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """STEP "gelu": gelu(a); "gelu backward": b gelu'(a); "add": a + b."""
    row, column = tl.program_id(1), tl.program_id(0)
    y = _load(a_ptr, as_ptr, row, column, columns, BLOCK)
    if STEP == "gelu":
        y = gelu(y)
    else:
        b = _load(b_ptr, bs_ptr, row, column, columns, BLOCK)
        if STEP == "add":
            y += b
        else:
            y = b * (
                0.5 * (1.0 + tl.erf(y * 0.7071067811865476)) + y * 0.3989422804014327 * tl.exp(-0.5 * y * y)
            )
    _store(y_ptr, ys_ptr, y, row, column, columns, BLOCK)


@jit
def _norm_forward(
    x_ptr, xs_ptr, w_ptr, b_ptr, y_ptr, ys_ptr, mean_ptr, inverse_ptr, columns, eps, BLOCK: tl.constexpr
):
    """One row of blocks; the variance is summed about the mean,
    which costs one more read of int8 and no cancellation.
    """
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(0, columns // BLOCK):
        total += tl.sum(_load(x_ptr, xs_ptr, row, column, columns, BLOCK), 1)
    mean = total / columns
    square = tl.zeros([BLOCK], tl.float32)
    for column in range(0, columns // BLOCK):
        x = _load(x_ptr, xs_ptr, row, column, columns, BLOCK) - mean[:, None]
        square += tl.sum(x * x, 1)
    inverse = 1.0 / tl.sqrt_rn(square / columns + eps)
    for column in range(0, columns // BLOCK):
        n = column * BLOCK + tl.arange(0, BLOCK)
        y = (_load(x_ptr, xs_ptr, row, column, columns, BLOCK) - mean[:, None]) * inverse[:, None]
        y = y * tl.load(w_ptr + n).to(tl.float32)[None, :] + tl.load(b_ptr + n).to(tl.float32)[None, :]
        _store(y_ptr, ys_ptr, y, row, column, columns, BLOCK)
    m = row * BLOCK + tl.arange(0, BLOCK)
    tl.store(mean_ptr + m, mean)
    tl.store(inverse_ptr + m, inverse)


@jit
def _norm_backward(
    g_ptr,
    gs_ptr,
    x_ptr,
    xs_ptr,
    w_ptr,
    mean_ptr,
    inverse_ptr,
    dx_ptr,
    dxs_ptr,
    dw_ptr,
    db_ptr,
    columns,
    BLOCK: tl.constexpr,
):
    """dx = (w g - mean(w g) - x_hat mean(w g x_hat)) / sigma, means over a row;
    dw and db leave summed over the block's rows.
    """
    row = tl.program_id(0)
    m = row * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + m)[:, None]
    inverse = tl.load(inverse_ptr + m)[:, None]
    plain = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    for column in range(0, columns // BLOCK):
        n = column * BLOCK + tl.arange(0, BLOCK)
        g = _load(g_ptr, gs_ptr, row, column, columns, BLOCK)
        hat = (_load(x_ptr, xs_ptr, row, column, columns, BLOCK) - mean) * inverse
        out = row.to(tl.int64) * columns + n
        tl.store(dw_ptr + out, tl.sum(g * hat, 0))
        tl.store(db_ptr + out, tl.sum(g, 0))
        wg = g * tl.load(w_ptr + n).to(tl.float32)[None, :]
        plain += tl.sum(wg, 1)
        along += tl.sum(wg * hat, 1)
    for column in range(0, columns // BLOCK):
        n = column * BLOCK + tl.arange(0, BLOCK)
        wg = _load(g_ptr, gs_ptr, row, column, columns, BLOCK) * tl.load(w_ptr + n).to(tl.float32)[None, :]
        hat = (_load(x_ptr, xs_ptr, row, column, columns, BLOCK) - mean) * inverse
        dx = (wg - (plain / columns)[:, None] - hat * (along / columns)[:, None]) * inverse
        _store(dx_ptr, dxs_ptr, dx, row, column, columns, BLOCK)


def _check(name: str, *coded: Coded) -> None:
    first = coded[0][0].shape
    for codes, scales in coded:
        rows, columns = codes.shape if codes.ndim == 2 else (-1, -1)
        if (
            codes.dtype != torch.int8
            or codes.shape != first
            or rows % BLOCK
            or columns % BLOCK
            or scales.shape != (rows // BLOCK, columns // BLOCK)
        ):
            raise BadInput(
                f"{name}: codes {codes.dtype} {tuple(codes.shape)}, scales {tuple(scales.shape)}: need int8 "
                "codes of one shape with both sides a multiple "
                f"of {BLOCK}, and a scale for each {BLOCK} x {BLOCK} block"
            )


def _empty(like: torch.Tensor) -> Coded:
    return torch.empty_like(like, memory_format=torch.contiguous_format), torch.empty(
        like.shape[0] // BLOCK, like.shape[1] // BLOCK, device=like.device
    )


def _step(step: str, a: Coded, b: Coded | None, backend: str) -> Coded:
    _check(step, a, *([] if b is None else [b]))
    if a[0].numel() and use_triton("int8_flow", a[0].numel(), a[0], backend):
        return _launch_step(step, a, b)
    x = decode_blocks(*a)
    if b is None:
        return quantize_blocks(F.gelu(x), BLOCK)
    other = decode_blocks(*b)
    return quantize_blocks(x + other if step == "add" else torch.ops.aten.gelu_backward(other, x), BLOCK)


def _launch_step(step: str, a: Coded, b: Coded | None) -> Coded:
    y, scales = _empty(a[0])
    operands = [t.contiguous() for t in (*a, *(a if b is None else b))]
    with on_device(y):
        _pointwise[(y.shape[1] // BLOCK, y.shape[0] // BLOCK)](
            *operands, y, scales, y.shape[1], STEP=step, BLOCK=BLOCK, num_warps=2
        )
    return y, scales


def gelu_int8(codes: torch.Tensor, scales: torch.Tensor, backend: str = "auto") -> Coded:
    """Exact GELU of block-scaled int8 (rows, columns), as block-scaled int8."""
    return _step("gelu", (codes, scales), None, backend)


def gelu_int8_backward(gradient: Coded, saved: Coded, backend: str = "auto") -> Coded:
    """Gradient before the GELU from the gradient behind it and the int8 input that the forward kept."""
    return _step("gelu backward", saved, gradient, backend)


def add_int8(a: Coded, b: Coded, backend: str = "auto") -> Coded:
    """Residual sum of two block-scaled int8 matrices of one shape."""
    return _step("add", a, b, backend)


def layer_norm_int8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Coded, torch.Tensor, torch.Tensor]:
    """LayerNorm over each row of block-scaled int8 (rows, columns):
    ((codes, scales), mean (rows,), 1 / sigma (rows,)), fp32 both.
    """
    _check("layer_norm", (codes, scales))
    if codes.numel() and use_triton("int8_flow", codes.numel(), codes, backend):
        return _launch_norm(codes, scales, weight, bias, eps)
    x = decode_blocks(codes, scales)
    mean = x.mean(1)
    inverse = 1 / torch.sqrt((x - mean[:, None]).square().mean(1) + eps)
    y = (x - mean[:, None]) * inverse[:, None] * weight.float() + bias.float()
    return quantize_blocks(y, BLOCK), mean, inverse


def _launch_norm(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[Coded, torch.Tensor, torch.Tensor]:
    y, ys = _empty(codes)
    mean, inverse = torch.empty(2, len(codes), device=codes.device).unbind(0)
    with on_device(codes):
        _norm_forward[(len(codes) // BLOCK,)](
            codes.contiguous(),
            scales.contiguous(),
            weight,
            bias,
            y,
            ys,
            mean,
            inverse,
            codes.shape[1],
            eps,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return (y, ys), mean, inverse


def layer_norm_int8_backward(
    gradient: Coded,
    saved: Coded,
    weight: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    backend: str = "auto",
) -> tuple[Coded, torch.Tensor, torch.Tensor]:
    """Gradients of `layer_norm_int8`: (input as block-scaled int8, weight (columns,) fp32, bias (columns,)
    fp32).
    """
    _check("layer_norm backward", gradient, saved)
    codes = saved[0]
    if codes.numel() and use_triton("int8_flow", codes.numel(), codes, backend):
        dx, dxs = _empty(codes)
        dw, db = torch.empty(2, len(codes) // BLOCK, codes.shape[1], device=codes.device).unbind(0)
        operands = [t.contiguous() for t in (*gradient, *saved)]
        with on_device(codes):
            _norm_backward[(len(codes) // BLOCK,)](
                *operands, weight, mean, inverse, dx, dxs, dw, db, codes.shape[1], BLOCK=BLOCK, num_warps=2
            )
        return (dx, dxs), dw.sum(0), db.sum(0)
    g = decode_blocks(*gradient)
    hat = (decode_blocks(*saved) - mean[:, None]) * inverse[:, None]
    wg = g * weight.float()
    dx32 = (wg - wg.mean(1, keepdim=True) - hat * (wg * hat).mean(1, keepdim=True)) * inverse[:, None]
    return quantize_blocks(dx32, BLOCK), (g * hat).sum(0), g.sum(0)


_CODED = {
    f"{name}_ptr": kind
    for name, kind in [
        (n + s, "*fp32" if s else "*i8") for n in ("a", "b", "y", "x", "g", "dx") for s in ("", "s")
    ]
}


def _types(*pointers: str, **others: str) -> dict[str, str]:
    return {f"{p}_ptr": _CODED[f"{p}_ptr"] for p in pointers} | others


KERNELS = (
    Kernel(
        "int8_flow.pointwise",
        _pointwise,
        tuple(
            Configuration(
                step.replace(" ", "-"),
                _types("a", "as", "b", "bs", "y", "ys"),
                {"STEP": step, "BLOCK": BLOCK},
                warps=2,
            )
            for step in ("gelu", "gelu backward", "add")
        ),
    ),
    Kernel(
        "int8_flow.norm-forward",
        _norm_forward,
        (
            Configuration(
                "block32",
                _types(
                    "x",
                    "xs",
                    "y",
                    "ys",
                    w_ptr="*bf16",
                    b_ptr="*bf16",
                    mean_ptr="*fp32",
                    inverse_ptr="*fp32",
                    eps="fp32",
                ),
                {"BLOCK": BLOCK},
                warps=2,
            ),
        ),
    ),
    Kernel(
        "int8_flow.norm-backward",
        _norm_backward,
        (
            Configuration(
                "block32",
                _types(
                    "g",
                    "gs",
                    "x",
                    "xs",
                    "dx",
                    "dxs",
                    w_ptr="*bf16",
                    mean_ptr="*fp32",
                    inverse_ptr="*fp32",
                    dw_ptr="*fp32",
                    db_ptr="*fp32",
                ),
                {"BLOCK": BLOCK},
                warps=2,
            ),
        ),
    ),
)


def cases() -> list[Case]:
    """4096 x 4096 against the bf16 operators of PyTorch, which move twice the bytes."""
    n = 4096

    def make_gelu(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        coded = quantize_blocks(x, BLOCK)
        return lambda: _launch_step("gelu", coded, None), lambda: F.gelu(x)

    def make_norm(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, w = (
            torch.randn(n, n, device=device, dtype=torch.bfloat16),
            torch.ones(n, device=device, dtype=torch.bfloat16),
        )
        coded = quantize_blocks(x, BLOCK)
        return lambda: _launch_norm(*coded, w, w, 1e-5), lambda: F.layer_norm(x, (n,), w, w)

    return [
        Case(
            "int8_flow", f"{n} x {n} gelu", n * n, 2.0 * n * n, 10.0 * n * n, make_gelu, "fp32", "bf16 F.gelu"
        ),
        Case(
            "int8_flow",
            f"{n} x {n} LayerNorm",
            n * n,
            2.0 * n * n,
            8.0 * n * n,
            make_norm,
            "fp32",
            "bf16 F.layer_norm",
        ),
    ]
