"""A format placed on a weight: one scale (and zero point) per tensor, channel or group,
and rounding to the resulting grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.kernels.quantized.quantize import quantize_dequantize
from workbench.quantization.number.elements import Integer, Minifloat
from workbench.quantization.number.formats import Format
from workbench.quantization.transform.coordinates import Transform

E4M3 = Minifloat(8, 4, 3, "fn")


@dataclass(frozen=True)
class Grid:
    """value = (code - zero) * scale.

    scale : (..., out or 1, groups), of either sign for signed integers of the full range, positive otherwise
    zero : same shape, or None for formats without one
    group : columns that share a scale (the last group may be shorter)
    transform : coordinates the values are on the grid in (see `transforms.py`), or None for the weight's own
    """

    format: Format
    scale: Tensor
    zero: Tensor | None
    group: int
    transform: Transform | None = None

    def columns(self, width: int) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) spread to one entry per column: (..., out or 1, width)."""
        spread = [
            None if t is None else t.repeat_interleave(self.group, -1)[..., :width]
            for t in (self.scale, self.zero)
        ]
        return spread[0], spread[1]  # type: ignore[return-value]

    def round(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest (or stochastic) rounding of a matrix (..., out, in) to the grid, in its own dtype."""
        work = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.transform is not None:
            return self.transform.weight_back(
                replace(self, transform=None).round(self.transform.weight(work), generator)
            ).to(weight.dtype)
        numbers = self.format.element.numbers
        if generator is None and numbers is not None:
            return quantize_dequantize(work, self.scale, self.zero, numbers, self.group).to(weight.dtype)
        scale, zero = self.columns(work.shape[-1])
        units = work / scale if zero is None else work / scale + zero
        rounded = self.format.element.round(units, generator)
        return (rounded * scale if zero is None else (rounded - zero) * scale).to(weight.dtype)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes (int64) of values that are on the grid, (..., out, in)."""
        scale, zero = self.columns(weight.shape[-1])
        units = (
            weight.to(scale.dtype)
            if self.transform is None
            else self.transform.weight(weight.to(scale.dtype))
        ) / scale
        return self.format.element.encode(self.format.element.round(units if zero is None else units + zero))

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of codes (..., out, in)."""
        scale, zero = self.columns(codes.shape[-1])
        units = self.format.element.decode(codes)
        values = (units if zero is None else units - zero) * scale
        return values if self.transform is None else self.transform.weight_back(values)

    def bounds(self, width: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest representable value of every column."""
        scale, zero = self.columns(width)
        shift = 0.0 if zero is None else zero
        ends = (self.format.element.lowest - shift) * scale, (self.format.element.highest - shift) * scale
        return torch.minimum(*ends), torch.maximum(*ends)

    @property
    def zeros_are_codes(self) -> bool:
        """True when the zero points are whole numbers within the format's codes,
        which is where they are stored; others take 16 bits.
        """
        assert self.zero is not None
        return bool(
            (
                (self.zero == self.zero.round())
                & (self.zero >= 0)
                & (self.zero < 2**self.format.element.bits)
            ).all()
        )

    def bytes(self, shape: tuple[int, ...], kept: int | None = None) -> float:
        """Bytes of the packed weight: codes, scales (16 bits, or 8 for E8M0 and E4M3), zero points,
        the transform.

        Of a pruned weight only the `kept` codes are stored, with a bitmap, where that is smaller.
        """
        weights = 1
        for size in shape:
            weights *= size
        side = {"real": 16, "e8m0": 8, "e4m3": 8, "none": 0}[self.format.scale] * self.scale.numel() + (
            32 if self.format.scale == "e4m3" else 0
        )
        if self.zero is not None:
            side += self.zero.numel() * (self.format.element.bits if self.zeros_are_codes else 16)
        codes = weights * self.format.element.bits
        if kept is not None:
            codes = min(codes, kept * self.format.element.bits + weights)
        return (codes + side) / 8 + (0 if self.transform is None else self.transform.bytes)


def group_of(format: Format, granularity: str, group_size: int, width: int) -> int:
    """Columns that share a scale. `BadInput` when the format fixes its own block and another granularity is
    asked.
    """
    if format.block:
        if granularity not in ("auto", "block"):
            raise BadInput(
                f"granularity: {granularity!r} does not go with {format.name}, "
                f"whose standard fixes blocks of {format.block}; use auto"
            )
        return min(format.block, width)
    if granularity == "block":
        raise BadInput(
            f"granularity: 'block' is for formats with a fixed block (mxfp*, nvfp4), not {format.name}; "
            "use tensor, channel or group"
        )
    if format.scale == "none" or granularity in ("tensor", "channel"):
        return width
    return min(group_size, width)


def in_groups(weight: Tensor, group: int) -> Tensor:
    """(..., out, in) -> (..., out, groups, group); a short last group is filled with its first value,
    which changes no range.
    """
    width = weight.shape[-1]
    short = -width % group
    if short:
        weight = torch.cat(
            [weight, weight[..., width - width % group, None].expand(*weight.shape[:-1], short)], -1
        )
    return weight.unflatten(-1, (-1, group))


def fit(
    weight: Tensor,
    format: Format,
    granularity: str = "auto",
    group_size: int = 64,
    rule: str = "auto",
    importance: Tensor | None = None,
) -> Grid:
    """The grid of a format on a weight (..., out, in).

    rule : "minmax" (the largest magnitude is representable), "mse" (the clipping with least squared error,
        each column weighted by `importance` (in,) or (out, in) when given), "mean" (of magnitudes, for
        ternary and binary), "centred" (binary: m + s sign(w - m) with m the mean and s the mean of |w - m|,
        the best s for that m; the zero point is -m / s), "auto" (the format's own). All-zero groups get scale
        1. Scales are float32, already rounded to what the format stores.
    """
    work = weight.detach().to(torch.float32)
    width = work.shape[-1]
    group = group_of(format, granularity, group_size, width)
    blocks = in_groups(work, group)  # (..., out, groups, group)
    if granularity == "tensor" and not format.block:
        blocks = blocks.flatten(-3).unflatten(-1, (1, 1, -1))
    low, high = blocks.amin(-1), blocks.amax(-1)  # nan and inf show in them
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise BadInput("weight: it holds nan or inf; repair the checkpoint before quantizing it")
    if format.scale == "none":
        ones = torch.ones(*blocks.shape[:-3], 1, 1, device=work.device)
        return Grid(format, ones, None, width)
    if rule == "auto":
        rule = format.rule
    if rule == "mean":
        return Grid(format, stored(blocks.abs().mean(-1), format), None, group)
    if rule == "centred":
        mean = blocks.mean(-1, keepdim=True)
        scale = stored((blocks - mean).abs().mean(-1), format)
        return Grid(format, scale, (-mean.squeeze(-1) / scale).to(torch.float16).float(), group)
    if rule == "rms":
        return Grid(format, stored(blocks.square().mean(-1).sqrt(), format), None, group)
    full = spanning(low, high, format, group, either=True)
    if rule == "minmax":
        return full
    assert rule == "mse", rule
    weights = None
    if importance is not None:
        spread = (
            importance.to(work.dtype).expand(work.shape)
            if importance.ndim == 1
            else importance.unsqueeze(-2).expand(work.shape)
        )
        weights = in_groups(spread.contiguous(), group)
        if granularity == "tensor" and not format.block:
            weights = weights.flatten(-3).unflatten(-1, (1, 1, -1))
    best, error = full, squared(blocks, full, weights)
    for share in torch.linspace(0.975, 0.3, 28).tolist():
        trial = spanning(low * share, high * share, format, group, either=True)
        found = squared(blocks, trial, weights)
        better = found < error
        error = torch.where(better, found, error)
        zero = None if best.zero is None or trial.zero is None else torch.where(better, trial.zero, best.zero)
        best = replace(best, scale=torch.where(better, trial.scale, best.scale), zero=zero)
    return best


def squared(blocks: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
    """(Weighted) squared rounding error of each group, (..., out, groups)."""
    scale = grid.scale.unsqueeze(-1)
    units = blocks / scale
    if grid.zero is None:
        rounded = grid.format.element.round(units) * scale
    else:
        rounded = (
            grid.format.element.round(units + grid.zero.unsqueeze(-1)) - grid.zero.unsqueeze(-1)
        ) * scale
    gap = (rounded - blocks).square_()
    return (gap if weights is None else gap * weights).sum(-1)


def spanning(low: Tensor, high: Tensor, format: Format, group: int, either: bool = False) -> Grid:
    """The grid that just holds [low, high], or with `either` sign of the scale, where the format has one
    value more on one side, its larger end (Cheng et al. 2023, AutoRound: the other end may lie a step
    outside).
    """
    element = format.element
    if format.affine:
        assert isinstance(element, Integer)
        low, high = (
            low.clamp(max=0.0),
            high.clamp(min=0.0),
        )  # zero must be on the grid: padding and pruned weights are zeros
        scale = stored((high - low) / element.highest, format)
        return Grid(format, scale, torch.round(-low / scale).clamp_(0, element.highest), group)
    size = torch.maximum(low.abs(), high.abs())
    if either and isinstance(element, Integer) and element.full:
        return Grid(
            format, stored(torch.where(high > -low, -size, size) / -element.lowest, format), None, group
        )
    return Grid(format, stored(size / element.highest, format, size), None, group)


def stored(scale: Tensor, format: Format, size: Tensor | None = None) -> Tensor:
    """Round scales to what is stored: 16-bit floats, powers of two (OCP MX: floor(log2 max) - the format's
    top exponent), or E4M3 times one float32 per matrix (NVFP4). Scales that are zero there become 1: such
    a group holds only (near) zeros.
    """
    if format.scale == "e8m0":
        top = torch.frexp(torch.tensor(format.element.highest)).exponent - 1
        exponent = torch.frexp(scale * format.element.highest if size is None else size).exponent - 1 - top
        rounded = torch.ldexp(torch.ones_like(scale), exponent.clamp(-127, 127))
        return torch.where(scale > 0, rounded, torch.ones_like(scale))
    if format.scale == "e4m3":
        whole = scale.amax((-2, -1), keepdim=True) / E4M3.highest
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
        rounded = E4M3.round(scale / whole) * whole
    else:
        rounded = scale.clamp(-65504.0, 65504.0).to(torch.float16).to(scale.dtype)
    return torch.where(rounded != 0, rounded, torch.ones_like(rounded))


def steps_of(weight: Tensor, grid: Grid) -> Tensor:
    """The step each weight's group would have on a grid spanning its range, (out, in), positive;
    differentiable in the weight.
    """

    blocks = in_groups(weight, grid.group)
    reach = (
        blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
        if grid.format.affine
        else blocks.abs().amax(-1)
    )
    element = grid.format.element
    step = (reach / max(element.highest, -element.lowest)).clamp_min(1e-12)
    return step.repeat_interleave(grid.group, -1)[..., : weight.shape[-1]]
