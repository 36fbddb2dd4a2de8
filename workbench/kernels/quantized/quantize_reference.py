"""Quantize-dequantize in PyTorch, group by group, nearest or stochastic: what the kernel has to equal."""

from __future__ import annotations

import torch

from workbench.kernels.quantized.numbers import Numbers, binades
from workbench.kernels.random_bits import uniform


def _stochastic(u: torch.Tensor, grid: Numbers, seed: int) -> torch.Tensor:
    """One of the two neighbours of each u, by `random_bits` (seed, element)."""
    unit = uniform(seed, u.numel(), u.device).view(u.shape)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        low = torch.floor(x)
        return torch.where(unit < x - low, low + 1, low)

    if grid.kind == 0:
        return torch.clamp(rounded(u), grid.low, grid.high)
    if grid.kind == 1:
        step = binades(u, grid.exponent).clamp_(max=2.0**126) * 2.0**-grid.mantissa
        return torch.clamp(rounded(u / step) * step, -grid.high, grid.high)
    code = torch.tensor(grid.codebook, device=u.device)
    place = torch.bucketize(u, code[1:-1], right=True)
    below, above = code[place], code[place + 1]
    return torch.where(unit < (u - below) / (above - below), above, below)


#: Elements rounded at once: the working set stays in a core's cache.
CHUNK = 1 << 16


def quantize_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    group: int,
    seed: int | None = None,
) -> torch.Tensor:
    """The definition, in fp32 or wider. x (..., rows, columns); scale and zero (..., rows or 1,
    ceil(columns / group)); returns x's type.
    """
    # Dead groups (scale 0) hold only zeros; 0 / 0 must not poison them.
    divisor = torch.where(scale == 0, 1.0, scale)
    y = rounded_in_groups(x, scale, divisor, zero, grid, group, seed)
    return torch.where(x.isnan(), x, y) if grid.kind == 2 else y


def rounded_in_groups(
    x: torch.Tensor,
    scale: torch.Tensor,
    divisor: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    group: int,
    seed: int | None = None,
) -> torch.Tensor:
    """(round(x / divisor + zero) - zero) * scale, large matrices a few rows at a time."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, width = x.shape[-2:]
    if seed is None and work.ndim == 2 and width % group == 0 and work.numel() > CHUNK:
        out = torch.empty_like(work)
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            where = part if scale.shape[0] == rows else slice(0, 1)
            s, by = scale[where].unsqueeze(-1), divisor[where].unsqueeze(-1)
            z = None if zero is None else zero[where].unsqueeze(-1)
            out[part] = _rounded(work[part].unflatten(-1, (-1, group)), s, by, z, grid, seed).flatten(-2)
        return out.to(x.dtype)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(group, -1)[..., :width]

    z = None if zero is None else spread(zero)
    s = spread(scale)
    return _rounded(work, s, s if divisor is scale else spread(divisor), z, grid, seed).to(x.dtype)


def _rounded(
    x: torch.Tensor,
    scale: torch.Tensor,
    divisor: torch.Tensor,
    zero: torch.Tensor | None,
    grid: Numbers,
    seed: int | None,
) -> torch.Tensor:
    units = x / divisor if zero is None else (x / divisor).add_(zero)
    rounded = grid.round(units) if seed is None else _stochastic(units, grid, seed)
    # both are new: nothing else reads them, and a gradient in the scale needs them as they are
    if scale.requires_grad:
        return rounded * scale if zero is None else (rounded - zero) * scale
    return rounded.mul_(scale) if zero is None else rounded.sub_(zero).mul_(scale)
