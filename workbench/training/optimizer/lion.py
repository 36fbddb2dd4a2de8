"""Lion (Chen et al. 2023): the sign of a mixture of momentum and gradient; pytorch_optimizer's."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


class LionOptions(MomentOptions):
    usual_learning_rate = 1e-4

    betas: tuple[float, float] = parameter(
        (0.9, 0.99), "share of the momentum in a step and decay of the momentum, each in [0, 1)"
    )


@OPTIMIZER.add(
    "lion",
    formula="w <- (1 - lr wd) w - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g",
    source="Chen et al. 2023; pytorch_optimizer",
    options=LionOptions,
)
def lion(model: nn.Module, learning_rate: float, weight_decay: float, options: LionOptions) -> Optimizer:
    from pytorch_optimizer import Lion

    return Lion(decay_groups(model, weight_decay), lr=learning_rate, betas=options.betas)
