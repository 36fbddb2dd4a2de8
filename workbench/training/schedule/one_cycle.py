"""The one-cycle policy (Smith & Topin 2019); torch's."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class OneCycle(Options):
    pct_start: float = parameter(0.3, "share of the run in which the rate rises", gt=0, lt=1)
    anneal_strategy: Literal["cos", "linear"] = parameter("cos", "shape of rise and fall")
    cycle_momentum: bool = parameter(True, "momentum falls while the rate rises")
    base_momentum: float = parameter(0.85, "momentum at the peak", ge=0, lt=1)
    max_momentum: float = parameter(0.95, "momentum at both ends", ge=0, lt=1)
    div_factor: float = parameter(25.0, "peak over the first rate", ge=1)
    final_div_factor: float = parameter(1e4, "first rate over the last", ge=1)
    three_phase: bool = parameter(False, "fall as long as it rose, then to the last rate")


@LEARNING_RATE_SCHEDULE.add(
    "one-cycle",
    formula="up from peak / div_factor to the peak, down to peak / (div_factor final_div_factor)",
    source="Smith & Topin 2019; torch",
    options=OneCycle,
    traits="scheduler",
)
def one_cycle(optimizer: Optimizer, steps: int, warmup: float, options: OneCycle) -> LRScheduler:
    settings: dict[str, Any] = options.model_dump()
    peaks = [group["lr"] for group in optimizer.param_groups]
    if options.cycle_momentum and not {"momentum", "betas"} & set(optimizer.defaults):
        raise BadInput(
            f"schedule.cycle_momentum: {type(optimizer).__name__} has no momentum that could be cycled; "
            "set schedule.cycle_momentum to false or take another optimizer"
        )
    return OneCycleLR(optimizer, peaks, total_steps=steps + 1, **settings)
