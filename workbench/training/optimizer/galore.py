"""GaLore (Zhao et al. 2024): Adam's moments in a low-rank subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.group_optimizer import GroupOptimizer, adam_direction
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, hidden_matrices


def projection(gradient: Tensor, rank: int) -> tuple[Tensor, bool]:
    """The leading `rank` singular vectors of the shorter side:
    P (shorter, rank) and whether that side is the left one (out).
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    on_left = gradient.shape[0] <= gradient.shape[1]
    return (left[:, :rank].contiguous() if on_left else right[:rank].mT.contiguous()), on_left


class GaLore(GroupOptimizer):
    """R = P^T G;  N = Adam(R);  w <- w - lr (alpha P N + wd w),
    with P refreshed from the gradient's SVD every `refresh` steps.

    Matrices (out, in) with both sides above `rank` are projected on their shorter side, the rest is plain
    AdamW. State of an (m, n) matrix, m <= n: 2 n r for the moments and m r for P, where Adam keeps 2 m n.
    Moments are kept across refreshes, as the authors do.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 32,
        refresh: int = 200,
        alpha: float = 0.25,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                rank=rank,
                refresh=refresh,
                alpha=alpha,
            ),
        )

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        rank = group["rank"]
        if (group["step"] - 1) % group["refresh"] == 0:
            for p, gradient in zip(weights, gradients, strict=True):
                if p.ndim == 2 and min(p.shape) > rank:
                    self.state[p]["projection"], _ = projection(gradient, rank)
        bases = [self.state[p].get("projection") for p in weights]
        reduced = [
            g if basis is None else basis.mT @ g if len(basis) == len(g) else g @ basis
            for g, basis in zip(gradients, bases, strict=True)
        ]
        first, second = self.kept("exp_avg", weights, reduced), self.kept("exp_avg_sq", weights, reduced)
        updates, scale = adam_direction(first, second, reduced, group["betas"], group["eps"], group["step"])
        lr = group["lr"] * scale
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        whole = [(p, u) for p, u, basis in zip(weights, updates, bases, strict=True) if basis is None]
        if whole:
            torch._foreach_sub_([p for p, _ in whole], [u for _, u in whole], alpha=lr)
        for p, update, basis in zip(weights, updates, bases, strict=True):
            if basis is not None:  # the product is added where the weight lies: no matrix of its size is made
                left, right = (basis, update) if len(basis) == len(p) else (update, basis.mT)
                p.addmm_(left, right, alpha=-lr * group["alpha"])


class GaLoreOptions(MomentOptions):
    usual_learning_rate = 1e-2

    betas: tuple[float, float] = parameter(
        (0.9, 0.999), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )
    eps: float = parameter(1e-8, "added to the root of the second moment", ge=0)
    rank: int = parameter(32, "dimensions of the subspace; smaller matrices are not projected", ge=1)
    refresh: int = parameter(200, "steps between two subspaces", ge=1, unit="steps")
    alpha: float = parameter(0.25, "length of a projected step over Adam's", gt=0)


@OPTIMIZER.add(
    "galore",
    formula="N = Adam(P^T G); w <- w - lr (alpha P N + wd w), P the leading singular vectors of G",
    source="Zhao et al. 2024",
    options=GaLoreOptions,
)
def galore(model: nn.Module, learning_rate: float, weight_decay: float, options: GaLoreOptions) -> Optimizer:
    matrices, rest = hidden_matrices(model)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "rank": 2**31},
    ]
    return GaLore(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=options.betas,
        eps=options.eps,
        rank=options.rank,
        refresh=options.refresh,
        alpha=options.alpha,
    )
