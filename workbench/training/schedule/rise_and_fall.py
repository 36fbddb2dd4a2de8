"""A short rise to the peak and a straight line to zero, as training after a change of the model wants it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from workbench.axis import Options, parameter
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class RiseAndFall(Options):
    rise: float = parameter(0.05, "share of the run in which the rate rises", ge=0, lt=1)


class RiseAndFallLR(LRScheduler):
    """Step t (from 0) of T runs at min((t + 1) / r, (T - t) / f, 1) of the peak, r steps of rise and
    f = T - r of fall, unless `falling` says otherwise.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        rise: float,
        falling: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.total, self.rising = total, max(int(rise * total), 1)
        self.falling = max(total - self.rising, 1) if falling is None else max(falling, 1)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        done = self.last_epoch
        share = min((done + 1) / self.rising, max(self.total - done, 0) / self.falling, 1.0)
        return [base * share for base in self.base_lrs]


@LEARNING_RATE_SCHEDULE.add(
    "rise-and-fall",
    formula="min((t + 1) / r, (T - t) / (T - r), 1), r = rise T",
    source="",
    options=RiseAndFall,
    traits="scheduler",
)
def rise_and_fall(optimizer: Optimizer, steps: int, warmup: float, options: RiseAndFall) -> LRScheduler:
    return RiseAndFallLR(optimizer, steps, options.rise)
