"""A low-rank term beside a rounded weight: QLoRA's start (Dettmers et al. 2023) and LoftQ's (Li et al. 2024).

The effective weight is Q + A B, with Q on a grid and A B in full precision;
training then moves A and B alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workbench.axis import Axis, Options, parameter
from workbench.quantization.number.grid import Grid
from workbench.quantization.rounding.problem import Problem
from workbench.subjects.changes import LowRank

Rounder = Callable[[Problem], tuple[Tensor, Grid]]
Term = tuple[Tensor, Tensor]  # up (..., out, rank), down (..., rank, in)

#: `entry(problem, rounder, options)` gives (values, grid, term or None): the effective weight is their sum.
ADAPTER = Axis(
    "quantization-adapter",
    "a low-rank term in full precision kept beside each rounded weight",
    found_in="workbench.quantization.rounding",
    home="quantize.adapter",
)


class Adapter(LowRank):
    """Adds up @ down after the number format (and before a mask, so zeros stay zeros)."""

    order = 60


def zero_term(
    shape: tuple[int, ...], rank: int, generator: torch.Generator, device: torch.device | None = None
) -> Term:
    """LoRA's start (Hu et al. 2021): up is zero, down Gaussian with variance 1 / in."""
    rank = min(rank, *shape[-2:])
    down = torch.randn(*shape[:-2], rank, shape[-1], generator=generator) * shape[-1] ** -0.5
    return torch.zeros(*shape[:-1], rank, device=device), down.to(device or "cpu")


def best_term(gap: Tensor, rank: int) -> Term:
    """The closest up @ down to a matrix (out, in) in the Frobenius norm, by truncated singular values
    (Eckart and Young 1936), split evenly.
    """
    left, values, right = torch.linalg.svd(gap, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@ADAPTER.add("none", formula="W ~ Q", source="no term")
def none(problem: Problem, rounder: Rounder, options: Options) -> tuple[Tensor, Grid, None]:
    """The rounded weight alone."""
    return *rounder(problem), None


class Rank(Options):
    rank: int = parameter(8, "rank of the term", ge=1, le=1024)


class LoftQ(Rank):
    alternations: int = parameter(5, "alternations of rounding and best low-rank fit", ge=1, le=100)


@ADAPTER.add(
    "qlora",
    formula="W ~ q(W) + A B, A B = 0 at first",
    source="Dettmers et al. 2023, QLoRA",
    title="QLoRA",
    options=Rank,
)
def qlora(problem: Problem, rounder: Rounder, options: Rank) -> tuple[Tensor, Grid, Term]:
    values, grid = rounder(problem)
    shape = problem.weight.shape
    up, down = zero_term(tuple(shape), options.rank, problem.generator)
    return values, grid, (up.to(values.device), down.to(values.device))


@ADAPTER.add(
    "loftq",
    formula="Q_t = q(W - A B), then A B = the best rank-r fit of W - Q_t",
    source="Li et al. 2024, LoftQ, algorithm 1",
    title="LoftQ",
    options=LoftQ,
)
def loftq(problem: Problem, rounder: Rounder, options: LoftQ) -> tuple[Tensor, Grid, Term]:
    """`alternations` times from A B = 0. The pair with the least ||W - Q - A B||_F is taken: scales are
    fitted anew to every W - A B, so a step can make it worse.
    """
    weight, rank = problem.weight, min(options.rank, *problem.weight.shape)
    best: tuple[Tensor, Grid, Term] | None = None
    least, term = float("inf"), torch.zeros_like(weight)
    for _ in range(options.alternations):
        values, grid = rounder(replace(problem, weight=problem.masked(weight - term)))
        up, down = best_term(problem.masked(weight - values), rank)
        term = up @ down
        residual = float(problem.masked(weight - values - term).norm())
        if residual < least:
            best, least = (values, grid, (up, down)), residual
    assert best is not None
    return best
