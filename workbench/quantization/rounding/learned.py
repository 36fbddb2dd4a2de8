"""Learned roundings: what may move (rounding bits, divisors, offsets, weights),
each as a small module with gradients.

A rounding's `soft()` is differentiable and is what the optimizer sees; `hard()` is on the grid. The layer
objective needs only the inputs' second moment: d tr((Q-W) G (Q-W)^T) / dQ = 2 (Q-W) G, so a step costs one
product (out, in, in) whatever the number of calibration tokens.
`blockwise.py` uses the same modules on a whole block's output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.axis import Choice, Options, parameter
from workbench.quantization.number.elements import Integer
from workbench.quantization.number.grid import Grid, in_groups, stored
from workbench.quantization.number.split_grid import SplitGrid
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import OBJECTIVE, ROUNDING
from workbench.quantization.transform.coordinates import Transform, half


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013)."""
    return soft + (hard - soft).detach()


class Learned(Options):
    steps: int = parameter(300, "optimizer steps", ge=1, le=10000, scale="log")
    objective: Choice = OBJECTIVE.choice("layer")


class LearnedLowRank(Learned):
    rank: int = parameter(5, "columns of the thin matrices", ge=1, le=1024)


class LearnedRounding(nn.Module):
    """One layer's learnable rounding, started at nearest rounding on the problem's grid."""

    learning_rate: ClassVar[float] = 1e-2
    signed: ClassVar[bool] = False  # signed gradient descent instead of Adam
    exact: ClassVar[bool] = True  # soft() is on the grid already, with a straight-through gradient
    angular: ClassVar[bool] = False  # a block's objective counts angles
    # a block's second target is what the dense block makes of the quantized prefix's inputs
    homologous: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__()
        self.problem, self.options = problem, options
        self.base = problem.grid()
        scale, zero = self.base.columns(problem.weight.shape[1])
        self.step, self.zero = (
            scale.expand_as(problem.weight),
            0.0 if zero is None else zero.expand_as(problem.weight),
        )
        self.units = problem.weight / self.step + self.zero

    def soft(self, progress: float) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no soft()")

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def learned(self) -> tuple[Tensor, Grid]:
        """(values, grid) after a descent on this layer's own reconstruction error."""
        return learn(self)

    def grid(self) -> Grid:
        return self.base

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Grid]:
        grid = self.grid()
        return self.problem.masked(self.soft(1.0).detach()), grid

    def nearest_units(self, units: Tensor) -> Tensor:
        """round(clip(units)) with a straight-through gradient inside the range and none outside."""
        element = self.base.format.element
        inside = units.clamp(element.lowest, element.highest)
        return straight_through(element.round(units.detach()), inside)

    def clipped_units(self, units: Tensor) -> Tensor:
        """clip(round(units)): unlike round(clip(units)), the gradient passes within half a step beyond the
        ends, too, where integers are rounded to them.
        """
        element, fixed = self.base.format.element, units.detach()
        reached = torch.round(fixed) if isinstance(element, Integer) else fixed
        inside = (reached >= element.lowest) & (reached <= element.highest)
        return straight_through(element.round(fixed), torch.where(inside, units, fixed))


class LearnedSteps(LearnedRounding):
    """A rounding that also learns its grid's scales, s exp(pace log_step); a grid keeps them in the format's
    precision.
    """

    pace: ClassVar[float] = 1.0

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.log_step = nn.Parameter(torch.zeros_like(self.base.scale))

    def scale(self) -> Tensor:
        learned = self.base.scale * (self.pace * self.log_step).exp()
        return straight_through(stored(learned.detach(), self.base.format), learned)

    def steps(self) -> Tensor:
        """The scale of each weight's column."""
        step, _ = replace(self.base, scale=self.scale()).columns(self.problem.weight.shape[1])
        return step

    def grid(self) -> Grid:
        return replace(self.base, scale=self.scale().detach())


@ROUNDING.add(
    "adaround",
    formula="s clip(floor(W / s) + h(V)), h a stretched sigmoid pushed to 0 or 1",
    source="Nagel et al. 2020, eqs. 22 to 24",
    needs="inputs",
    options=Learned,
    traits=("learned", "needs equal steps"),
)
class AdaRound(LearnedRounding):
    """Up or down, learned: s clip(floor(W/s) + h(V)), h a stretched sigmoid pushed to 0 or 1
    (Nagel et al. 2020, eqs. 22 to 24).
    """

    learning_rate: ClassVar[float] = 5e-2
    exact: ClassVar[bool] = False
    low, high, warm, weight = -0.1, 1.1, 0.2, 0.02

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.floor = torch.floor(self.units)
        part = (self.units - self.floor).clamp(0.01, 0.99)
        self.learn(torch.logit((part - self.low) / (self.high - self.low)))

    def learn(self, start: Tensor) -> None:
        """Make what is learned of the logits that leave the weights as they are."""
        self.V = nn.Parameter(start)

    def logits(self) -> Tensor:
        return self.V

    def h(self) -> Tensor:
        return (torch.sigmoid(self.logits()) * (self.high - self.low) + self.low).clamp(0, 1)

    def soft(self, progress: float) -> Tensor:
        element = self.base.format.element
        return self.in_steps((self.floor + self.h()).clamp(element.lowest, element.highest))

    def in_steps(self, units: Tensor) -> Tensor:
        """Weights of whole or real-valued units."""
        return (units - self.zero) * self.step

    def penalty(self, progress: float) -> Tensor | None:
        if progress < self.warm:
            return None
        done = (progress - self.warm) / (1 - self.warm)
        beta = 20 + (2 - 20) * done
        return self.weight * (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Grid]:
        element = self.base.format.element
        units = (self.floor + (self.h() >= 0.5)).clamp(element.lowest, element.highest)
        return self.problem.masked(self.in_steps(units)), self.grid()


@ROUNDING.add(
    "lowrank-adaround",
    formula="adaround with V = V_0 + A_1 A_2, s learned",
    source="Ding et al. 2025, CBQ, LoRA-rounding",
    needs="inputs",
    options=LearnedLowRank,
    traits=("learned", "needs equal steps"),
)
class LowRankAdaRound(LearnedSteps, AdaRound):
    """AdaRound whose logits are moved by a product of two thin matrices, V = V_0 + A_1 A_2
    (Ding et al. 2025, CBQ's LoRA-rounding; rank 5), and whose steps are learned.

    V_0, held fixed, leaves the weights as they are, as in AdaRound. Whole numbers floor(W / s) are those of
    the first step s.
    """

    homologous: ClassVar[bool] = True
    pace: ClassVar[float] = 0.02
    options: LearnedLowRank

    def learn(self, start: Tensor) -> None:
        rows, columns = start.shape
        rank = self.options.rank
        self.start = start
        drawn = torch.randn(rows, rank, generator=self.problem.generator).to(start)
        self.A1, self.A2 = (
            nn.Parameter(drawn),
            nn.Parameter(torch.zeros(rank, columns, device=start.device)),
        )

    def logits(self) -> Tensor:
        return self.start + self.A1 @ self.A2

    def in_steps(self, units: Tensor) -> Tensor:
        return (units - self.zero) * self.steps()


@ROUNDING.add(
    "flexround",
    formula="s1 clip(round(W / (s1 S2 s3)))",
    source="Lee et al. 2023, eq. 2",
    needs="inputs",
    options=Learned,
    traits=("learned", "needs real scales"),
)
class FlexRound(LearnedSteps):
    """A learned divisor for every weight: s1 round(W / (s1 S2 s3)) (Lee et al. 2023, eq. 2);
    the grid's own step s1 is learned too.

    d/dS2 is proportional to W, so large weights can move by more than one step.
    """

    learning_rate: ClassVar[float] = 4e-3

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.log_S2 = nn.Parameter(torch.zeros_like(problem.weight))
        self.log_s3 = nn.Parameter(torch.zeros(len(problem.weight), 1, device=problem.weight.device))

    def soft(self, progress: float) -> Tensor:
        step = self.steps()
        units = self.problem.weight / (step * (self.log_S2 + self.log_s3).exp()) + self.zero
        return (self.clipped_units(units) - self.zero) * step


@ROUNDING.add(
    "signround",
    formula="s clip(round(W / s + V)), |V| <= 1/2, by signed gradient descent",
    source="Cheng et al. 2023, eqs. 3 to 5",
    needs="inputs",
    options=Learned,
    traits=("learned", "needs real scales"),
)
class SignRound(LearnedRounding):
    """A learned offset V in [-1/2, 1/2] before rounding and learned clipping, by signed gradient descent
    (Cheng et al. 2023, eqs. 3 to 5).
    """

    signed: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.V = nn.Parameter(torch.zeros_like(problem.weight))
        self.alpha = nn.Parameter(torch.ones_like(self.base.scale))
        self.beta = nn.Parameter(torch.ones_like(self.base.scale))
        self.range: tuple[Tensor, Tensor] | None = None
        if self.base.format.affine:
            self.range = self.extremes()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the largest weight of every group, which the factors clip, as far as the grid holds
        them already.
        """
        blocks, base = in_groups(self.problem.weight, self.base.group), self.base
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        if base.scale.shape[-2] == 1:
            low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
        share = base.scale / stored((high - low) / base.format.element.highest, base.format)
        return low * share, high * share

    def grid_soft(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point) per group, with straight-through gradients in the clipping factors,
        which stay within [1/2, 1].
        """
        alpha, beta = (straight_through(f.detach().clamp(0.5, 1.0), f) for f in (self.alpha, self.beta))
        if self.range is None:
            learned = self.base.scale * alpha
            return straight_through(stored(learned.detach(), self.base.format), learned), None
        element = self.base.format.element
        assert isinstance(element, Integer)
        low, high = self.range[0] * beta, self.range[1] * alpha
        learned = (high - low) / element.highest
        scale = straight_through(stored(learned.detach(), self.base.format), learned)
        place = -low / scale
        return scale, straight_through(torch.round(place.detach()).clamp(0, element.highest), place)

    def soft(self, progress: float) -> Tensor:
        scale, zero = self.grid_soft()
        step, shift = Grid(self.base.format, scale, zero, self.base.group).columns(
            self.problem.weight.shape[1]
        )
        offset = straight_through(self.V.detach().clamp(-0.5, 0.5), self.V)
        place = 0.0 if shift is None else shift
        return (self.clipped_units(self.problem.weight / step + place + offset) - place) * step

    def grid(self) -> Grid:
        scale, zero = self.grid_soft()
        return replace(self.base, scale=scale.detach(), zero=None if zero is None else zero.detach())


@ROUNDING.add(
    "adaquant",
    formula="Q_s(W + V)",
    source="Hubara et al. 2021, eq. 5",
    needs="inputs",
    options=Learned,
    traits=("learned", "needs real scales"),
)
class AdaQuant(LearnedSteps):
    """The weights themselves and the step move freely: Q_s(W + V)
    (Hubara et al. 2021, eq. 5, with the inputs not quantized).
    """

    learning_rate: ClassVar[float] = 1e-2
    pace: ClassVar[float] = 0.1

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.V = nn.Parameter(torch.zeros_like(problem.weight))  # in steps

    def soft(self, progress: float) -> Tensor:
        step = self.steps()
        return (self.nearest_units(self.problem.weight / step + self.zero + self.V) - self.zero) * step


@ROUNDING.add(
    "scales",
    formula="r_i c_j (s (code - zero)), codes nearest",
    source="Zhao et al. 2025, PTQ1.61",
    needs="inputs",
    options=Learned,
    traits=("learned", "needs real scales", "any grid", "column factors"),
)
class Scales(LearnedRounding):
    """Codes stay nearest; scales of groups, factors of rows and factors of columns are learned:
    r_i c_j (s (code - zero)).

    PTQ1.61's (Zhao et al. 2025) row scale and two factors, which start at 1; a binary row's mean moves with
    its row factor alone. Factors are learned as logarithms; those of columns are kept as the grid's
    transform, in 16 bits each. What is on a wider grid stays as it is.
    """

    learning_rate: ClassVar[float] = 1e-2
    angular: ClassVar[bool] = True
    homologous: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: Learned) -> None:
        super().__init__(problem, options)
        self.codes = self.base.round(problem.weight) / self.step + self.zero
        free = torch.ones_like(self.codes[0])
        if isinstance(self.base, SplitGrid):
            free = (~self.base.mask.all(0)).to(free)
        self.free = free
        self.log_group = nn.Parameter(torch.zeros_like(self.base.scale))
        self.log_row = nn.Parameter(torch.zeros_like(self.base.scale[:, :1]))
        self.log_column = nn.Parameter(torch.zeros_like(free))

    def soft_grid(self) -> Grid:
        learned = self.base.scale * (self.log_group + self.log_row).exp()
        zero = self.base.zero
        if zero is not None and not bool(
            (zero == zero.round()).all()
        ):  # whole zero points are codes and stay
            moved = zero * (-self.log_group).exp()
            zero = straight_through(moved.detach().to(torch.float16).to(moved.dtype), moved)
        return replace(
            self.base, scale=straight_through(stored(learned.detach(), self.base.format), learned), zero=zero
        )

    def transform(self) -> Transform:
        scale = (-self.log_column * self.free).exp()
        return Transform(scale=straight_through(half(scale.detach()), scale))

    def soft(self, progress: float) -> Tensor:
        step, zero = self.soft_grid().columns(self.problem.weight.shape[1])
        return self.transform().weight_back((self.codes if zero is None else self.codes - zero) * step)

    def grid(self) -> Grid:
        found = self.soft_grid()
        return replace(
            found,
            scale=found.scale.detach(),
            zero=None if found.zero is None else found.zero.detach(),
            transform=self.transform().detached(),
        )


def descend(module: LearnedRounding, steps: int) -> list[torch.optim.Optimizer]:
    """The method's optimizer: signed descent with a linearly decaying rate of 1/steps per step is done by
    hand (no optimizer).
    """
    return [] if module.signed else [torch.optim.Adam(module.parameters(), module.learning_rate)]


def advance(module: LearnedRounding, optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """One update from the gradients in `.grad`, with the learning rate decaying linearly to zero;
    clears them.
    """
    remaining = 1 - step / steps
    if module.signed:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=remaining / steps * 1.0)
                    parameter.grad = None
            if isinstance(module, SignRound):
                module.V.clamp_(-0.5, 0.5)
                module.alpha.clamp_(0.5, 1.0)
                module.beta.clamp_(0.5, 1.0)
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = module.learning_rate * (remaining if module.exact else 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@OBJECTIVE.add(
    "layer",
    formula="tr((Q - W) G (Q - W)^T), G the second moment of the layer's inputs",
    source="Nagel et al. 2020, eq. 13",
)
def learn(module: LearnedRounding, options: Options | None = None) -> tuple[Tensor, Grid]:
    """Minimise one layer's reconstruction error. Rows are independent, so each keeps the best values it ever
    had, nearest rounding included (all rows together when the whole matrix shares a learned scale)."""
    problem, steps = module.problem, module.options.steps
    gram = problem.gram / problem.gram.diagonal().mean().clamp_min(1e-30)
    with torch.enable_grad():
        unit = module.step.square().mean(
            1, keepdim=True
        )  # errors are counted in steps: one learning rate fits every layer
        optimizers = descend(module, steps)
        best, best_grid = problem.masked(module.base.round(problem.weight)), module.base
        best_error = row_errors(best - problem.weight, gram)
        for step in range(steps):
            progress = step / steps
            values = problem.masked(module.soft(progress))
            gap = values.detach() - problem.weight
            slope = gap @ gram
            if module.exact or step % 25 == 0:
                kept = (values.detach(), module.grid()) if module.exact else module.hard()
                error = (slope * gap).sum(1) if module.exact else row_errors(kept[0] - problem.weight, gram)
                best, best_grid, best_error = keep_best(best, best_grid, best_error, *kept, error)
            penalty = module.penalty(progress)
            values.backward(2 * slope / unit, retain_graph=penalty is not None)
            if penalty is not None:
                penalty.backward()
            advance(module, optimizers, step, steps)
        values, grid = module.hard()
        best, best_grid, _ = keep_best(
            best, best_grid, best_error, values, grid, row_errors(values - problem.weight, gram)
        )
    return best, best_grid


def row_errors(gap: Tensor, gram: Tensor) -> Tensor:
    return ((gap @ gram) * gap).sum(1)


def keep_best(
    best: Tensor, grid: Grid, error: Tensor, values: Tensor, new_grid: Grid, new_error: Tensor
) -> tuple[Tensor, Grid, Tensor]:
    """Row by row the better of two solutions, with its row of scales;
    as a whole when rows share scales, zero points or column factors that differ.
    """
    same = torch.equal(grid.scale, new_grid.scale) and (
        grid.zero is None or new_grid.zero is None or torch.equal(grid.zero, new_grid.zero)
    )
    shared = new_grid.transform is not None or (len(grid.scale) == 1 and not same)
    if shared and len(values) > 1:
        return (values, new_grid, new_error) if bool(new_error.sum() < error.sum()) else (best, grid, error)
    better = new_error < error
    if not bool(better.any()):
        return best, grid, error
    rows = better[:, None]
    scale = torch.where(rows, new_grid.scale, grid.scale) if len(grid.scale) == len(values) else grid.scale
    zero = grid.zero
    if zero is not None and new_grid.zero is not None and len(zero) == len(values):
        zero = torch.where(rows, new_grid.zero, zero)
    return (
        torch.where(rows, values, best),
        replace(grid, scale=scale, zero=zero),
        torch.where(better, new_error, error),
    )
