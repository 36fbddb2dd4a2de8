"""Roundings in closed form: to the nearest grid point, or to one of its neighbours at random."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.axis import Choice, Options
from workbench.quantization.number.grid import Grid
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING


def rounded(problem: Problem, rounding: Choice | str, **options: Any) -> tuple[Tensor, Grid]:
    """Values on a grid, and the grid, of any rounding; a learned one descends on the layer's own error."""
    chosen = ROUNDING.chosen(rounding, **options)
    made = chosen(problem)
    return made.learned() if chosen.has("learned") else made


@ROUNDING.add(
    "nearest", formula="s (round(W / s + z) - z)", source="Widrow 1956, uniform rounding", traits="any grid"
)
def nearest(problem: Problem, options: Options) -> tuple[Tensor, Grid]:
    grid = problem.grid()
    return problem.masked(grid.round(problem.weight)), grid


@ROUNDING.add(
    "stochastic",
    formula="up with the probability of the distance from below: E Q(w) = w",
    source="Gupta, Agrawal, Gopalakrishnan and Narayanan 2015",
    traits="any grid",
)
def stochastic(problem: Problem, options: Options) -> tuple[Tensor, Grid]:
    grid = problem.grid()
    return problem.masked(grid.round(problem.weight, problem.generator)), grid
