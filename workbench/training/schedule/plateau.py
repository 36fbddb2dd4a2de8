"""A rate that falls when the validation loss stops falling; torch's."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from workbench.axis import Options, parameter
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class Plateau(Options):
    factor: float = parameter(0.1, "ratio of the rates after and before a fall", gt=0, lt=1)
    patience: int = parameter(10, "evaluations without improvement that are borne", ge=0)
    threshold: float = parameter(1e-4, "smallest improvement that counts", ge=0)
    threshold_mode: Literal["rel", "abs"] = parameter("rel", "as a share of the best loss, or as it is")
    cooldown: int = parameter(0, "evaluations after a fall that do not count", ge=0)
    min_lr: float = parameter(0.0, "smallest learning rate", ge=0)
    eps: float = parameter(1e-8, "smallest fall of the rate", ge=0)


@LEARNING_RATE_SCHEDULE.add(
    "plateau",
    formula="lr <- factor lr after `patience` evaluations without improvement",
    source="torch",
    options=Plateau,
    traits=("scheduler", "no-curve"),
)
def plateau(optimizer: Optimizer, steps: int, warmup: float, options: Plateau) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, **options.model_dump())
