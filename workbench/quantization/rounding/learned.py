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

from workbench.quantization.number.formats import Integer
from workbench.quantization.number.grid import Grid, in_groups, stored
from workbench.quantization.number.split_grid import SplitGrid
from workbench.quantization.rounding.problem import Problem, rounding
from workbench.quantization.transform.coordinates import Transform, half


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013)."""
    return soft + (hard - soft).detach()


class LearnedRounding(nn.Module):
    """One layer's learnable rounding, started at nearest rounding on the problem's grid."""

    learning_rate: ClassVar[float] = 1e-2
    signed: ClassVar[bool] = False  # signed gradient descent instead of Adam
    exact: ClassVar[bool] = True  # soft() is on the grid already, with a straight-through gradient
    # a block's objective counts angles, and the dense block on the quantized prefix's inputs as a second
    # target
    angular: ClassVar[bool] = False

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
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

    def grid(self) -> Grid:
        return self.base

    @torch.no_grad()
    def hard(self) -> tuple[Tensor, Grid]:
        grid = self.grid()
        return self.problem.masked(self.soft(1.0).detach()), grid

    def nearest_units(self, units: Tensor) -> Tensor:
        """Rounded units with a straight-through gradient inside the range and none outside."""
        element = self.base.format.element
        inside = units.clamp(element.lowest, element.highest)
        return straight_through(element.round(units.detach()), inside)


class AdaRound(LearnedRounding):
    """Up or down, learned: s clip(floor(W/s) + h(V)), h a stretched sigmoid pushed to 0 or 1
    (Nagel et al. 2020, eqs. 22 to 24).
    """

    learning_rate: ClassVar[float] = 5e-2
    exact: ClassVar[bool] = False
    low, high, warm, weight = -0.1, 1.1, 0.2, 0.02

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
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
        return ((self.floor + self.h()).clamp(element.lowest, element.highest) - self.zero) * self.step

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
        return self.problem.masked((units - self.zero) * self.step), self.base


class LowRankAdaRound(AdaRound):
    """AdaRound whose logits are moved by a product of two thin matrices, V = V_0 + A_1 A_2
    (Ding et al. 2025, CBQ's LoRA-rounding; rank 5).

    V_0, held fixed, leaves the weights as they are, as in AdaRound.
    """

    rank: ClassVar[int] = 5

    def learn(self, start: Tensor) -> None:
        rows, columns = start.shape
        self.start = start
        drawn = torch.randn(rows, self.rank, generator=self.problem.generator).to(start)
        self.A1, self.A2 = (
            nn.Parameter(drawn),
            nn.Parameter(torch.zeros(self.rank, columns, device=start.device)),
        )

    def logits(self) -> Tensor:
        return self.start + self.A1 @ self.A2


class FlexRound(LearnedRounding):
    """A learned divisor for every weight: s1 round(W / (s1 S2 s3)) (Lee et al. 2023, eq. 2);
    the grid's own step s1 is learned too.

    d/dS2 is proportional to W, so large weights can move by more than one step.
    """

    learning_rate: ClassVar[float] = 4e-3

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.log_s1 = nn.Parameter(torch.zeros_like(self.base.scale))
        self.log_S2 = nn.Parameter(torch.zeros_like(problem.weight))
        self.log_s3 = nn.Parameter(torch.zeros(len(problem.weight), 1, device=problem.weight.device))

    def scale(self) -> Tensor:
        learned = self.base.scale * self.log_s1.exp()
        return straight_through(stored(learned.detach(), self.base.format), learned)

    def soft(self, progress: float) -> Tensor:
        step, _ = replace(self.base, scale=self.scale()).columns(self.problem.weight.shape[1])
        units = self.problem.weight / (step * (self.log_S2 + self.log_s3).exp()) + self.zero
        return (self.nearest_units(units) - self.zero) * step

    def grid(self) -> Grid:
        return replace(self.base, scale=self.scale().detach())


class SignRound(LearnedRounding):
    """A learned offset V in [-1/2, 1/2] before rounding and learned clipping, by signed gradient descent
    (Cheng et al. 2023, eqs. 3 to 5).
    """

    signed: ClassVar[bool] = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.V = nn.Parameter(torch.zeros_like(problem.weight))
        self.alpha = nn.Parameter(torch.ones_like(self.base.scale))
        self.beta = nn.Parameter(torch.ones_like(self.base.scale))
        self.range: tuple[Tensor, Tensor] | None = None
        if self.base.format.affine:
            assert self.base.zero is not None
            element = self.base.format.element
            self.range = (
                (element.lowest - self.base.zero) * self.base.scale,
                (element.highest - self.base.zero) * self.base.scale,
            )

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
        return (self.nearest_units(self.problem.weight / step + place + offset) - place) * step

    def grid(self) -> Grid:
        scale, zero = self.grid_soft()
        return replace(self.base, scale=scale.detach(), zero=None if zero is None else zero.detach())


class AdaQuant(LearnedRounding):
    """The weights themselves and the step move freely: Q_s(W + V)
    (Hubara et al. 2021, eq. 5, with the inputs not quantized).
    """

    learning_rate: ClassVar[float] = 1e-2

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.V = nn.Parameter(torch.zeros_like(problem.weight))  # in steps
        self.log_step = nn.Parameter(torch.zeros_like(self.base.scale))

    def scale(self) -> Tensor:
        learned = self.base.scale * (0.1 * self.log_step).exp()
        return straight_through(stored(learned.detach(), self.base.format), learned)

    def soft(self, progress: float) -> Tensor:
        step, _ = replace(self.base, scale=self.scale()).columns(self.problem.weight.shape[1])
        return (self.nearest_units(self.problem.weight / step + self.zero + self.V) - self.zero) * step

    def grid(self) -> Grid:
        return replace(self.base, scale=self.scale().detach())


class Scales(LearnedRounding):
    """Codes stay nearest; scales of groups, factors of rows and factors of columns are learned:
    r_i c_j (s (code - zero)).

    PTQ1.61's (Zhao et al. 2025) row scale and two factors, which start at 1; a binary row's mean moves with
    its row factor alone. Factors are learned as logarithms; those of columns are kept as the grid's
    transform, in 16 bits each. What is on a wider grid stays as it is.
    """

    learning_rate: ClassVar[float] = 1e-2
    angular: ClassVar[bool] = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
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


def learn(problem: Problem, kind: type[LearnedRounding]) -> tuple[Tensor, Grid]:
    """Minimise one layer's reconstruction error. Rows are independent, so each keeps the best values it ever
    had, nearest rounding included (all rows together when the whole matrix shares a learned scale)."""
    gram = problem.gram / problem.gram.diagonal().mean().clamp_min(1e-30)
    with torch.enable_grad():
        module = kind(problem)
        unit = module.step.square().mean(
            1, keepdim=True
        )  # errors are counted in steps: one learning rate fits every layer
        optimizers = descend(module, problem.steps)
        best, best_grid = problem.masked(module.base.round(problem.weight)), module.base
        best_error = row_errors(best - problem.weight, gram)
        for step in range(problem.steps):
            progress = step / problem.steps
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
            advance(module, optimizers, step, problem.steps)
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
    as a whole when rows share scales or column factors that differ.
    """
    shared = new_grid.transform is not None or (
        len(grid.scale) == 1 and not torch.equal(grid.scale, new_grid.scale)
    )
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


LEARNED: dict[str, type[LearnedRounding]] = {
    "adaround": AdaRound,
    "lowrank-adaround": LowRankAdaRound,
    "flexround": FlexRound,
    "signround": SignRound,
    "adaquant": AdaQuant,
    "scales": Scales,
}


@rounding("adaround")
def adaround(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, AdaRound)


@rounding("lowrank-adaround")
def lowrank_adaround(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, LowRankAdaRound)


@rounding("flexround")
def flexround(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, FlexRound)


@rounding("signround")
def signround(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, SignRound)


@rounding("adaquant")
def adaquant(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, AdaQuant)


@rounding("scales")
def scales(problem: Problem) -> tuple[Tensor, Grid]:
    return learn(problem, Scales)


@rounding("hqq")
def half_quadratic(
    problem: Problem, norm: float = 0.7, beta: float = 10.0, growth: float = 1.01, iterations: int = 20
) -> tuple[Tensor, Grid]:
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
        zero, strength = start, beta
        for _ in range(iterations):
            codes = element.round(blocks / scale + zero)
            gap = blocks - (codes - zero) * scale
            error = (gap.abs().pow(norm) * kept).sum(-1, keepdim=True)
            better = error < best_error
            best, best_error = torch.where(better, zero, best), torch.where(better, error, best_error)
            size = gap.abs()
            shrunk = torch.sign(gap) * torch.relu(size - size.clamp_min(1e-12).pow(norm - 1) / strength)
            zero = ((codes - (blocks - shrunk) / scale) * kept).sum(-1, keepdim=True)
            strength *= growth
    found = replace(grid, zero=best.squeeze(-1).to(torch.float16).float())
    return problem.masked(found.round(problem.weight)), found
