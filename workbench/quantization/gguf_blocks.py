"""Weights as ggml stores them: blocks of 32 numbers of a row, each with its scale (and minimum) and codes.

| ggml | a block's value | bytes of 32 | from |
|---|---|---|---|
| Q4_0 | d (q - 8), q in 0..15 | 18 | int4 |
| Q4_1 | d q + m, q in 0..15 | 20 | uint4 |
| Q5_0 | d (q - 16), q in 0..31 | 22 | int5; pruned uint4 |
| Q5_1 | d q + m, q in 0..31 | 24 | uint5 |
| Q8_0 | d q, q in -128..127 | 34 | int8; pruned uint5 |
| MXFP4 | 2^e times an e2m1 | 17 | mxfp4 |

d and m are 16-bit floats (ggml-common.h of llama.cpp). With a zero point z the minimum is -z d, which needs
up to five more digits than d has and is then rounded; in a pruned layer zeros have to stay zeros, so that its
codes q - z are stored without a minimum, one bit wider.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.quantization.number.grid import Grid
from workbench.subjects.stored import survives

BLOCK = 32
#: Numbers that are encoded at a time.
CHUNK = 1 << 22
#: Name of a format -> ggml's type; a pruned layer's with zero points.
TYPES = {
    "int4": "Q4_0",
    "int4-odd": "Q4_0",
    "uint4": "Q4_1",
    "int5": "Q5_0",
    "int5-odd": "Q5_0",
    "uint5": "Q5_1",
    "int8": "Q8_0",
    "int8-odd": "Q8_0",
    "mxfp4": "MXFP4",
}
PRUNED = {"uint4": "Q5_0", "uint5": "Q8_0"}
#: What stands for zero among the codes of a type without a minimum, as they are stored.
MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
#: Formats without scales: the plain type that holds their numbers.
PLAIN = {"bf16": "BF16", "fp16": "F16"}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """Rows of a weight as bytes, and how far a number of them is from the weight's at most, in steps of its
    block.
    """

    rows: np.ndarray  # (out, bytes of a row)
    gap: float


def type_of(grid: Grid, pruned: bool) -> str:
    """ggml's type for a grid that has one."""
    return PRUNED.get(grid.format.name, "") if pruned and grid.zero is not None else TYPES[grid.format.name]


def bytes_of_row(kind: str, width: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(width // numbers * size)


def encoded(weight: Tensor, grid: Grid, kind: str) -> Stored:
    """A weight (out, in) that is on its grid, as blocks of ggml's type `kind`."""
    rows, width = weight.shape
    found = np.empty((rows, bytes_of_row(kind, width)), np.uint8)
    gap, step = 0.0, max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        own = rows_of(grid, part)
        codes = own.codes(weight[part].float())
        found[part] = blocks(codes, own, kind)
        gap = max(gap, gap_of(found[part], codes, own, kind))
    return Stored(found, gap)


def rows_of(grid: Grid, rows: slice | Tensor) -> Grid:
    """The grid of some rows of its weight."""
    if grid.scale.shape[-2] == 1:
        return grid
    zero = None if grid.zero is None else grid.zero[rows]
    return replace(grid, scale=grid.scale[rows], zero=zero)


def blocks(codes: Tensor, grid: Grid, kind: str) -> np.ndarray:
    """(rows, bytes of a row) of codes (rows, in)."""
    rows, width = codes.shape
    count = width // BLOCK
    scale = per_block(grid.scale, grid, rows, count)
    parts: list[np.ndarray]
    if kind == "MXFP4":
        parts = [(torch.frexp(scale).exponent - 1 + 127).to(torch.uint8).numpy()[..., None]]
    else:
        parts = [halves(scale)]
    if kind in ("Q4_1", "Q5_1"):
        zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
        parts.append(halves(-per_block(zero, grid, rows, count) * scale))
    elif kind in MIDDLE:
        units = grid.format.element.decode(codes) + MIDDLE[kind]
        shift = grid.columns(width)[1]
        codes = (units if shift is None else units - shift).to(torch.int64)
    digits = (codes & 255).to(torch.uint8).reshape(rows, count, BLOCK).numpy()
    if kind == "Q8_0":
        parts.append(digits)
    else:
        if kind in ("Q5_0", "Q5_1"):
            parts.append(np.packbits(digits >> 4, axis=-1, bitorder="little"))
        parts.append((digits[..., : BLOCK // 2] & 15) | ((digits[..., BLOCK // 2 :] & 15) << 4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def per_block(numbers: Tensor, grid: Grid, rows: int, count: int) -> Tensor:
    """Scales or zero points (out or 1, groups) as one of each block, (rows, count)."""
    if numbers.shape[-1] > 1:
        numbers = numbers.repeat_interleave(grid.group // BLOCK, -1)[..., :count]
    return numbers.expand(rows, count).contiguous()


def halves(numbers: Tensor) -> np.ndarray:
    """(rows, blocks) as 16-bit floats, little-endian bytes (rows, blocks, 2)."""
    return numbers.to(torch.float16).numpy().astype("<f2")[..., None].view(np.uint8)


def gap_of(found: np.ndarray, codes: Tensor, grid: Grid, kind: str) -> float:
    """How far what a reader makes of the blocks is from what the codes stand for, in steps of the grid."""
    far = (dense(found, kind) - grid.decode(codes)).abs() / grid.columns(codes.shape[-1])[0].abs()
    return float(far.max()) if bool(torch.isfinite(far).all()) else float("inf")


def narrowest(weight: Tensor, first: str = "F16") -> str:
    """The type of the fewest bytes that holds every number of a weight that is on no grid; `first` where
    several of 16 bits do.

    One that was read from blocks of 8 bits goes back into them; vectors are never narrowed, as in
    llama.cpp.
    """
    if weight.ndim < 2:
        return "F32"
    values = weight.float()
    if values.ndim == 2 and values.shape[-1] % BLOCK == 0 and fits_bytes(values):
        return "Q8_0"
    narrow = (kind for kind in (first, "F16", "BF16") if survives(values, FLOATS[kind]))
    return next(narrow, "F32")


def fits_bytes(weight: Tensor) -> bool:
    """Whether blocks of 8 bits hold a weight (out, in) exactly; mostly answered by its first rows."""
    for part in weight.split(max(1, CHUNK // 64 // weight.shape[-1])):
        if not bool(part.any()):
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # scales beyond 16 bits
            same = torch.equal(dense(plain(part, "Q8_0"), "Q8_0"), part)
        if not same:
            return False
    return bool(weight.any())


def plain(weight: Tensor, kind: str) -> np.ndarray:
    """The bytes of a weight that its type holds exactly, the last axis in bytes."""
    from gguf import GGMLQuantizationType, quants

    values = weight.detach().cpu().float().contiguous()
    if kind in ("F32", "F16"):
        made: Any = values.numpy().astype("<f4" if kind == "F32" else "<f2")
        return np.asarray(made.view(np.uint8))
    return np.asarray(quants.quantize(values.numpy(), GGMLQuantizationType[kind]))


def dense(found: np.ndarray, kind: str) -> Tensor:
    """What a reader makes of a tensor's bytes."""
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(found, GGMLQuantizationType[kind]))
