"""HQQ: zero points that minimise a robust norm of the weight error, without data (Badri and Shaji 2023)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.quantization.number.grid import Grid, in_groups
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING


class HalfQuadratic(Options):
    norm: float = parameter(0.7, "p of |error|^p, which outliers count less in than in a square", gt=0, le=1)
    strength: float = parameter(10.0, "weight of the coupling at first", gt=0, scale="log")
    growth: float = parameter(1.01, "its growth from one alternation to the next", ge=1)
    iterations: int = parameter(20, "alternations", ge=1, le=1000)


@ROUNDING.add(
    "hqq",
    formula="min_z |W - Q_z(W)|_p^p by half-quadratic splitting",
    source="Badri and Shaji 2023",
    options=HalfQuadratic,
    traits="needs zero points",
    beside={"format": "uint4"},
)
def half_quadratic(problem: Problem, options: HalfQuadratic) -> tuple[Tensor, Grid]:
    """Half-quadratic quantization (Badri and Shaji 2023): zero points that minimise a robust norm
    of the weight error, without data.

    Alternates the proximal step of |.|^p on the error (generalised soft threshold) with the mean that fits
    the zero point. It starts from the zero point that spans each group exactly, as the authors' code does,
    and from the grid's whole one; the better is kept.
    """
    grid = problem.grid()
    assert grid.zero is not None, "half-quadratic quantization moves zero points"
    blocks = in_groups(problem.weight, grid.group)
    kept = (
        torch.ones_like(blocks)
        if problem.mask is None
        else in_groups(problem.mask.to(blocks.dtype), grid.group)
    )
    if problem.granularity == "tensor":
        blocks, kept = blocks.flatten().reshape(1, 1, -1), kept.flatten().reshape(1, 1, -1)
    kept = kept / kept.sum(-1, keepdim=True).clamp_min(1)  # pruned weights have no say in the zero point
    scale, whole = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    element = grid.format.element
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    exact = torch.where(high > low, -low / (high - low) * element.highest, whole)
    best, best_error = whole, torch.full_like(whole, torch.inf)
    for start in (exact, whole):
        zero, strength = start, options.strength
        for _ in range(options.iterations):
            codes = element.round(blocks / scale + zero)
            gap = blocks - (codes - zero) * scale
            error = (gap.abs().pow(options.norm) * kept).sum(-1, keepdim=True)
            better = error < best_error
            best, best_error = torch.where(better, zero, best), torch.where(better, error, best_error)
            size = gap.abs()
            shrunk = torch.sign(gap) * torch.relu(
                size - size.clamp_min(1e-12).pow(options.norm - 1) / strength
            )
            zero = ((codes - (blocks - shrunk) / scale) * kept).sum(-1, keepdim=True)
            strength *= options.growth
    found = replace(grid, zero=best.squeeze(-1).to(torch.float16).float())
    return problem.masked(found.round(problem.weight)), found
