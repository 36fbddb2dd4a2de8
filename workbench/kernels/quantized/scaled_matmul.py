"""8-bit times 8-bit matrix product with dequantization, bias and GELU fused: int8 x int8 and FP8 x FP8.

    per row       y = s_x[m] s_w[n] sum_k X[m, k] W[n, k] + b[n]
    per block     y = sum_K s_x[m / B, K] s_w[n / B, K] sum_{k in K} X[m, k] W[n, k] + b[n]
        (Jetfire: B = 32)

int8 products are summed exactly in int32, over all of k or over one block of it, and scaled in fp32. FP8 is
E4M3 and needs compute capability 9.0. With blocks the result can leave the chip as int8 with its own block
scales, so that tensors stay int8 between operators: Xi et al. (2024, Jetfire: int8 data flow with 32 x 32
blocks).

>>> x, w = torch.randn(4, 64), torch.randn(6, 64)
>>> y = scaled_matmul(*quantize_rows(x), *quantize_rows(w))
>>> bool((y - x @ w.T).norm() / (x @ w.T).norm() < 0.02)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, narrow, on_device, round_even, tl, use_triton
from workbench.kernels.quantized.low_bit_linear import gelu
from workbench.kernels.registry import Case, Configuration, Kernel


def quantize_rows(x: torch.Tensor, kind: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantization of each row of x (rows, columns): (codes, scales (rows,) fp32)."""
    top = 127.0 if kind == torch.int8 else torch.finfo(kind).max
    scale = x.float().abs().amax(1) / top
    u = x.float() / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    return (torch.round(u) if kind == torch.int8 else u).to(kind), scale


def quantize_blocks(x: torch.Tensor, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of each block x block tile of x (rows, columns):
    (codes, scales (rows / block, columns / block) fp32).
    """
    rows, columns = x.shape
    if rows % block or columns % block:
        raise BadInput(f"block = {block}: must divide both sides of {tuple(x.shape)}")
    tiles = x.float().view(rows // block, block, columns // block, block)
    scale = tiles.abs().amax((1, 3)) / 127
    codes = torch.round(tiles / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, :, None])
    return codes.view(rows, columns).to(torch.int8), scale


def scaled_matmul_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The definition: codes are decoded first. fp32 result (rows of x, rows of w)."""
    if x_scale.ndim == 2:
        block = x.shape[1] // x_scale.shape[1]
        x_scale, w_scale = (
            s.repeat_interleave(block, 0).repeat_interleave(block, 1) for s in (x_scale, w_scale)
        )
        y = (x.float() * x_scale) @ (w.float() * w_scale).t()
    else:
        y = (
            (x.double() @ w.double().t()).float() * x_scale[:, None] * w_scale
        )  # fp64 sums of 8-bit products are exact, as int32 is
    y = y if bias is None else y + bias.float()
    return F.gelu(y) if activation else y


@jit
def _matmul(
    x_ptr,
    w_ptr,
    xs_ptr,
    ws_ptr,
    bias_ptr,
    y_ptr,
    ys_ptr,
    rows,
    columns,
    width,
    x_stride,
    w_stride,
    INTEGER: tl.constexpr,
    BLOCKED: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """BLOCKED: scales per DEPTH x DEPTH tile. Otherwise one scale per row of x and per row of w."""
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kind: tl.constexpr = tl.int32 if INTEGER and not BLOCKED else tl.float32
    acc = tl.zeros([ROWS, COLUMNS], kind)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :],
            mask=(m < rows)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + n[None, :].to(tl.int64) * w_stride + k[:, None],
            mask=(n < columns)[None, :] & (k < width)[:, None],
            other=0.0,
        )
        if INTEGER:
            product = tl.dot(x, w, out_dtype=tl.int32)
        else:
            product = tl.dot(x, w)
        if BLOCKED:
            xs = tl.load(xs_ptr + (m // DEPTH) * (width // DEPTH) + first // DEPTH, mask=m < rows, other=0.0)
            ws = tl.load(
                ws_ptr + (n // DEPTH) * (width // DEPTH) + first // DEPTH, mask=n < columns, other=0.0
            )
            acc += product.to(tl.float32) * (xs[:, None] * ws[None, :])
        else:
            acc += product
    y = acc.to(tl.float32)
    if not BLOCKED:
        y = (
            y
            * tl.load(xs_ptr + m, mask=m < rows, other=0.0)[:, None]
            * tl.load(ws_ptr + n, mask=n < columns, other=0.0)[None, :]
        )
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    out = y_ptr + m[:, None].to(tl.int64) * columns + n[None, :]
    if REQUANTIZE:
        tiles = tl.reshape(y, [ROWS // DEPTH, DEPTH, COLUMNS // DEPTH, DEPTH])
        largest = tl.max(tl.max(tl.abs(tiles), 3), 1)
        s = tl.div_rn(largest, 127.0 + tl.zeros_like(largest))
        up = tl.program_id(1) * (ROWS // DEPTH) + tl.arange(0, ROWS // DEPTH)
        across = tl.program_id(0) * (COLUMNS // DEPTH) + tl.arange(0, COLUMNS // DEPTH)
        inside = (up * DEPTH < rows)[:, None] & (across * DEPTH < columns)[None, :]
        tl.store(ys_ptr + up[:, None] * (columns // DEPTH) + across[None, :], s, mask=inside)
        divisor = tl.where(s > 0, s, 1.0)[:, None, :, None] + tl.zeros_like(tiles)
        y = tl.reshape(round_even(tl.div_rn(tiles, divisor)), [ROWS, COLUMNS])
        tl.store(out, y.to(tl.int8), mask=(m < rows)[:, None] & (n < columns)[None, :])
    else:
        tl.store(out, narrow(y, y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def _tile(rows: int, block: int | None) -> dict[str, int]:
    return {
        "ROWS": 16 if rows <= 16 else max(64, block or 0),
        "COLUMNS": max(64, block or 0),
        "DEPTH": block or 128,
    }


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: bool,
    kind: torch.dtype,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, width = x.shape
    y = torch.empty(rows, w.shape[0], dtype=kind, device=x.device)
    if y.numel():
        block = width // x_scale.shape[1] if x_scale.ndim == 2 else None
        tile = _tile(rows, block)
        with on_device(x):
            _matmul[(cdiv(w.shape[0], tile["COLUMNS"]), cdiv(rows, tile["ROWS"]))](
                x,
                w,
                x_scale.contiguous(),
                w_scale.contiguous(),
                x_scale if bias is None else bias,
                y,
                x_scale if scales is None else scales,
                rows,
                w.shape[0],
                width,
                x.stride(0),
                w.stride(0),
                INTEGER=x.dtype == torch.int8,
                BLOCKED=block is not None,
                BIAS=bias is not None,
                GELU=activation,
                REQUANTIZE=scales is not None,
                **tile,
                num_warps=4,
                num_stages=3,
            )
    return y


def scaled_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    kind: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """x (rows, k) times w (columns, k) transposed, both int8 or both float8_e4m3fn, scaled, plus bias,
    then optionally "gelu".

    Scales are per row, (rows,) and (columns,), or per square block, (rows / B, k / B) and
    (columns / B, k / B) with B in 32, 64,
    128. Returns (rows, columns) of type `kind`. Forward only.
    """
    if x.dtype != w.dtype or x.dtype not in (torch.int8, torch.float8_e4m3fn) or x.shape[1] != w.shape[1]:
        raise BadInput(
            f"x {x.dtype} {tuple(x.shape)}, w {w.dtype} {tuple(w.shape)}: "
            "need two int8 or two float8_e4m3fn matrices of one width"
        )
    if x_scale.ndim != w_scale.ndim or x_scale.ndim not in (1, 2):
        raise BadInput(
            f"x_scale {tuple(x_scale.shape)}, w_scale {tuple(w_scale.shape)}: both per row or both per block"
        )
    if x_scale.ndim == 2:
        block = x.shape[1] // x_scale.shape[1]
        expected = [(m.shape[0] // block, m.shape[1] // block) for m in (x, w)]
        if block not in (32, 64, 128) or [tuple(x_scale.shape), tuple(w_scale.shape)] != expected:
            raise BadInput(
                f"x_scale {tuple(x_scale.shape)}, w_scale {tuple(w_scale.shape)}: "
                "one scale per square block of 32, 64 or 128"
            )
    if activation not in (None, "gelu"):
        raise BadInput(f"activation = {activation!r}: None or 'gelu'")
    capable = not x.is_cuda or x.dtype == torch.int8 or torch.cuda.get_device_capability(x.device) >= (9, 0)
    if capable and use_triton("scaled_matmul", 2 * x.shape[0] * w.shape[0] * x.shape[1], x, backend):
        return _launch(x, x_scale, w, w_scale, bias, activation is not None, kind)
    if x.dtype == torch.int8 and x_scale.ndim == 1 and not x.is_cuda and x.numel() and w.numel():
        y = (
            torch._int_mm(x, w.t()).float() * x_scale[:, None] * w_scale
        )  # exact, and the fastest product this CPU path has
        y = y if bias is None else y + bias.float()
        return (F.gelu(y) if activation else y).to(kind)
    return scaled_matmul_reference(x, x_scale, w, w_scale, bias, activation).to(kind)


def blocked_linear_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scaled_matmul` of block-scaled int8 matrices whose result is block-scaled int8 again:
    (codes, scales), never wider in memory.
    """
    if x_scale.ndim != 2 or x.dtype != torch.int8:
        raise BadInput(
            f"x {x.dtype}, x_scale {tuple(x_scale.shape)}: need int8 with one scale per square block"
        )
    block = x.shape[1] // x_scale.shape[1]
    if x.shape[0] >= block and use_triton(
        "scaled_matmul", 2 * x.shape[0] * w.shape[0] * x.shape[1], x, backend
    ):
        scales = torch.empty(x.shape[0] // block, w.shape[0] // block, device=x.device)
        return _launch(x, x_scale, w, w_scale, bias, activation is not None, torch.int8, scales), scales
    return quantize_blocks(scaled_matmul(x, x_scale, w, w_scale, bias, activation, backend="torch"), block)


def _configuration(
    name: str, code: str, rows: int, block: int | None = None, capability: int = 80, requantize: bool = False
) -> Configuration:
    types = {
        "x_ptr": f"*{code}",
        "w_ptr": f"*{code}",
        "xs_ptr": "*fp32",
        "ws_ptr": "*fp32",
        "bias_ptr": "*bf16",
    }
    types |= {"y_ptr": "*i8" if requantize else "*bf16", "ys_ptr": "*fp32"}
    constants = {
        "INTEGER": code == "i8",
        "BLOCKED": block is not None,
        "BIAS": True,
        "GELU": True,
        "REQUANTIZE": requantize,
    } | _tile(rows, block)
    return Configuration(name, types, constants, capability=capability)


KERNELS = (
    Kernel(
        "scaled_matmul.forward",
        _matmul,
        (
            _configuration("int8-t64", "i8", 64),
            _configuration("int8-t16", "i8", 16),
            _configuration("int8-block32-t64", "i8", 64, 32),
            _configuration("int8-block32-to-int8", "i8", 64, 32, requantize=True),
            _configuration("fp8-t64", "fp8e4nv", 64, capability=90),
        ),
    ),
)


def cases() -> list[Case]:
    """4096 cubed in int8 and FP8 against bf16 `torch.mm`."""
    n = 4096

    def make(kind: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, w = torch.randn(2, n, n, device=device, dtype=torch.bfloat16).unbind(0)
        codes = (*quantize_rows(x, kind), *quantize_rows(w, kind))
        return lambda: _launch(*codes, None, False, torch.bfloat16), lambda: torch.mm(x, w.t())

    return [
        Case(
            "scaled_matmul",
            f"{n}^3 {name}",
            2 * n**3,
            4.0 * n * n,
            2.0 * n**3,
            lambda device, k=kind: make(k, device),  # type: ignore[misc]
            name,
            "bf16 torch.mm",
        )
        for name, kind in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn))
    ]
