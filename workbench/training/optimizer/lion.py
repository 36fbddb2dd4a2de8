"""Lion: the sign of a momentum (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.kernels.training.optimizer_state import fp32_state
from workbench.kernels.training.optimizer_step import fuses, optimizer_step
from workbench.training.optimizer.group_optimizer import GroupOptimizer
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


class Lion(GroupOptimizer):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + wd w), then m <- b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        momenta, (beta1, beta2) = self.kept("exp_avg", weights), group["betas"]
        if fuses(weights):
            options = {k: group[k] for k in ("betas", "weight_decay")}
            for p, g, m in zip(weights, gradients, momenta, strict=True):
                optimizer_step(p, g, fp32_state((m,)), "lion", group["lr"], group["step"], **options)
            return
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - group["weight_decay"] * group["lr"])
        updates = torch._foreach_lerp(momenta, gradients, weight=1.0 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(momenta, gradients, weight=1.0 - beta2)
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


class LionOptions(MomentOptions):
    usual_learning_rate = 1e-4

    betas: tuple[float, float] = parameter(
        (0.9, 0.99), "share of the momentum in a step and decay of the momentum, each in [0, 1)"
    )


@OPTIMIZER.add(
    "lion",
    formula="w <- (1 - lr wd) w - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g",
    source="Chen et al. 2023",
    options=LionOptions,
)
def lion(model: nn.Module, learning_rate: float, weight_decay: float, options: LionOptions) -> Optimizer:
    return Lion(decay_groups(model, weight_decay), lr=learning_rate, betas=options.betas)
