"""LARS (You, Gitman & Ginsburg 2017): momentum with a rate for every layer, for large batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.group_optimizer import GroupOptimizer
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, decay_groups


class LARS(GroupOptimizer):
    """Momentum SGD whose step is scaled per tensor to the size of the weights.

    u = g + wd w;  m <- momentum m + lr eta |w| / (|g| + wd |w|) u;  w <- w - m. Ratio 1 when a norm is 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        momenta, decay = self.kept("momentum", weights), group["weight_decay"]
        w, g = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
        ratios = torch.where((w > 0) & (g > 0), group["trust"] * w / (g + decay * w), torch.ones_like(w))
        # the rate of each tensor stays on its device as a scalar:
        # one fused pass, no copy of the gradients, no synchronisation
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_addcmul_(momenta, gradients, list(ratios.unbind()), value=group["lr"])
        if decay:
            torch._foreach_addcmul_(momenta, weights, list(ratios.unbind()), value=group["lr"] * decay)
        torch._foreach_sub_(weights, momenta)
        for p, ratio in zip(weights, ratios.unbind(), strict=True):
            self.state[p]["trust_ratio"] = ratio


class LarsOptions(OptimizerOptions):
    usual_learning_rate = 1.0

    momentum: float = parameter(0.9, "decay of the running sum of steps", ge=0, lt=1)
    trust: float = parameter(0.001, "length of a step as a share of the weights' norm, at rate 1", gt=0)


@OPTIMIZER.add(
    "lars",
    formula="m <- mu m + lr eta |w| / (|g| + wd |w|) (g + wd w); w <- w - m",
    source="You, Gitman & Ginsburg 2017",
    options=LarsOptions,
)
def lars(model: nn.Module, learning_rate: float, weight_decay: float, options: LarsOptions) -> Optimizer:
    return LARS(
        decay_groups(model, weight_decay), lr=learning_rate, momentum=options.momentum, trust=options.trust
    )
