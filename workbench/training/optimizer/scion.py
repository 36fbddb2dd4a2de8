"""Scion (Pethick et al. 2025): steps of fixed norm, each layer in the norm that suits it;
pytorch_optimizer's rounds to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.training.optimizer.group_optimizer import GroupOptimizer
from workbench.training.optimizer.muon import orthogonalise
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, hidden_matrices

NORMS = ("spectral", "sign", "rms")


def steepest(direction: Tensor, norm: str) -> Tensor:
    """The unit-norm tensor with the largest inner product with `direction`
    (minus the linear minimisation oracle).

    spectral: sqrt(out / in) U V^T by Newton-Schulz; sign: sign / in (the largest-entry norm, scaled); rms:
    d / sqrt(mean d^2).
    """
    if norm == "spectral":
        return (direction.shape[0] / direction.shape[1]) ** 0.5 * orthogonalise(direction)
    if norm == "sign":
        return direction.sign() / direction.shape[-1]
    return direction / direction.square().mean().sqrt().clamp_min(1e-12)


class Scion(GroupOptimizer):
    """d <- (1 - a) d + a g;  w <- (1 - lr wd) w - lr radius steepest(d), a = 1 - momentum.
    At wd = 1 it is the constrained form.

    Each group names its `norm` (spectral for hidden matrices, sign for the first and last, rms for vectors)
    and its `radius`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        radius: float = 1.0,
        norm: str = "spectral",
    ) -> None:
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, radius=radius, norm=norm)
        )
        for group in self.param_groups:
            if group["norm"] not in NORMS:
                raise BadInput(f"norm: {group['norm']!r} is unknown; known: {', '.join(NORMS)}")

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        averages = self.kept("average", weights)
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(
            weights, [steepest(d, group["norm"]) for d in averages], alpha=group["lr"] * group["radius"]
        )


class ScionOptions(OptimizerOptions):
    usual_learning_rate = 1e-2

    momentum: float = parameter(0.9, "decay of the average of gradients", ge=0, lt=1)
    radius: float = parameter(1.0, "norm of a step on hidden matrices and vectors, at rate 1", gt=0)
    edge_radius: float = parameter(10.0, "norm of a step on embeddings and the head, at rate 1", gt=0)


@OPTIMIZER.add(
    "scion",
    formula="d <- mu d + (1 - mu) g; w <- (1 - lr wd) w - lr radius argmax_{|s| = 1} <d, s>",
    source="Pethick et al. 2025",
    options=ScionOptions,
)
def scion(model: nn.Module, learning_rate: float, weight_decay: float, options: ScionOptions) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    edges, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    inner, outer = options.radius, options.edge_radius
    groups = [
        {"params": matrices, "norm": "spectral", "radius": inner, "weight_decay": weight_decay},
        {"params": edges, "norm": "sign", "radius": outer, "weight_decay": weight_decay},
        {"params": vectors, "norm": "rms", "radius": inner, "weight_decay": 0.0},
    ]
    return Scion([group for group in groups if group["params"]], lr=learning_rate, momentum=options.momentum)
