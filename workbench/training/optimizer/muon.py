"""Muon (Jordan et al. 2024): momentum orthogonalised by Newton-Schulz,
and weight maps that cap singular values (Newhouse et al. 2025).

torch.optim.Muon iterates in bfloat16; here float32 weights do so on CUDA only, elsewhere the iteration keeps
the weights' own precision (twice the time on a processor that multiplies bfloat16 natively). After each step
a map may keep every matrix's spectral norm below `cap`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.training.optimizer.combined import Together
from workbench.training.optimizer.group_optimizer import GroupOptimizer
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, hidden_matrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: No singular value leaves five steps of the iteration above this
#: (the polynomial's largest value on its range is 1.2024).
LARGEST_UPDATE = 1.21
MAPS = ("none", "soft-cap", "normalise", "hammer", "decay")


def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Newton-Schulz: X <- a X + (b A + c A^2) X with A = X X^T, from X = M / |M|_F;
    singular values end near 1. (out, in) -> (out, in).
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype) if dtype is not None else matrix
    turned = x.shape[0] > x.shape[1]
    x = x.mT if turned else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if turned else x).to(matrix.dtype)


@functools.lru_cache(4096)
def soft_cap_strength(cap: float, growth: float) -> float:
    """The smallest a with f_a(x) <= cap for every x <= cap + growth, f_a(x) = y + a y^3, y = x - a x^3,
    by bisection.

    f_a(x) <= x always holds while y >= 0, so only x above the cap need it; f_a is largest at one end or its
    stationary point, checked on a fine grid.
    """
    xs = cap + growth * torch.linspace(0, 1, 257, dtype=torch.float64)

    def holds(a: float) -> bool:
        y = xs - a * xs**3
        return bool((y >= 0).all() and (y + a * y**3 <= cap * (1 + 1e-12)).all())

    high = 1 / float(xs[-1]) ** 2  # y reaches 0 there
    if not holds(high * (1 - 1e-9)):
        raise BadInput(
            f"lr: a step of spectral norm {growth:.3g} is too long for a cap of {cap:.3g}; "
            "lower lr or raise cap"
        )
    low, high = 0.0, high * (1 - 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def soft_cap(matrix: Tensor, strength: float) -> Tensor:
    """Singular values x -> y + a y^3 with y = x - a x^3, by matrix products alone
    (an odd polynomial needs no decomposition).
    """
    y = torch.addmm(matrix, matrix @ matrix.mT, matrix, alpha=-strength)
    return torch.addmm(y, y @ y.mT, y, alpha=strength)


def top_singular(matrix: Tensor, start: Tensor, iterations: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, left, right) by power iteration from a right vector (in,)."""
    right = start
    for _ in range(iterations):
        left = torch.nn.functional.normalize(matrix @ right, dim=0)
        right = torch.nn.functional.normalize(matrix.mT @ left, dim=0)
    return left @ (matrix @ right), left, right


class Muon(GroupOptimizer):
    """m <- mu m + g;  u = NS(g + mu m);  w <- (1 - lr wd) w - lr s u, for matrices only.

    scale s: "spectral" sqrt(max(1, out / in)) (Jordan et al.), "rms" 0.2 sqrt(max(out, in)) (Moonlight, Liu
    et al. 2025: AdamW's update size, so AdamW's lr and weight decay carry over), "none" 1. weight_map keeps
    spectral norms below `cap` after every step: "soft-cap" (needs scale none), "normalise" w cap / max(sigma,
    cap), "hammer" sets the largest singular value to the cap, "decay" w - lr wd sigma u v^T (spectral weight
    decay).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 5,
        scale: str = "rms",
        weight_map: str = "none",
        cap: float = 1.0,
    ) -> None:
        if scale not in ("spectral", "rms", "none"):
            raise BadInput(f"scale: {scale!r} is unknown; known: spectral, rms, none")
        if weight_map not in MAPS:
            raise BadInput(f"weight_map: {weight_map!r} is unknown; known: {', '.join(MAPS)}")
        if weight_map == "soft-cap" and scale != "none":
            raise BadInput("weight_map: soft-cap bounds the step by lr alone, so it needs scale='none'")
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                steps=steps,
                scale=scale,
                weight_map=weight_map,
                cap=cap,
            ),
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise BadInput(
                        f"params: Muon takes matrices, got a parameter of shape {tuple(p.shape)}; "
                        "give it to AdamW"
                    )

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        momenta, mu = self.kept("momentum", weights), group["momentum"]
        torch._foreach_mul_(momenta, mu)
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=mu) if group["nesterov"] else momenta
        if group["weight_map"] != "decay":
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for p, direction in zip(weights, directions, strict=True):
            factor = {
                "spectral": max(1.0, p.shape[0] / p.shape[1]) ** 0.5,
                "rms": 0.2 * max(p.shape) ** 0.5,
                "none": 1.0,
            }[group["scale"]]
            p.sub_(
                orthogonalise(
                    direction,
                    group["steps"],
                    torch.bfloat16 if p.is_cuda and p.dtype == torch.float32 else None,
                ),
                alpha=group["lr"] * factor,
            )
            self._map(p, group, self.state[p])

    def _map(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        kind, cap = group["weight_map"], group["cap"]
        if kind == "none":
            return
        if kind == "soft-cap":
            p.copy_(soft_cap(p, soft_cap_strength(cap, group["lr"] * LARGEST_UPDATE)))
            return
        if "right" not in state:
            state["right"] = torch.full((p.shape[1],), p.shape[1] ** -0.5, dtype=p.dtype, device=p.device)
        sigma, left, state["right"] = top_singular(p, state["right"])
        if kind == "normalise":
            p.mul_(cap / sigma.clamp_min(cap))
        elif kind == "hammer":
            p.add_(torch.outer(left, state["right"]) * (cap - sigma))
        else:
            p.sub_(torch.outer(left, state["right"]) * (group["lr"] * group["weight_decay"] * sigma))


class MuonOptions(MomentOptions):
    momentum: float = parameter(0.95, "decay of the running sum of gradients", ge=0, lt=1)
    nesterov: bool = parameter(True, "look ahead along the momentum")
    iterations: int = parameter(5, "Newton-Schulz iterations", ge=1, le=100)
    scale: Literal["rms", "spectral", "none"] = parameter(
        "rms", "length of a step: AdamW's root mean square, the spectral norm of the layer's shape, or 1"
    )
    weight_map: Literal["none", "soft-cap", "normalise", "hammer", "decay"] = parameter(
        "none", "what keeps spectral norms below the cap after every step (Newhouse et al. 2025)"
    )
    cap: float = parameter(1.0, "largest spectral norm", gt=0)
    adamw_ratio: float = parameter(1.0, "rate of AdamW, on all but the hidden matrices, over Muon's", gt=0)
    betas: tuple[float, float] = parameter((0.9, 0.95), "AdamW's, on all but the hidden matrices")


@OPTIMIZER.add(
    "muon",
    formula="m <- mu m + g; w <- (1 - lr wd) w - lr s NS(g + mu m)",
    source="Jordan et al. 2024, Liu et al. 2025",
    options=MuonOptions,
)
def muon(model: nn.Module, learning_rate: float, weight_decay: float, options: MuonOptions) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    parts: list[Optimizer] = []
    if matrices:
        parts.append(
            Muon(
                matrices,
                lr=learning_rate,
                weight_decay=weight_decay,
                momentum=options.momentum,
                nesterov=options.nesterov,
                steps=options.iterations,
                scale=options.scale,
                weight_map=options.weight_map,
                cap=options.cap,
            )
        )
    if rest:
        rate = learning_rate * options.adamw_ratio
        parts.append(torch.optim.AdamW(rest, lr=rate, betas=options.betas, weight_decay=0.0))
    return Together(parts)
