"""The axis of learning-rate schedules, as torch's `LRScheduler`s: a profile (a function of the finished
fraction), a warm-up and a sampling rate.

An entry is a profile (p, options) -> multiple of the peak learning rate at p = t / T in [0, 1] after
the warm-up; one with the trait "scheduler" is (optimizer, steps, warm-up as a share of them, options) -> a
scheduler of its own. Chen, Wolfe & Kyrillidis (2022) call profile x sampling rate a schedule; every profile
is sampled every step unless `sampling` says otherwise. What torch has (one-cycle, plateau) is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from workbench.axis import Axis, Choice
from workbench.errors import BadInput

LEARNING_RATE_SCHEDULE = Axis(
    "learning-rate-schedule",
    "how the learning rate changes over a run",
    found_in=(
        "workbench.training.schedule.profiles",
        "workbench.training.schedule.one_cycle",
        "workbench.training.schedule.plateau",
        "workbench.training.schedule.power",
        "workbench.training.schedule.rise_and_fall",
    ),
    home="train.schedule",
)
Profile = Callable[[float], float]


class ProfileLR(LRScheduler):
    """Peak learning rate x profile(t / T) with linear warm-up over `warmup` steps,
    sampled every `sampling` steps.

    Warm-up step t (from 0) runs at (t + 1) / (warmup + 1) of the peak,
    so that the peak is first used at step `warmup`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        profile: Profile,
        total: int,
        warmup: int = 0,
        sampling: int = 1,
        last_epoch: int = -1,
    ) -> None:
        self._profile, self.total, self.warmup, self.sampling = profile, total, warmup, sampling
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "_profile"}

    def multiple(self, t: float) -> float:
        if t < self.warmup:
            return (t + 1) / (self.warmup + 1)
        span = max(self.total - self.warmup, 1)
        done = t - self.warmup
        if self.sampling > 1:
            done = done // self.sampling * self.sampling
        return self._profile(min(done / span, 1.0))

    def get_lr(self) -> list[Any]:
        return [base * self.multiple(self.last_epoch) for base in self.base_lrs]


class ExponentialRise(LRScheduler):
    """From the optimizer's learning rate to `factor` times it over `total` steps, evenly in the logarithm:
    the range test of Smith (2017).
    """

    def __init__(self, optimizer: Optimizer, total: int, factor: float, last_epoch: int = -1) -> None:
        self.total, self.factor = total, factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        return [base * self.factor ** (self.last_epoch / max(self.total - 1, 1)) for base in self.base_lrs]


def profile(schedule: str | Mapping[str, Any], **options: Any) -> Profile:
    """A profile with its options bound; `BadInput` for a schedule that is none."""
    chosen = LEARNING_RATE_SCHEDULE.chosen(schedule, "schedule", **options)
    if chosen.has("scheduler"):
        raise BadInput(f"schedule: {chosen.name!r} is no function of the finished fraction alone")
    return lambda p: float(chosen(p))


def make_schedule(
    schedule: str | Mapping[str, Any], warmup: float = 0.0, sampling: int = 1, **options: Any
) -> Callable[[Optimizer, int], LRScheduler | ReduceLROnPlateau]:
    """A factory (optimizer, steps) -> scheduler of a name, a mapping with options or a choice. `warmup` is a
    fraction of the steps; one-cycle and plateau have none of it.
    """
    if not 0 <= warmup < 1:
        raise BadInput(f"warmup: {warmup} is not accepted, it should be a fraction of the run in [0, 1)")
    chosen = LEARNING_RATE_SCHEDULE.chosen(schedule, "schedule", **options)

    def made(optimizer: Optimizer, steps: int) -> LRScheduler | ReduceLROnPlateau:
        if chosen.has("scheduler"):
            own: LRScheduler | ReduceLROnPlateau = chosen(optimizer, steps, warmup)
            return own
        return ProfileLR(optimizer, profile(chosen), steps, round(warmup * steps), sampling)

    return made


def has_curve(schedule: Choice) -> bool:
    """Its learning rates are known before the run."""
    return not schedule.has("no-curve")


def sampled(
    schedule: str | Mapping[str, Any],
    steps: int,
    warmup: float = 0.0,
    sampling: int = 1,
    learning_rate: float = 1.0,
    **options: Any,
) -> np.ndarray:
    """The learning rate of every step, (steps,) float64, read off the scheduler itself as an optimizer would
    see it.
    """
    import torch

    chosen = LEARNING_RATE_SCHEDULE.chosen(schedule, "schedule", **options)
    if not has_curve(chosen):
        raise BadInput(
            f"schedule: {chosen.name!r} depends on the losses, so it has no curve of its own; train with it"
        )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    scheduler = make_schedule(chosen, warmup=warmup, sampling=sampling)(optimizer, steps)
    values = np.empty(steps)
    for t in range(steps):
        values[t] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return values


def scaled_lr(lr: float, batch: float, reference: float, rule: str = "sqrt") -> float:
    """The learning rate at another batch size: `linear` (Goyal et al. 2017), `sqrt`
    (Hoffer et al. 2017, Krizhevsky 2014) or `none`.
    """
    powers = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
    if rule not in powers:
        raise BadInput(f"rule: {rule!r} is unknown; known: {', '.join(powers)}")
    return lr * (batch / reference) ** powers[rule]


def areas(names: Sequence[str], steps: int = 1000, **more: Any) -> dict[str, float]:
    """Mean multiple of the peak over the run, the 'area' by which schedules of equal peak differ."""
    return {name: float(sampled(name, steps, **more).mean()) for name in names}
