"""Equivalent transforms: W x = (W T)(T^-1 x). Rounding happens in the transformed coordinates, where outliers are smaller.

A transform belongs to a grid: the weight's value is Q(W T) T^-1 in the model's own coordinates, and quantized activations are
T Q(T^-1 x), so nothing else of the model changes and any architecture can be used. On hardware T^-1 is applied to the
activations, or folded into the layer before (`rotation.py` does that where the model's normalisation allows it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workbench.quantization.number.grid import Grid
    from workbench.quantization.rounding.problem import Problem


@dataclass(frozen=True)
class Transform:
    """T = diag(scale), then a rotation (signs times a Sylvester-Hadamard matrix on consecutive blocks of `block` inputs), then left kron right.

    scale : (..., in) positive, or None;  signs : (in,) of +-1, or None (no rotation)
    left, right : (..., a, a) and (..., b, b) invertible with a b = in, or both None; a dense matrix is a = 1
    orthogonal : left and right are, so their transposes are their inverses
    """

    scale: Tensor | None = None
    signs: Tensor | None = None
    block: int = 0
    left: Tensor | None = None
    right: Tensor | None = None
    orthogonal: bool = False

    def weight(self, weight: Tensor) -> Tensor:
        """W T for a matrix (..., out, in)."""
        if self.scale is not None:
            weight = weight * self.scale.unsqueeze(-2)
        if self.signs is not None:
            weight = rotated(weight, self.signs, self.block)
        return weight if self.left is None or self.right is None else kronecker(weight, self.left, self.right)

    def weight_back(self, weight: Tensor) -> Tensor:
        if self.left is not None and self.right is not None:
            weight = kronecker(weight, self.inverse(self.left), self.inverse(self.right))
        if self.signs is not None:
            weight = rotated_back(weight, self.signs, self.block)
        return weight if self.scale is None else weight / self.scale.unsqueeze(-2)

    def inputs(self, inputs: Tensor) -> Tensor:
        """T^-1 x for rows (..., in)."""
        if self.scale is not None:
            inputs = inputs / self.scale
        if self.signs is not None:
            inputs = rotated(inputs, self.signs, self.block)
        return (
            inputs
            if self.left is None or self.right is None
            else kronecker(inputs, self.inverse(self.left).mT, self.inverse(self.right).mT)
        )

    def inputs_back(self, inputs: Tensor) -> Tensor:
        if self.left is not None and self.right is not None:
            inputs = kronecker(inputs, self.left.mT, self.right.mT)
        if self.signs is not None:
            inputs = rotated_back(inputs, self.signs, self.block)
        return inputs if self.scale is None else inputs * self.scale

    def gram(self, gram: Tensor) -> Tensor:
        """Second moment of the transformed inputs."""
        return self.inputs(self.inputs(gram).mT).mT

    def detached(self) -> Transform:
        scale, left, right = (None if t is None else t.detach() for t in (self.scale, self.left, self.right))
        return replace(self, scale=scale, left=left, right=right)

    def inverse(self, factor: Tensor) -> Tensor:
        return factor.mT if self.orthogonal else torch.linalg.inv(factor)

    @property
    def bytes(self) -> float:
        """What is stored besides the weights: 16 bits a scale or matrix entry, one bit a sign."""
        numbers = sum(t.numel() for t in (self.scale, self.left, self.right) if t is not None)
        return 2 * numbers + (0 if self.signs is None else self.signs.numel() / 8)

    @property
    def tensors(self) -> dict[str, Any]:
        """What a change has to keep, by the names of its buffers."""
        named = {"smooth": self.scale, "signs": self.signs, "left": self.left, "right": self.right}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor | None], block: int = 0, orthogonal: bool = False
    ) -> Transform | None:
        """The transform of `tensors` (its property's names); None when all are missing."""
        smooth, signs, left, right = (tensors.get(name) for name in ("smooth", "signs", "left", "right"))
        return (
            None
            if smooth is None and signs is None and left is None
            else cls(smooth, signs, block, left, right, orthogonal)
        )


def hadamard(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal Sylvester-Hadamard matrix of a power of two (Sylvester 1867), symmetric."""
    found = torch.ones(1, 1, device=device, dtype=dtype)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


def power_of_two(width: int) -> int:
    """The largest power of two that divides `width`: 384 -> 128."""
    return width & -width


def kronecker(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """rows (left kron right) for rows (..., n, a b), factors (..., a, a) and (..., b, b): two small products instead of one large."""
    table = rows.unflatten(-1, (left.shape[-1], right.shape[-1]))
    left, right = left.to(rows.dtype).unsqueeze(-3), right.to(rows.dtype).unsqueeze(-3)
    return (left.mT @ table @ right).flatten(-2)


def rotated(rows: Tensor, signs: Tensor, block: int) -> Tensor:
    """(rows * signs) H, block by block."""
    matrix = hadamard(block, rows.device, rows.dtype)
    return ((rows * signs.to(rows.dtype)).unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def rotated_back(rows: Tensor, signs: Tensor, block: int) -> Tensor:
    matrix = hadamard(block, rows.device, rows.dtype)
    return (rows.unflatten(-1, (-1, block)) @ matrix).flatten(-2) * signs.to(rows.dtype)


Finder = Callable[["Problem", float], Transform | None]


def smooth(problem: Problem, alpha: float) -> Transform:
    """SmoothQuant: s_j = max|x_j|^alpha / max|w_j|^(1-alpha), weights taking over the activations' outliers (Xiao et al. 2023, eq. 4)."""
    assert problem.largest is not None
    weight = problem.weight.abs().amax(0).clamp_min(1e-5)
    scale = problem.largest.clamp_min(1e-5).pow(alpha) / weight.pow(1 - alpha)
    return Transform(scale=half(scale))


def activation_aware(problem: Problem, alpha: float) -> Transform:
    """AWQ: s = rms(x)^a with the a in 0, 0.05, ... 1 whose nearest rounding has the least output error (Lin et al. 2023)."""
    size = problem.gram.diagonal().clamp_min(1e-12).sqrt()
    best, least = Transform(), math.inf
    for step in range(21):
        scale = size.pow(step / 20)
        trial = Transform(scale=half(scale / (scale.max() * scale.min()).sqrt()))
        moved = problem.moved(trial)
        error = problem.error(trial.weight_back(moved.masked(moved.grid().round(moved.weight))))
        if error < least:
            best, least = trial, error
    return best


def trained(problem: Problem, alpha: float) -> Transform:
    """TEQ: input scales learned by gradient through the rounding, from 1, keeping the best (Cheng et al. 2023)."""
    gram = problem.gram / problem.gram.diagonal().mean().clamp_min(1e-30)
    log_scale = torch.zeros(problem.weight.shape[1], device=problem.weight.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], 1e-2)
    best, least = Transform(scale=torch.ones_like(log_scale).detach()), math.inf
    unit = (problem.weight @ gram * problem.weight).sum().clamp_min(1e-30)
    for step in range(problem.steps):
        with torch.enable_grad():
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / problem.steps)
            scale = log_scale.exp()
            moved = problem.weight * scale
            fixed = problem.moved(Transform(scale=scale.detach()))
            grid = fixed.grid()
            rounded = fixed.masked(grid.round(fixed.weight))
            # The grid's step is the group's largest magnitude over a constant, so it moves with the scales; the straight-through
            # estimate (rounded - exact) / step is constant in them.
            spread = steps_of(moved, grid)
            gap = (rounded - fixed.weight).detach() / spread.detach()
            error = gap * spread / scale
            loss = (error @ gram * error).sum() / unit
            if float(loss.detach()) < least:
                best, least = Transform(scale=half(scale.detach())), float(loss.detach())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return best


def steps_of(weight: Tensor, grid: Grid) -> Tensor:
    """The step each weight's group would have on a grid spanning its range, (out, in), positive; differentiable in the weight."""
    from workbench.quantization.number.grid import in_groups

    blocks = in_groups(weight, grid.group)
    reach = (
        blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
        if grid.format.affine
        else blocks.abs().amax(-1)
    )
    step = (reach / grid.format.element.highest).clamp_min(1e-12)
    return step.repeat_interleave(grid.group, -1)[..., : weight.shape[-1]]


def rotation(problem: Problem, alpha: float) -> Transform:
    """A randomised Hadamard rotation of the inputs (Ashkboos et al. 2024, QuaRot's online rotation)."""
    width = problem.weight.shape[1]
    signs = torch.randint(0, 2, (width,), generator=problem.generator).to(problem.weight) * 2 - 1
    return Transform(signs=signs, block=power_of_two(width))


def principal_components(problem: Problem, alpha: float) -> Transform:
    """ResQ's coordinates for one layer: principal components of its inputs, turned at random within the eighth of largest variance and
    within the rest (Saxena et al. 2025). With `wide_share` 1/8 of quantized activations that subspace keeps 8 bits."""
    from workbench.quantization.rotation.learned import principal

    found = principal(problem.gram, 0.125, problem.generator).to(problem.weight.dtype)
    return Transform(left=torch.ones_like(found[:1, :1]), right=found, orthogonal=True)


def flat(problem: Problem, alpha: float) -> Transform:
    """FlatQuant's learned Kronecker transform (Sun et al. 2025), see `flatness.py`."""
    from workbench.quantization.transform import flatquant

    return flatquant.flat(problem, alpha)


def haar(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal (width, width), float64, from the Haar measure (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * torch.sign(r.diagonal())


def half(scale: Tensor) -> Tensor:
    """Scales as stored, in 16 bits."""
    return scale.clamp(1e-4, 1e4).to(torch.float16).float()


TRANSFORMS: dict[str, Finder] = {
    "smooth": smooth,
    "awq": activation_aware,
    "teq": trained,
    "hadamard": rotation,
    "resq": principal_components,
    "flatquant": flat,
}


def in_coordinates(problem: Problem, name: str, alpha: float) -> tuple[Problem, Transform | None]:
    """The problem in the coordinates of the named transform."""
    if name == "none":
        return problem, None
    found = TRANSFORMS[name](problem, alpha)
    assert found is not None
    return problem.moved(found), found
