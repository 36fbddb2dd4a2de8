"""Packed storage: codes of 1 to 16 bits without gaps, with the scales and zero points as stored."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.quantization.number.fake_quant import FakeQuant
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.split_grid import SplitGrid, taken
from workbench.quantization.transform.coordinates import Transform
from workbench.subjects import Layer


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, integers in [0, 2^bits)) as ceil(n bits / 8) bytes, first code in the lowest bits."""
    spread = (codes.reshape(-1, 1).to(torch.int32) >> torch.arange(bits, device=codes.device)) & 1
    flat = torch.nn.functional.pad(spread.reshape(-1), (0, -codes.numel() * bits % 8))
    return (flat.reshape(-1, 8) << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (int64) of `pack`'s bytes. `BadInput` when there are too few bytes."""
    if packed.numel() != math.ceil(count * bits / 8):
        raise BadInput(
            f"packed: {packed.numel()} bytes do not hold {count} codes of {bits} bits, "
            f"which take {math.ceil(count * bits / 8)}"
        )
    flat = ((packed.reshape(-1, 1).to(torch.int64) >> torch.arange(8, device=packed.device)) & 1).reshape(-1)
    return (flat[: count * bits].reshape(count, bits) << torch.arange(bits, device=packed.device)).sum(1)


def quantizer_of(layer: Layer) -> FakeQuant:
    """The layer's number format; `BadInput` when it has none."""
    for change in layer.changes:
        if isinstance(change, FakeQuant):
            return change
    raise BadInput(f"layer: {layer.name} is not quantized; run quantize on it first")


def packed_layer(layer: Layer) -> dict[str, Tensor]:
    """What has to be stored of a quantized layer: codes, scale, zero (when there is one), the transform's
    tensors; of salient weights the same once more, and their mask, one bit each (for single weights
    `SplitGrid.bytes` counts the shorter enumerative code).
    """
    return packed_matrix(layer.weight.detach(), quantizer_of(layer).grid)


def packed_matrix(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    if isinstance(grid, SplitGrid):
        moved = weight if grid.transform is None else grid.transform.weight(weight)
        wide = packed_matrix(taken(moved, grid.mask), grid.wide)
        found = packed_matrix(taken(moved, ~grid.mask), grid.rest) | {
            f"wide_{name}": tensor for name, tensor in wide.items()
        }
        return (
            found | {"mask": pack(grid.mask, 1)} | ({} if grid.transform is None else grid.transform.tensors)
        )
    found = {"codes": pack(grid.codes(weight), grid.format.element.bits)}
    if grid.format.scale == "e8m0":
        found["scale"] = (torch.frexp(grid.scale).exponent - 1 + 127).to(torch.uint8)
    elif grid.format.scale == "e4m3":
        whole = grid.scale.amax((-2, -1), keepdim=True) / named("e4m3fn").element.highest
        found["scale"] = (
            named("e4m3fn").element.encode(named("e4m3fn").element.round(grid.scale / whole)).to(torch.uint8)
        )
        found["whole"] = whole
    elif grid.format.scale == "real":
        found["scale"] = grid.scale.to(torch.float16)
    if grid.zero is not None:
        found["zero"] = (
            pack(grid.zero.long(), grid.format.element.bits)
            if grid.zeros_are_codes
            else grid.zero.to(torch.float16)
        )
    if grid.transform is not None:
        found |= grid.transform.tensors
    return found


def unpacked_layer(stored: dict[str, Tensor], change: FakeQuant, shape: tuple[int, ...]) -> Tensor:
    """The weight (..., out, in), float32, from `packed_layer`'s tensors and the format's name and geometry in
    `change`.
    """
    transform, grid = Transform.of(stored, change.block, change.orthogonal), change.grid
    if isinstance(grid, SplitGrid):
        mask = unpack(stored["mask"], 1, grid.mask.numel()).bool().reshape(grid.mask.shape)
        inside, own = (
            int(mask[0].sum()),
            {name[5:]: tensor for name, tensor in stored.items() if name.startswith("wide_")},
        )
        parts = (
            unpacked_matrix(stored, grid.rest, (shape[0], shape[1] - inside)),
            unpacked_matrix(own, grid.wide, (shape[0], inside)),
        )
        values = replace(grid, mask=mask).joined(*parts)
    else:
        values = unpacked_matrix(stored, grid, shape)
    return values if transform is None else transform.weight_back(values)


def unpacked_matrix(stored: dict[str, Tensor], grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """Values in the transform's coordinates. Of `grid` only the format and the geometry are read,
    and the scales of a format that has none.
    """
    format, count = grid.format, math.prod(shape)
    codes = unpack(stored["codes"], format.element.bits, count).reshape(shape)
    if format.scale == "e8m0":
        scale = torch.ldexp(torch.ones(stored["scale"].shape), stored["scale"].int() - 127)
    elif format.scale == "e4m3":
        scale = named("e4m3fn").element.decode(stored["scale"].long()) * stored["whole"]
    elif format.scale == "real":
        scale = stored["scale"].float()
    else:
        scale = grid.scale
    zero = None
    if "zero" in stored:
        packed = stored["zero"]
        zero = (
            unpack(packed, format.element.bits, scale.numel()).reshape(scale.shape).float()
            if packed.dtype == torch.uint8
            else packed.float()
        )
    return Grid(format, scale, zero, grid.group).decode(codes)
