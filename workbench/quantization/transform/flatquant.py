"""FlatQuant: an invertible Kronecker transform learned for every layer,
so that weights and activations lose less when rounded (Sun et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.quantization.activations.activations import rounded_inputs
from workbench.quantization.activations.sequential import collecting
from workbench.quantization.number.grid import steps_of
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.transform.coordinates import Transform, haar, half
from workbench.quantization.transform.transform import TRANSFORM, TransformSteps
from workbench.statistics.inputs import kept_positions
from workbench.subjects import Layer, Subject

ROWS = 512  # sampled tokens of a layer's inputs


def factors_of(width: int) -> tuple[int, int]:
    """The most even a x b = width, a <= b: 384 -> (16, 24)."""
    small = next(a for a in range(math.isqrt(width), 0, -1) if width % a == 0)
    return small, width // small


@TRANSFORM.add(
    "flatquant",
    formula="T = diag(c) (P1 kron P2), P1 and P2 any invertible matrices",
    source="Sun et al. 2025, FlatQuant, eq. 4",
    needs="inputs",
    title="FlatQuant",
    options=TransformSteps,
    traits=("mixes inputs", "needs rows"),
)
def flat(problem: Problem, options: TransformSteps) -> Transform:
    """T = diag(c) (P1 kron P2), P1 and P2 any invertible matrices, that minimises ||Q(X T^-T)
    Q(W T)^T - X W^T||^2 (Sun et al. 2025, eq. 4).

    With exact activations X may be any factor of the second moment. The error of a rounding is (its distance
    in steps, held fixed) x (the step, which moves with T); Adam, from the better of the identity and a random
    rotation, keeping the best. The paper's learned clipping thresholds are the grid's own rule here.
    """
    weight, rows = problem.weight, problem.rows if problem.rows is not None else factor(problem.gram)
    exact = rows @ weight.T
    unit = exact.square().sum().clamp_min(1e-30)

    def relative_error(transform: Transform) -> Tensor:
        moved, inputs = transform.weight(weight), transform.inputs(rows)
        with torch.no_grad():
            fixed = problem.moved(transform.detached())
            grid = fixed.grid()
            gap = fixed.masked(grid.round(fixed.weight)) - fixed.weight
        step = steps_of(moved, grid)
        rounded = moved + gap / step.detach() * step
        if problem.activation is not None:
            distance = rounded_inputs(inputs.detach(), problem.activation, None, None) - inputs.detach()
            reach = inputs.amax(-1, keepdim=True).clamp(min=0) - inputs.amin(-1, keepdim=True).clamp(max=0)
            inputs = inputs + distance / reach.detach().clamp_min(1e-12) * reach
        return (inputs @ rounded.T - exact).square().sum() / unit

    a, b = factors_of(weight.shape[1])
    starts = [
        tuple(torch.eye(n, device=weight.device) for n in (a, b)),
        tuple(haar(n, problem.generator).to(weight) for n in (a, b)),
    ]
    with torch.no_grad():
        best, least = Transform(), float(relative_error(Transform()))
        left, right = min(starts, key=lambda s: float(relative_error(Transform(left=s[0], right=s[1]))))
    log_scale = torch.zeros(weight.shape[1], device=weight.device, requires_grad=True)
    left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [left, right], "lr": 5e-3}, {"params": [log_scale], "lr": 1e-2}])
    first = [group["lr"] for group in optimizer.param_groups]
    for step in range(options.steps):
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * (1 - step / options.steps)
        with torch.enable_grad():
            transform = Transform(scale=log_scale.exp(), left=left, right=right)
            loss = relative_error(transform)
        if not bool(torch.isfinite(loss)):
            break
        if float(loss.detach()) < least:
            best, least = transform.detached(), float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if best.left is None or best.right is None or best.scale is None:
        return Transform(scale=torch.ones_like(log_scale).detach())
    return Transform(scale=half(best.scale), left=best.left.half().float(), right=best.right.half().float())


def factor(gram: Tensor) -> Tensor:
    """Rows F (in, in) with F^T F = gram: they stand for the tokens of a second moment."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (values.clamp_min(0).sqrt()[:, None] * vectors.T).to(gram.dtype)


@torch.no_grad()
def input_rows(
    on: Subject, layers: Sequence[Layer], examples: int, generator: torch.Generator, count: int = ROWS
) -> dict[str, Tensor]:
    """name -> (at most `count`, in) inputs of the layer, drawn at random from the tokens of up to 16
    calibration examples.
    """
    found: dict[str, Tensor] = {}
    for batch in on.batches("calibration", 16, min(examples, 16)):
        with collecting(on, layers) as (capture, rows):
            capture.keep = kept_positions(on, batch)
            on.task.output(on.model, batch)
        for (name, _), parts in rows.items():
            every = torch.cat(parts).float()
            found[name] = every[torch.randperm(len(every), generator=generator)[:count].to(every.device)]
    return found
