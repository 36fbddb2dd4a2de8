"""AdamW (Loshchilov & Hutter 2019), Adam with decoupled weight decay, and AdaGrad; torch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.optimizers import (
    OPTIMIZER,
    MomentOptions,
    OptimizerOptions,
    decay_groups,
    fused,
)


class AdamWOptions(MomentOptions):
    eps: float = parameter(1e-8, "added to the root of the second moment", ge=0)
    fused: bool = parameter(True, "torch's fused kernel where there is one; it rounds otherwise")


@OPTIMIZER.add(
    "adamw",
    formula="w <- (1 - lr wd) w - lr m_hat / (sqrt(v_hat) + eps)",
    source="Loshchilov & Hutter 2019; torch",
    options=AdamWOptions,
)
def adamw(model: nn.Module, learning_rate: float, weight_decay: float, options: AdamWOptions) -> Optimizer:
    return torch.optim.AdamW(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=options.fused and fused(model),
    )


class AdaGradOptions(OptimizerOptions):
    usual_learning_rate = 1e-2

    eps: float = parameter(1e-10, "added to the root of the sum of squares", ge=0)


@OPTIMIZER.add(
    "adagrad",
    formula="v <- v + g^2; w <- w - lr g / (sqrt(v) + eps)",
    source="Duchi, Hazan & Singer 2011; torch",
    options=AdaGradOptions,
)
def adagrad(
    model: nn.Module, learning_rate: float, weight_decay: float, options: AdaGradOptions
) -> Optimizer:
    return torch.optim.Adagrad(decay_groups(model, weight_decay), lr=learning_rate, eps=options.eps)
