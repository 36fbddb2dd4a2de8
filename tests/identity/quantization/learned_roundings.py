"""Learned roundings beside their authors' or others' code, or closed-form gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.identity.pairs import Draw, beside
from tests.identity.quantization.quantized_training import joined, leaf
from tests.identity.quantization.quantized_training_derived import half_to_even, in_16_bits
from tests.identity.repositories import loaded, source
from workbench.storage.identity import AUTHORS, FP64, PEER

LAYER = "24 x 64 normal weights, 4 bits"
ROWS = f"{LAYER}, a scale a row, normal upstream gradients"


def problem_of(
    draw: Draw, format: str, granularity: str = "channel", dtype: torch.dtype = torch.float64
) -> Any:
    """A layer (24, 64) to round, with the second moment of 256 correlated inputs."""
    from workbench.quantization.number.formats import named
    from workbench.quantization.rounding.problem import Problem

    weight, inputs = draw.normal(24, 64, dtype=dtype), draw.inputs(256, 64, dtype=dtype)
    return Problem(weight, inputs.T @ inputs, named(format), granularity)


def rounding(problem: Any, name: str, **options: Any) -> Any:
    from workbench.quantization.rounding.rounding import ROUNDING

    return ROUNDING.chosen(name, **options)(problem)


@beside(
    "adaround",
    **source("yhhhli/BRECQ"),
    kind=PEER,
    compared="soft and hard weights, the gradient through the soft ones, that of the penalty at five steps",
    inputs=f"{ROWS}, logits drawn from -2 to 2, both on the scales of our grid",
    tolerance=1e-5,
)
def adaround(draw: Draw) -> tuple[Tensor, Tensor]:
    """AdaRound as BRECQ's authors wrote it, its loss asked for at 10, 30, 50, 70 and 90 of 100 steps."""
    peer = loaded("yhhhli/BRECQ", "quant.layer_recon", packages=("quant",))
    problem = problem_of(draw, "uint4", dtype=torch.float32)
    ours = rounding(problem, "adaround")
    upstream, logits = draw.normal(24, 64), draw.normal(24, 64).clamp(-2, 2)
    grid = ours.base
    given = SimpleNamespace(n_bits=4, sym=False, delta=grid.scale, zero_point=grid.zero, n_levels=16)
    theirs = peer.AdaRoundQuantizer(given, problem.weight, "learned_hard_sigmoid")
    theirs.alpha.data, ours.V.data = logits.clone(), logits.clone()
    theirs.soft_targets = True
    first, second = theirs(problem.weight), ours.soft(0.0)
    first.backward(upstream)
    second.backward(upstream)
    there, here = [first, theirs.alpha.grad.clone()], [second, ours.V.grad.clone()]
    layer = SimpleNamespace(weight_quantizer=theirs)
    loss = peer.LossFunction(layer, weight=ours.weight, max_count=100, b_range=(20, 2), warmup=ours.warm)
    for step in (10, 30, 50, 70, 90):
        theirs.alpha.grad, ours.V.grad, loss.count = torch.zeros(24, 64), torch.zeros(24, 64), step - 1
        nothing = theirs.alpha.sum() * 0
        (loss(nothing.reshape(1, 1), torch.zeros(1, 1)) + nothing).backward()
        penalty = ours.penalty(step / 100)
        if penalty is not None:
            penalty.backward()
        there.append(theirs.alpha.grad.clone())
        here.append(ours.V.grad.clone())
    theirs.soft_targets = False
    return joined(*there, theirs(problem.weight)), joined(*here, ours.hard()[0])


@beside(
    "signround",
    peer="auto-round",
    kind=AUTHORS,
    compared="the rounded weights with a zero point and without one, the gradients of offsets and clipping "
    "factors (theirs of the factors in 16 bits), and all of these after a step of their SignSGD",
    inputs=f"{LAYER}, groups of 32 whose largest magnitude is 2, offsets within a half, "
    "factors from 0.75 to 1, normal upstream gradients",
    tolerance=1e-2,
)
def signround(draw: Draw) -> tuple[Tensor, Tensor]:
    """Without a zero point one factor scales both ends, in theirs two of which we give the same value."""
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym

    from workbench.quantization.rounding.learned import advance

    there, here = [], []
    for format, function in (("uint4", quant_tensor_asym), ("int4", quant_tensor_sym)):
        problem = replace(problem_of(draw, format, "group", torch.float32), group_size=32)
        groups = problem.weight.reshape(48, 32)
        problem.weight = (groups / groups.abs().amax(1, keepdim=True) * 2).reshape(24, 64)
        upstream, offset = draw.normal(24, 64), draw.normal(24, 64).clamp(-2, 2) / 4
        low, high = ((0.875 + draw.normal(24, 2).clamp(-1, 1) / 8).mul(32).round() / 32 for _ in range(2))
        affine = format == "uint4"
        ours = rounding(problem, "signround", steps=1)
        ours.V.data, ours.alpha.data, ours.beta.data = offset.clone(), high.clone(), low.clone()
        v, top = leaf(offset.reshape(48, 32)), leaf(high.flatten())
        bottom = leaf(low.flatten()) if affine else top
        theirs = {"v": v, "max_scale": top, "min_scale": bottom}
        found, *_ = function(problem.weight, 4, 32, **theirs)
        mine = ours.soft(0.0)
        found.backward(upstream)
        mine.backward(upstream)
        factors = (ours.alpha, ours.beta) if affine else (ours.alpha,)
        learned = (top, bottom) if affine else (top,)
        there += [found, v.grad, *(t.grad for t in learned)]
        here += [mine, ours.V.grad.clone(), *(t.grad.clone() for t in factors)]
        SignSGD([v, *learned], lr=1.0 / 16).step()
        advance(ours, [], 0, 16)
        there += [v.detach().clamp(-0.5, 0.5), *(t.detach().clamp(0.5, 1) for t in learned)]
        here += [ours.V, *factors]
    return joined(*there), joined(*here)


@beside(
    "adaquant",
    **source("itayhubara/CalibTIP"),
    kind=AUTHORS,
    compared="the rounded weights at moved weights and steps, and the gradient of the weights in range",
    inputs=f"{ROWS}, moved by up to half a step, steps by up to a tenth",
    tolerance=1e-5,
)
def adaquant(draw: Draw) -> tuple[Tensor, Tensor]:
    """Their range and zero point are those of our grid; ours stops gradients outside the range, as does the
    clamp in theirs.
    """
    peer = loaded("itayhubara/CalibTIP", "quantize", root="models/modules")
    problem = problem_of(draw, "uint4", dtype=torch.float32)
    ours = rounding(problem, "adaquant")
    moved, upstream = draw.normal(24, 64).clamp(-2, 2) / 4, draw.normal(24, 64)
    log_step = draw.normal(24, 1).clamp(-1, 1)
    ours.V.data, ours.log_step.data = moved.clone(), log_step.clone()
    mine = ours.soft(0.0)
    mine.backward(upstream)
    step, zero = ours.grid().scale, ours.base.zero
    weight = leaf(problem.weight + moved * step)
    parameters = peer.QParams(range=step * 15, zero_point=-zero * step, num_bits=4)
    found = peer.quantize_with_grad(weight, qparams=parameters)
    found.backward(upstream)
    return joined(found, weight.grad * step), joined(mine, ours.V.grad)


@beside(
    "flexround",
    peer="Lee et al. 2023, eq. 2",
    kind=FP64,
    compared="the weights, and the gradients of the common step, of every divisor and of every row's",
    inputs=f"{ROWS}, logarithms of divisors drawn from -1/4 to 1/4, fp64",
    tolerance=1e-9,
)
def flexround(draw: Draw) -> tuple[Tensor, Tensor]:
    """W^ = s1 q, q = clip(round(u)), u = W / (s1 S2 s3): dW^/d ln S2 = -s1 u where round(u) is inside and 0
    where it is outside, dW^/d ln s1 = s1 (q - u) inside and s1 q outside.
    """
    problem = problem_of(draw, "int4")
    ours = rounding(problem, "flexround").double()
    upstream = draw.normal(24, 64, dtype=torch.float64)
    for parameter, size in ((ours.log_S2, (24, 64)), (ours.log_s3, (24, 1))):
        parameter.data = draw.normal(*size, dtype=torch.float64).clamp(-1, 1) / 4
    mine = ours.soft(0.0)
    mine.backward(upstream)
    w, g = problem.weight.numpy(), upstream.numpy()
    low, high = w.min(1), w.max(1)
    signed = np.where(high > -low, -1, 1) * np.maximum(high, -low)
    s1 = in_16_bits(signed / 8)[:, None]
    divisors, row = np.exp(ours.log_S2.detach().numpy()), np.exp(ours.log_s3.detach().numpy())
    u = w / (s1 * divisors * row)
    inside = (half_to_even(u) >= -8) & (half_to_even(u) <= 7)
    q = np.clip(half_to_even(u), -8, 7)
    by_divisor = -g * s1 * u * inside
    theirs = (s1 * q, (g * s1 * (q - u * inside)).sum(1), by_divisor, by_divisor.sum(1))
    return (
        joined(*map(torch.from_numpy, theirs)),
        joined(mine, ours.log_step.grad, ours.log_S2.grad, ours.log_s3.grad),
    )


@beside(
    "cbq",
    "lowrank-adaround",
    peer="Ding et al. 2025, CBQ",
    kind=FP64,
    compared="soft weights, and the gradients of both thin matrices",
    inputs=f"{ROWS}, rank 5, fp64",
    tolerance=1e-9,
)
def cbq_rounding(draw: Draw) -> tuple[Tensor, Tensor]:
    """V = V0 + A1 A2 with h(V0) the weights' own fractions; dh/dV = 1.2 f (1 - f) where 0 < h < 1."""
    problem = problem_of(draw, "uint4")
    ours = rounding(problem, "lowrank-adaround")
    upstream = draw.normal(24, 64, dtype=torch.float64)
    thin = draw.normal(24, 5, dtype=torch.float64), draw.normal(5, 64, dtype=torch.float64) / 2
    ours.A1.data, ours.A2.data = thin[0].clone(), thin[1].clone()
    mine = ours.soft(0.0)
    mine.backward(upstream)
    step, zero = (t.double().numpy() for t in (ours.base.scale, ours.base.zero))
    units = problem.weight.numpy() / step + zero
    below = np.floor(units)
    part = (np.clip(units - below, 0.01, 0.99) + 0.1) / 1.2
    start = np.log(part / (1 - part))
    f = 1 / (1 + np.exp(-(start + thin[0].numpy() @ thin[1].numpy())))
    h = np.clip(1.2 * f - 0.1, 0, 1)
    inside = (h > 0) & (h < 1) & (below + h >= 0) & (below + h <= 15)
    slope = upstream.numpy() * step * 1.2 * f * (1 - f) * inside
    theirs = (
        (np.clip(below + h, 0, 15) - zero) * step,
        slope @ thin[1].numpy().T,
        thin[0].numpy().T @ slope,
    )
    return joined(*map(torch.from_numpy, theirs)), joined(mine, ours.A1.grad, ours.A2.grad)


@beside(
    "flexround",
    **source("DeepWok/mase"),
    kind=PEER,
    compared="the weights at drawn divisors",
    inputs=f"{LAYER}, one step for all, divisors from 1 to 1.6, so that nothing is clipped",
    tolerance=1e-6,
)
def flexround_values(draw: Draw) -> tuple[Tensor, Tensor]:
    """Theirs has no clipping and no gradient through its floor."""
    peer = loaded("DeepWok/mase", "flexround_ops", root="src/chop/nn/quantized/modules/flexround")
    problem = problem_of(draw, "int4-odd", "tensor", torch.float32)
    ours = rounding(problem, "flexround")
    theirs = peer.LinearFlexRound(64, 24, bias=False, config={"weight_only": True})
    theirs.weight.data, theirs.s1.data = problem.weight, ours.base.scale.reshape(())
    for name, size in (("S2", (24, 64)), ("s3", (24, 1))):
        log = draw.normal(*size).abs().clamp(max=1) / 4
        getattr(theirs, name).data, getattr(ours, f"log_{name}").data = log.exp(), log
    return theirs(torch.eye(64)).T, ours.soft(0.0)
