"""PSGD with Kronecker factors (Li 2018, 2024): a preconditioner on a Lie group,
fitted so that it whitens the momentum.

pytorch_optimizer's Kron forms the same products by one einsum, which without opt_einsum multiplies
the factors out first (80 times slower on a 258 x 24 matrix) and balances factors by numpy's global generator,
which no checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.group_optimizer import GroupOptimizer
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, decay_groups

TINY = torch.finfo(torch.bfloat16).tiny


def spectral_lower_bound(matrix: Tensor) -> Tensor:
    """A lower bound of the spectral norm of a symmetric matrix, tight to a few per cent:
    one product with its largest column.
    """
    scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    scaled = matrix / scale
    image = scaled @ scaled[:, scaled.square().sum(0).argmax()]
    return scale * (scaled @ (image / image.norm().clamp_min(torch.finfo(matrix.dtype).tiny))).norm()


def left_times(factor: Tensor, values: Tensor) -> Tensor:
    """Q X for a triangular factor (m, m) or a diagonal one (m,)."""
    return factor @ values if factor.ndim == 2 else factor[:, None] * values


def left_solved(factor: Tensor, values: Tensor) -> Tensor:
    """Q^-T X."""
    return (
        torch.linalg.solve_triangular(factor.mT, values, upper=False)
        if factor.ndim == 2
        else values / factor[:, None]
    )


def fitted(factor: Tensor, above: Tensor, below: Tensor, lr: float) -> Tensor:
    """One relative gradient step of Q on tr(A A^T) + tr(B B^T):
    Q - lr triu(A A^T - B B^T) Q / |A A^T + B B^T|.
    """
    if factor.ndim == 1:
        a, b = above.square().sum(1), below.square().sum(1)
        return factor - lr * (a - b) * factor / ((a + b).max() + TINY)
    a, b = above @ above.mT, below @ below.mT
    return factor - lr * torch.triu(a - b) @ factor / (spectral_lower_bound(a + b) + TINY)


class Kron(GroupOptimizer):
    """m <- b m + (1 - b) g, corrected for its start; g' = P m = Q1^T Q1 m Q2^T Q2,
    its root mean square at most 1.1; w <- w - lr (g' + wd w).

    Q1, Q2 are upper triangular, diagonal for sides above `largest` and for vectors, and follow A = Q1 m Q2^T
    and B = Q1^-T V Q2^-1 with V normal, every step at first (`flat` steps), then ever more seldom,
    down to `least` of the steps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_lr: float = 0.1,
        largest: int = 2048,
        flat: int = 500,
        least: float = 0.03,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                factor_lr=factor_lr,
                largest=largest,
                flat=flat,
                least=least,
            ),
        )

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = self.kept("momentum", weights)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        group["waited"] = group.get("waited", 0) + 1
        share = min(max(math.exp(-0.001 * (group["step"] - 1 - group["flat"])), group["least"]), 1.0)
        fitting = group["waited"] >= 1 / share
        if fitting:
            group["waited"] = 0
        for p, momentum in zip(weights, momenta, strict=True):
            m = (momentum / (1 - group["momentum"] ** group["step"])).reshape(p.shape[0] if p.ndim else 1, -1)
            first, second = self._factors(p, m, group["largest"])
            if fitting:
                noise = torch.randn_like(m)
                above = left_times(second, left_times(first, m).mT).mT
                below = left_solved(second, left_solved(first, noise).mT).mT
                first, second = (
                    fitted(first, above, below, group["factor_lr"]),
                    fitted(second, above.mT, below.mT, group["factor_lr"]),
                )
                self.state[p]["first"], self.state[p]["second"] = first, second
            image = left_times(
                second.mT if second.ndim == 2 else second, left_times(second, left_times(first, m).mT)
            ).mT
            update = left_times(first.mT if first.ndim == 2 else first, image).view_as(p)
            update *= (1.1 / (update.square().mean().sqrt() + 1e-6)).clamp(max=1.0)
            p.mul_(1 - group["lr"] * (group["weight_decay"] if p.ndim >= 2 else 0.0)).sub_(
                update, alpha=group["lr"]
            )

    def _factors(self, p: Tensor, m: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        state = self.state[p]
        if "first" not in state:
            for name, size in (("first", m.shape[0]), ("second", m.shape[1])):
                whole = p.ndim >= 2 and 1 < size <= largest
                state[name] = (
                    torch.eye(size, dtype=p.dtype, device=p.device)
                    if whole
                    else torch.ones(size, dtype=p.dtype, device=p.device)
                )
        return state["first"], state["second"]


class KronOptions(OptimizerOptions):
    momentum: float = parameter(0.9, "decay of the average of gradients", ge=0, lt=1)
    factor_learning_rate: float = parameter(0.1, "relative rate of the factors", gt=0, scale="log")
    largest: int = parameter(2048, "a side above it has a diagonal factor", ge=1)
    flat: int = parameter(500, "steps at first in which the factors always follow", ge=0, unit="steps")
    least: float = parameter(0.03, "share of the steps in which they follow in the end", gt=0, le=1)


@OPTIMIZER.add(
    "kron",
    formula="w <- w - lr (Q1^T Q1 m Q2^T Q2 + wd w), Q1 and Q2 fitted to whiten m",
    source="Li 2018, PSGD",
    options=KronOptions,
)
def kron(model: nn.Module, learning_rate: float, weight_decay: float, options: KronOptions) -> Optimizer:
    return Kron(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        momentum=options.momentum,
        factor_lr=options.factor_learning_rate,
        largest=options.largest,
        flat=options.flat,
        least=options.least,
    )
