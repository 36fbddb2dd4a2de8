"""LAMB (You et al. 2020, algorithm 2): Adam with a rate for every layer, for large batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.kernels.training.optimizer_state import fp32_state
from workbench.kernels.training.optimizer_step import fuses, optimizer_step
from workbench.training.optimizer.group_optimizer import GroupOptimizer, adam_direction
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


def trust_ratios(weights: list[Tensor], updates: list[Tensor], scale: float, largest: float) -> list[Tensor]:
    """phi(|w|) / |scale u| per tensor with phi(z) = min(z, largest); 1 where either norm is zero.
    Scalars of the weights' dtype.
    """
    above, below = (
        torch.stack(torch._foreach_norm(weights)),
        torch.stack(torch._foreach_norm(updates)) * scale,
    )
    return list(
        torch.where(
            (above > 0) & (below > 0), above.clamp(max=largest) / below, torch.ones_like(above)
        ).unbind()
    )


class LAMB(GroupOptimizer):
    """Adam's direction, scaled per tensor to the size of the weights.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  r = m_hat / (sqrt(v_hat) + eps);  u = r + wd w
    w <- w - lr phi(|w|) / |u| u, phi(z) = min(z, largest), ratio 1 when a norm is 0.

    `state[p]["trust_ratio"]` holds the last ratio of each tensor.
    bias_correction=False gives the variant of the authors' code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        largest: float = 10.0,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                largest=largest,
                bias_correction=bias_correction,
            ),
        )

    def update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        first, second = self.kept("exp_avg", weights), self.kept("exp_avg_sq", weights)
        if fuses(weights):
            options = {k: group[k] for k in ("betas", "eps", "weight_decay", "largest", "bias_correction")}
            for p, g, m, v in zip(weights, gradients, first, second, strict=True):
                state = fp32_state((m, v))
                self.state[p]["trust_ratio"] = optimizer_step(
                    p, g, state, "lamb", group["lr"], group["step"], **options
                )
            return
        updates, scale = adam_direction(
            first, second, gradients, group["betas"], group["eps"], group["step"], group["bias_correction"]
        )
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"] / scale)
        ratios = trust_ratios(weights, updates, scale, group["largest"])
        torch._foreach_addcmul_(weights, updates, ratios, value=-group["lr"] * scale)
        for p, ratio in zip(weights, ratios, strict=True):
            self.state[p]["trust_ratio"] = ratio


class LambOptions(MomentOptions):
    usual_learning_rate = 1e-2

    betas: tuple[float, float] = parameter(
        (0.9, 0.999), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )
    eps: float = parameter(1e-6, "added to the root of the second moment", ge=0)
    largest: float = parameter(10.0, "norm of weights above which a layer's rate grows no more", gt=0)
    bias_correction: bool = parameter(True, "moments corrected for their start; the authors' code has none")


@OPTIMIZER.add(
    "lamb",
    formula="u = m_hat / (sqrt(v_hat) + eps) + wd w; w <- w - lr phi(|w|) / |u| u",
    source="You et al. 2020",
    options=LambOptions,
)
def lamb(model: nn.Module, learning_rate: float, weight_decay: float, options: LambOptions) -> Optimizer:
    return LAMB(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        eps=options.eps,
        largest=options.largest,
        bias_correction=options.bias_correction,
    )
