"""A low-rank term beside a rounded weight: QLoRA's start (Dettmers et al. 2023) and LoftQ's (Li et al. 2024).

The effective weight is Q + A B, with Q on a grid and A B in full precision;
training then moves A and B alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.subjects.changes import LowRank

if TYPE_CHECKING:
    from workbench.quantization.number.grid import Grid
    from workbench.quantization.rounding.problem import Problem

Term = tuple[Tensor, Tensor]  # up (..., out, rank), down (..., rank, in)


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


def with_term(
    problem: Problem, rounder: Callable[[Problem], tuple[Tensor, Grid]], rank: int, alternations: int
) -> tuple[Tensor, Grid, Term]:
    """LoftQ: Q_t = q(W - A B), then (A, B) = the best rank-r fit of W - Q_t,
    `alternations` times from A B = 0 (Li et al. 2024, algorithm 1).

    The pair with the least ||W - Q - A B||_F is taken: scales are fitted anew to every W - A B, so a step can
    make it worse. With no alternation, QLoRA: q(W) and a zero term.
    """
    weight, rank = problem.weight, min(rank, *problem.weight.shape)
    if alternations == 0:
        return *rounder(problem), tuple(
            t.to(weight.device) for t in zero_term(tuple(weight.shape), rank, problem.generator)
        )  # type: ignore[return-value]
    best: tuple[Tensor, Grid, Term] | None = None
    least, term = float("inf"), torch.zeros_like(weight)
    for _ in range(alternations):
        values, grid = rounder(replace(problem, weight=problem.masked(weight - term)))
        up, down = best_term(problem.masked(weight - values), rank)
        term = up @ down
        residual = float(problem.masked(weight - values - term).norm())
        if residual < least:
            best, least = (values, grid, (up, down)), residual
    assert best is not None
    return best
