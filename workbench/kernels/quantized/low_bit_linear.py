"""Weight-only low-bit linear: activations stay bf16, weights are 4 or 8 bits with a scale per group,
decoded on the chip.

    y = x W^T + b (then GELU),   W[n, k] = s[n, k // group] (decode(code[n, k]) - z[n, k // group])

Formats: "int4", "int8" (two's complement, optional zero points), "nf4" (or any 16-entry codebook), "e4m3"
(FP8) and "e2m1" (FP4; with scales that are powers of two and group 32 this is MXFP4, Rouhani et al., 2023).
4-bit codes lie two to a byte, the even column in the low half. The weight is read once; at batch 1 to 16 that
is the whole time, so four bits run at up to four times the speed of bf16.
Dettmers et al. (2023, QLoRA), Frantar et al. (2024).

>>> w = torch.randn(8, 64)
>>> packed = pack_weight(w, "int8", group=32)
>>> bool((packed.dense() - w).abs().max() < 0.02)
True
>>> low_bit_linear(torch.randn(3, 64), packed).shape
torch.Size([3, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, mma, narrow, on_device, tl, use_triton
from workbench.kernels.quantized.numbers import NF4, Numbers
from workbench.kernels.quantized.quantize_reference import quantize_reference
from workbench.kernels.registry import Case, Configuration, Kernel

FORMATS = ("int4", "int8", "nf4", "e4m3", "e2m1")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class LowBitWeight:
    """`codes` (out, in) or, at 4 bits, (out, in / 2) uint8; `scales` (and `zeros`) (out, in / group) fp32;
    `codebook` (16,) for nf4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: str
    group: int
    zeros: torch.Tensor | None = None
    codebook: torch.Tensor | None = None

    @property
    def four_bit(self) -> bool:
        return self.format in ("int4", "nf4", "e2m1")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.four_bit else 1)

    def dense(self) -> torch.Tensor:
        """The decoded matrix (out, in), fp32: the definition the kernel is held to."""
        codes = self.codes
        if self.four_bit:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        if self.format in ("int4", "int8"):
            half = 8 if self.format == "int4" else 128
            values = (
                codes.float()
                if self.zeros is not None
                else ((codes.int() + half) % (2 * half) - half).float()
            )
        elif self.format == "nf4":
            assert self.codebook is not None
            values = self.codebook[codes.int()]
        elif self.format == "e4m3":
            values = codes.view(torch.float8_e4m3fn).float()
        else:
            table = torch.tensor(_E2M1, device=codes.device)
            values = torch.where(codes >= 8, -table[(codes & 7).int()], table[(codes & 7).int()])
        if self.zeros is not None:
            values = values - self.zeros.repeat_interleave(self.group, 1)
        return values * self.scales.repeat_interleave(self.group, 1)


def pack_weight(
    weight: torch.Tensor, format: str, group: int = 128, zero_point: bool = False
) -> LowBitWeight:
    """Nearest quantization of a weight (out, in) to `format`, one scale per `group` columns
    (16 or more, a power of two).

    `zero_point` (int formats) fits each group's range instead of its largest magnitude. e2m1 scales are
    rounded up to a power of two, as the MX formats have them.
    """
    if format not in FORMATS:
        raise BadInput(f"format = {format!r}: accepted are {', '.join(FORMATS)}")
    out, width = weight.shape
    if group < 16 or group & (group - 1) or width % group:
        raise BadInput(
            f"group = {group} with {width} columns: a power of two from 16 on that divides the columns is "
            "needed"
        )
    if zero_point and format not in ("int4", "int8"):
        raise BadInput(f"zero_point with format = {format!r}: only int4 and int8 have zero points")
    w = weight.float().view(out, -1, group)
    largest = w.abs().amax(2)
    zeros = codebook = None
    if format in ("int4", "int8"):
        levels = 15 if format == "int4" else 255
        if zero_point:
            low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
            scales = (high - low) / levels
            zeros = torch.where(scales > 0, torch.round(-low / scales), torch.zeros_like(low))
            codes = (torch.round(_divided(w, scales)) + zeros[..., None]).clamp(0, levels)
        else:
            scales = largest / (levels // 2)
            codes = torch.round(_divided(w, scales)).clamp(-(levels // 2) - 1, levels // 2) % (levels + 1)
        codes = codes.to(torch.uint8)
    elif format == "nf4":
        codebook = torch.tensor(NF4, device=weight.device)
        scales = largest
        codes = torch.bucketize(_divided(w, scales), (codebook[1:] + codebook[:-1]) / 2).to(torch.uint8)
    elif format == "e4m3":
        scales = largest / 448
        codes = _divided(w, scales).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        scales = torch.exp2(torch.ceil(torch.log2(torch.where(largest > 0, largest, 6.0) / 6)))
        grid = Numbers(1, 0.0, 6.0, 2, 1)
        values = quantize_reference(
            _divided(w, scales).flatten(1), torch.ones(out, 1, device=w.device), None, grid, width
        ).view(w.shape)
        codes = torch.bucketize(values.abs(), torch.tensor(_E2M1, device=w.device)).to(torch.uint8) + 8 * (
            values < 0
        ).to(torch.uint8)
    codes = codes.view(out, width)
    if format in ("int4", "nf4", "e2m1"):
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return LowBitWeight(codes.contiguous(), scales.contiguous(), format, group, zeros, codebook)


def _divided(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return w / torch.where(scales > 0, scales, torch.ones_like(scales))[..., None]


@jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def _decode(code, book_ptr, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    """Codes (uint8, 0..15 or 0..255) to fp32 numbers. FORMAT: 0 int4, 1 int8, 2 codebook, 3 e4m3, 4 e2m1."""
    if FORMAT == 0:
        q = code.to(tl.int32)
        return (tl.where(q >= 8, q - 16, q) if SIGNED else q).to(tl.float32)
    elif FORMAT == 1:
        q = code.to(tl.int32)
        return (tl.where(q >= 128, q - 256, q) if SIGNED else q).to(tl.float32)
    elif FORMAT == 2:
        return tl.load(book_ptr + code.to(tl.int32))
    elif FORMAT == 3:
        # The same bits one place further left are an fp16 number 2^8 too small, subnormals included.
        bits = code.to(tl.int16)
        value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(
            tl.float32
        ) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:
        bits = code.to(tl.int16)
        return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@jit
def _linear(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    book_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    out_features,
    width,
    x_stride,
    per_split,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    FOUR_BIT: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """DEPTH divides GROUP, so a step has one scale per output feature;
    split k writes its own fp32 slice of y.
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    features = n < out_features
    groups = width // GROUP
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, width), DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + t[:, None].to(tl.int64) * x_stride + k[None, :], mask=(t < tokens)[:, None], other=0.0
        )
        if FOUR_BIT:
            half = first // 2 + tl.arange(0, DEPTH // 2)
            pair = tl.load(
                w_ptr + n[:, None].to(tl.int64) * (width // 2) + half[None, :],
                mask=features[:, None],
                other=0,
            )
            code = tl.reshape(tl.join(pair & 15, pair >> 4), [COLUMNS, DEPTH])
        else:
            code = tl.load(
                w_ptr + n[:, None].to(tl.int64) * width + k[None, :], mask=features[:, None], other=0
            )
        w = _decode(code, book_ptr, FORMAT, not ZERO)
        place = n.to(tl.int64) * groups + first // GROUP
        if ZERO:
            w -= tl.load(z_ptr + place, mask=features, other=0.0)[:, None]
        w *= tl.load(s_ptr + place, mask=features, other=0.0)[:, None]
        acc = mma(x, tl.trans(narrow(w, x.dtype)), acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=features, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc)
    out = y_ptr + (split * tokens + t[:, None]).to(tl.int64) * out_features + n[None, :]
    tl.store(out, narrow(acc, y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & features[None, :])


def _tile(tokens: int, group: int) -> dict[str, int]:
    return {
        "ROWS": 16 if tokens <= 16 else 64,
        "COLUMNS": 64,
        "DEPTH": min(group, 128 if tokens <= 16 else 64),
    }


def _splits(tokens: int, out: int, width: int, depth: int, columns: int, processors: int) -> int:
    """How many slices of the sum run at once: enough that few output tiles still fill the GPU,
    at most 16 and 4 steps each.
    """
    tiles = cdiv(out, columns) * cdiv(tokens, 64)
    splits = 1
    while splits < 16 and tiles * splits < 2 * processors and width // (2 * splits) >= 4 * depth:
        splits *= 2
    return splits


def _launch(
    x: torch.Tensor,
    weight: LowBitWeight,
    bias: torch.Tensor | None,
    activation: bool,
    splits: int | None = None,
) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, (out, width) = x.shape[0], weight.shape
    if not tokens:
        return x.new_empty(0, out)
    tile = _tile(tokens, weight.group)
    if splits is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = _splits(tokens, out, width, tile["DEPTH"], tile["COLUMNS"], processors)
    per_split = cdiv(cdiv(width, splits), weight.group) * weight.group
    splits = cdiv(width, per_split)
    y = torch.empty(splits, tokens, out, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    fused = splits == 1
    with on_device(x):
        _linear[(cdiv(out, tile["COLUMNS"]), cdiv(tokens, tile["ROWS"]), splits)](
            x,
            weight.codes,
            weight.scales,
            weight.scales if weight.zeros is None else weight.zeros,
            weight.scales if weight.codebook is None else weight.codebook,
            weight.scales if bias is None else bias,
            y,
            tokens,
            out,
            width,
            x.stride(0),
            per_split,
            GROUP=weight.group,
            FORMAT=("int4", "int8", "nf4", "e4m3", "e2m1").index(weight.format),
            FOUR_BIT=weight.four_bit,
            ZERO=weight.zeros is not None,
            BIAS=fused and bias is not None,
            GELU=fused and activation,
            **tile,
            num_warps=4,
            num_stages=4,
        )
    if fused:
        return y[0]
    total = y.sum(0) if bias is None else y.sum(0) + bias.float()
    return (F.gelu(total) if activation else total).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: LowBitWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _launch(x, weight, bias, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """dx = dy W; the weight is frozen (QLoRA trains adapters beside it)."""
        g = grads[0]
        return g @ ctx.weight.dense().to(g.dtype), None, g.sum(0) if ctx.needs_input_grad[2] else None


def low_bit_linear(
    x: torch.Tensor,
    weight: LowBitWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x (..., in) times the transpose of a low-bit weight (out, in), plus bias, then optionally "gelu";
    differentiable in x and bias.
    """
    if x.shape[-1] != weight.shape[1]:
        raise BadInput(f"x.shape = {tuple(x.shape)}: the weight has {weight.shape[1]} input features")
    if activation not in (None, "gelu"):
        raise BadInput(f"activation = {activation!r}: None or 'gelu'")
    flat = x.reshape(-1, weight.shape[1])
    if use_triton("low_bit_linear", 2 * flat.shape[0] * weight.shape[0] * weight.shape[1], x, backend):
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y = _Linear.apply(flat, weight, bias)
            y = F.gelu(y) if activation else y
        else:
            y = _launch(flat, weight, bias, activation is not None)
    else:
        y = F.linear(flat, weight.dense().to(x.dtype), bias)
        y = F.gelu(y) if activation else y
    return y.view(*x.shape[:-1], weight.shape[0])


def _configuration(
    name: str, format: str, group: int, tokens: int, zero: bool = False, split: bool = False
) -> Configuration:
    types = {
        "x_ptr": "*bf16",
        "w_ptr": "*u8",
        "s_ptr": "*fp32",
        "z_ptr": "*fp32",
        "book_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "y_ptr": "*fp32" if split else "*bf16",
    }
    constants = {
        "GROUP": group,
        "FORMAT": FORMATS.index(format),
        "FOUR_BIT": format in ("int4", "nf4", "e2m1"),
        "ZERO": zero,
        "BIAS": not split,
        "GELU": not split,
    } | _tile(tokens, group)
    return Configuration(name, types, constants, stages=4)


KERNELS = (
    Kernel(
        "low_bit_linear.forward",
        _linear,
        (
            _configuration("int4-g128-t16-split", "int4", 128, 16, split=True),
            _configuration("int4-zero-g128-t64", "int4", 128, 64, zero=True),
            _configuration("int8-g128-t16", "int8", 128, 16),
            _configuration("nf4-g64-t16", "nf4", 64, 16),
            _configuration("e4m3-g128-t16", "e4m3", 128, 16),
            _configuration("mxfp4-g32-t16", "e2m1", 32, 16),
        ),
    ),
)


def cases() -> list[Case]:
    """A 14336 x 4096 projection at batch 1 and 16 for each format, against bf16 `torch.mm`."""
    out, width = 14336, 4096

    def make(format: str, tokens: int, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        dense = torch.randn(out, width, device=device, dtype=torch.bfloat16)
        weight = pack_weight(dense, format, 32 if format == "e2m1" else 128)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        return lambda: _launch(x, weight, None, False), lambda: torch.mm(x, dense.t())

    found = []
    for format, bits in (("int4", 4.125), ("nf4", 4.125), ("int8", 8.125), ("e4m3", 8.125), ("e2m1", 4.25)):
        for tokens in (1, 16):
            moved, flops = bits / 8 * out * width + 2.0 * tokens * (width + out), 2.0 * tokens * out * width
            found.append(
                Case(
                    "low_bit_linear",
                    f"{tokens} x {width} x {out} {format}",
                    int(flops),
                    moved,
                    flops,
                    lambda device, f=format, t=tokens: make(f, t, device),  # type: ignore[misc]
                    "bf16",
                    "bf16 torch.mm",
                )
            )
    return found
