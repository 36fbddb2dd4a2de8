"""Roundings: how a weight (out, in) is put on a grid.
One `Problem` in, values on a grid out, whatever the method.

Every method here minimises (or ignores) the layer's reconstruction error ||(Q - W) X||_F^2 = tr((Q - W) G
(Q - W)^T), which needs nothing of the calibration data but the second moment G = X X^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workbench.quantization.number.formats import Format
from workbench.quantization.number.grid import Grid, fit, group_of
from workbench.quantization.number.split_grid import Salient
from workbench.quantization.rounding.gptq import (
    column_order,
    gptq,
    gptq_with_moving_scales,
    linear_feedback,
)
from workbench.quantization.transform.coordinates import Transform

Rounding = Callable[["Problem"], tuple[Tensor, Grid]]
ROUNDINGS: dict[str, Rounding] = {}


@dataclass
class Factors:
    """Linear feedback of the second moments seen last: layers with the same inputs (query, key, value)
    share one.
    """

    gram: Tensor | None = None
    made: dict[tuple[float, bool], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def of(self, gram: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor | None]:
        """(linear feedback, column order or None)."""
        if self.gram is None or self.gram.shape != gram.shape or not torch.equal(self.gram, gram):
            self.gram, self.made = gram, {}
        if (damp, act_order) not in self.made:
            order = column_order(gram) if act_order else None
            self.made[damp, act_order] = (
                linear_feedback(gram if order is None else gram[order][:, order], damp),
                order,
            )
        return self.made[damp, act_order]


@dataclass
class Problem:
    """One matrix to round.

    weight : (out, in) float32, zeros where pruned;
        gram : (in, in) second moment of the inputs the quantized layer will see
    mask : True where a weight is kept, or None;  generator : the source of every random choice
    largest : (in,) largest magnitude of each input in calibration, for transforms that ask for it
    salient : weights that stay on a wider grid, or None
    rows, activation : (tokens, in) sampled inputs and the format they will be rounded to per token,
        for transforms that minimise both errors
    """

    weight: Tensor
    gram: Tensor
    format: Format
    granularity: str = "auto"
    group_size: int = 64
    rule: str = "auto"
    mask: Tensor | None = None
    damp: float = 0.01
    act_order: bool = False
    steps: int = 300
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    factors: Factors = field(default_factory=Factors)
    largest: Tensor | None = None
    rows: Tensor | None = None
    activation: Format | None = None
    salient: Salient | None = None

    def moved(self, transform: Transform) -> Problem:
        """The same problem in a transform's coordinates."""
        return replace(
            self,
            weight=transform.weight(self.weight),
            gram=transform.gram(self.gram),
            largest=None,
            rows=None,
        )

    def grid(self) -> Grid:
        """The format's grid on this weight; clipping searches weigh each column's error by its inputs'
        energy.
        """
        if self.salient is not None:
            return self.salient.grid(
                self.weight, self.gram, self.format, self.granularity, self.group_size, self.rule
            )
        return fit(
            self.weight,
            self.format,
            self.granularity,
            self.group_size,
            self.rule,
            self.gram.diagonal() if self.rule == "mse" else None,
        )

    def masked(self, values: Tensor) -> Tensor:
        return values if self.mask is None else values * self.mask

    def error(self, values: Tensor) -> float:
        """Relative reconstruction error tr((Q-W) G (Q-W)^T) / tr(W G W^T)."""
        gap = values - self.weight
        size = float(((self.weight @ self.gram) * self.weight).sum())
        return float(((gap @ self.gram) * gap).sum()) / max(size, 1e-30)


def rounding(name: str) -> Callable[[Rounding], Rounding]:
    def register(function: Rounding) -> Rounding:
        ROUNDINGS[name] = function
        return function

    return register


@rounding("nearest")
def nearest(problem: Problem) -> tuple[Tensor, Grid]:
    grid = problem.grid()
    return problem.masked(grid.round(problem.weight)), grid


@rounding("stochastic")
def stochastic(problem: Problem) -> tuple[Tensor, Grid]:
    """Up or down at random with the weight as expectation (Gupta et al. 2015)."""
    grid = problem.grid()
    return problem.masked(grid.round(problem.weight, problem.generator)), grid


@rounding("gptq")
def column_wise(problem: Problem) -> tuple[Tensor, Grid]:
    feedback, order = problem.factors.of(problem.gram, problem.damp, problem.act_order)
    width = problem.weight.shape[1]
    group = group_of(problem.format, problem.granularity, problem.group_size, width)
    if (
        group < width
        and width % group == 0
        and not problem.format.block
        and order is None
        and problem.granularity != "tensor"
    ):
        return gptq_with_moving_scales(
            problem.weight, feedback, problem.format, group, problem.rule, problem.mask
        )
    grid = problem.grid()
    return gptq(problem.weight, feedback, grid, problem.mask, order), grid
