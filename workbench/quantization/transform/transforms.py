"""Equivalent transforms: W x = (W T)(T^-1 x). Rounding happens in the transformed coordinates,
where outliers are smaller.

A transform belongs to a grid: the weight's value is Q(W T) T^-1 in the model's own coordinates, and quantized
activations are T Q(T^-1 x), so nothing else of the model changes and any architecture can be used. On
hardware T^-1 is applied to the activations, or folded into the layer before
(`rotation/fold.py` does that where the model's normalisation allows it).
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch

from workbench.axis import Options, parameter
from workbench.quantization.number.grid import steps_of
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.transform.coordinates import Transform, half
from workbench.quantization.transform.hadamard_orders import power_of_two, widest
from workbench.quantization.transform.transform import TRANSFORM, TransformSteps


class Smooth(Options):
    alpha: float = parameter(0.5, "how far outliers move from activations to weights", ge=0, le=1, step=0.05)


@TRANSFORM.add("none", formula="T = I", source="the identity")
def none(problem: Problem, options: Options) -> None:
    """The model's own coordinates."""


@TRANSFORM.add(
    "smooth",
    formula="s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)",
    source="Xiao et al. 2023, SmoothQuant, eq. 4",
    needs="inputs",
    title="SmoothQuant",
    options=Smooth,
    traits="needs ranges",
)
def smooth(problem: Problem, options: Smooth) -> Transform:
    """SmoothQuant: s_j = max|x_j|^alpha / max|w_j|^(1-alpha), weights taking over the activations' outliers
    (Xiao et al. 2023, eq. 4).
    """
    assert problem.largest is not None
    weight = problem.weight.abs().amax(0).clamp_min(1e-5)
    scale = problem.largest.clamp_min(1e-5).pow(options.alpha) / weight.pow(1 - options.alpha)
    return Transform(scale=half(scale))


@TRANSFORM.add(
    "activation-aware",
    formula="s = rms(x)^a, the a in 0, 0.05, ... 1 with the least output error of the layer",
    source="after Lin et al. 2023, AWQ: a scale a layer, online",
    needs="inputs",
)
def activation_aware(problem: Problem, options: Options) -> Transform:
    """AWQ's idea for one layer of any model: s = rms(x)^a with the a in 0, 0.05, ... 1 whose nearest rounding
    has the least output error. The authors' one scale a norm, folded, is `equalize` of kind `awq`.
    """
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


@TRANSFORM.add(
    "teq",
    formula="diag(s) learned by gradient through the rounding",
    source="Cheng et al. 2023, TEQ",
    needs="inputs",
    options=TransformSteps,
)
def trained(problem: Problem, options: TransformSteps) -> Transform:
    """TEQ: input scales learned by gradient through the rounding, from 1, keeping the best
    (Cheng et al. 2023).
    """
    gram = problem.gram / problem.gram.diagonal().mean().clamp_min(1e-30)
    log_scale = torch.zeros(problem.weight.shape[1], device=problem.weight.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], 1e-2)
    best, least = Transform(scale=torch.ones_like(log_scale).detach()), math.inf
    unit = (problem.weight @ gram * problem.weight).sum().clamp_min(1e-30)
    for step in range(options.steps):
        with torch.enable_grad():
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / options.steps)
            scale = log_scale.exp()
            moved = problem.weight * scale
            fixed = problem.moved(Transform(scale=scale.detach()))
            grid = fixed.grid()
            rounded = fixed.masked(grid.round(fixed.weight))
            # The grid's step is the group's largest magnitude over a constant, so it moves with the scales;
            # the straight-through estimate (rounded - exact) / step is constant in them.
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


class OnlineHadamard(Options):
    only: str = parameter(
        "*", "layers whose inputs are rotated, comma-separated globs; the others keep their coordinates"
    )
    blocks: bool = parameter(
        False, "mix within the largest power of two that divides the width, not across the whole width"
    )


@TRANSFORM.add(
    "hadamard",
    formula="T = diag(+-1) H",
    source="Ashkboos et al. 2024, QuaRot's online rotation",
    options=OnlineHadamard,
    traits="mixes inputs",
)
def rotation(problem: Problem, options: OnlineHadamard) -> Transform | None:
    """A randomised Hadamard rotation of the inputs (Ashkboos et al. 2024, QuaRot's online rotation)."""
    if not any(fnmatchcase(problem.layer, glob.strip()) for glob in options.only.split(",")):
        return None
    width = problem.weight.shape[1]
    signs = torch.randint(0, 2, (width,), generator=problem.generator).to(problem.weight) * 2 - 1
    return Transform(signs=signs, block=power_of_two(width) if options.blocks else widest(width))


@TRANSFORM.add(
    "resq",
    formula="principal components of the inputs, turned at random within the widest eighth and the rest",
    source="Saxena et al. 2025, ResQ",
    needs="inputs",
    traits="mixes inputs",
)
def principal_components(problem: Problem, options: Options) -> Transform:
    """ResQ's coordinates for one layer: principal components of its inputs, turned at random within
    the eighth of largest variance and within the rest (Saxena et al. 2025).
    With `activations.wide_share` 1/8 of quantized activations that subspace keeps 8 bits.
    """
    from workbench.quantization.rotation.learned import principal

    found = principal(problem.gram, 0.125, problem.generator).to(problem.weight.dtype)
    return Transform(left=torch.ones_like(found[:1, :1]), right=found, orthogonal=True)
