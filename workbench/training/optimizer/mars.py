"""MARS (Yuan et al. 2024): Adam on gradients corrected by their own change; pytorch_optimizer's."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


class MarsOptions(MomentOptions):
    usual_learning_rate = 3e-3

    betas: tuple[float, float] = parameter(
        (0.95, 0.99), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )
    gamma: float = parameter(0.025, "strength of the correction", ge=0)


@OPTIMIZER.add(
    "mars",
    formula="AdamW on c = g + gamma b1 / (1 - b1) (g - g_before), at most of norm 1",
    source="Yuan et al. 2024; pytorch_optimizer",
    options=MarsOptions,
)
def mars(model: nn.Module, learning_rate: float, weight_decay: float, options: MarsOptions) -> Optimizer:
    from pytorch_optimizer import MARS

    return MARS(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        gamma=options.gamma,
        lr_1d=learning_rate,
        weight_decay_1d=0.0,
    )
