"""Gradient descent with momentum (Polyak 1964); torch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, decay_groups, fused


class SgdOptions(OptimizerOptions):
    usual_learning_rate = 1e-1

    momentum: float = parameter(0.9, "decay of the running sum of gradients", ge=0, lt=1)
    nesterov: bool = parameter(False, "look ahead along the momentum (Nesterov 1983)")


@OPTIMIZER.add(
    "sgd",
    formula="m <- mu m + g; w <- w - lr m",
    source="Robbins & Monro 1951, Polyak 1964; torch",
    options=SgdOptions,
)
def sgd(model: nn.Module, learning_rate: float, weight_decay: float, options: SgdOptions) -> Optimizer:
    if options.nesterov and not options.momentum:
        raise BadInput("optimizer.nesterov: it looks ahead along a momentum and there is none; set momentum")
    return torch.optim.SGD(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=fused(model),
    )
