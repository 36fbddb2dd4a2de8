"""Adafactor (Shazeer & Stern 2018): the second moment as a product of row and column means; torch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, decay_groups


class AdafactorOptions(OptimizerOptions):
    usual_learning_rate = 1e-2

    beta2_decay: float = parameter(-0.8, "power of the step at which 1 - beta2 falls", lt=0)
    d: float = parameter(1.0, "largest root mean square of an update", ge=1)


@OPTIMIZER.add(
    "adafactor",
    formula="w <- w - lr_t g / sqrt(r c^T / mean r), updates of root mean square above d shortened",
    source="Shazeer & Stern 2018; torch",
    options=AdafactorOptions,
)
def adafactor(
    model: nn.Module, learning_rate: float, weight_decay: float, options: AdafactorOptions
) -> Optimizer:
    return torch.optim.Adafactor(
        decay_groups(model, weight_decay), lr=learning_rate, beta2_decay=options.beta2_decay, d=options.d
    )
