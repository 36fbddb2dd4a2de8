"""SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's preconditioner; pytorch_optimizer's."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from workbench.axis import parameter
from workbench.training.optimizer.optimizers import OPTIMIZER, MomentOptions, decay_groups


class SoapOptions(MomentOptions):
    usual_learning_rate = 3e-3

    betas: tuple[float, float] = parameter(
        (0.95, 0.95), "decay of the averages of gradients and of their squares, each in [0, 1)"
    )
    precondition_frequency: int = parameter(10, "steps between two eigenbases", ge=1, unit="steps")
    largest: int = parameter(2048, "a side above it keeps its own basis: its square would not fit", ge=1)


@OPTIMIZER.add(
    "soap",
    formula="Adam on Q_L^T G Q_R, Q_L and Q_R the eigenvectors of averages of G G^T and G^T G",
    source="Vyas et al. 2024; pytorch_optimizer",
    options=SoapOptions,
)
def soap(model: nn.Module, learning_rate: float, weight_decay: float, options: SoapOptions) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(
        decay_groups(model, weight_decay),
        lr=learning_rate,
        betas=options.betas,
        precondition_frequency=options.precondition_frequency,
        max_precondition_dim=options.largest,
    )
