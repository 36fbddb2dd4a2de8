"""Pairs of an optimizer and a schedule that cannot be, found before a run on three small matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from workbench.errors import BadInput
from workbench.training.optimizer.optimizers import OPTIMIZER, make_optimizer
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE, make_schedule


def check_pair(
    optimizer: str | Mapping[str, Any],
    schedule: str | Mapping[str, Any],
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
) -> None:
    """`BadInput` when the optimizer cannot be built with its options, or the schedule not on it."""
    stepper = OPTIMIZER.chosen(optimizer, "optimizer")
    planner = LEARNING_RATE_SCHEDULE.chosen(schedule, "schedule")
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    built = make_optimizer(stepper, learning_rate, weight_decay)(model)
    try:
        made = make_schedule(planner, warmup)(built, 100)
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"schedule: {planner} does not go with optimizer {stepper}: {error}") from None
    if stepper.has("scales rates") and isinstance(made, ReduceLROnPlateau):
        raise BadInput(
            f"schedule: {planner} leaves the rate as it was, and {stepper} scales it in every step; "
            "take another schedule"
        )
