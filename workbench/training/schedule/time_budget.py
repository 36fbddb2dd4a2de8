"""Schedules over a budget of time instead of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from workbench.training.schedule.schedules import Profile, ProfileLR


class TimeBudgetLR(ProfileLR):
    """The same profile over a budget of seconds instead of steps (Izsak, Berchansky & Levy 2021):
    zero when the time is up.

    `clock` returns seconds; `total` and `warmup` are seconds. `spent` tells a training callback when to stop.
    Kaddour et al.'s (2023) reference-system time is a clock that adds each step's time on the reference
    machine.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        profile: Profile,
        total: float,
        warmup: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self.began = clock()
        super().__init__(optimizer, profile, total, warmup)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in super().state_dict().items() if k != "_clock"}
        return kept | {"elapsed": self.elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        state["began"] = self._clock() - state.pop("elapsed")
        super().load_state_dict(state)

    @property
    def elapsed(self) -> float:
        return self._clock() - self.began

    @property
    def spent(self) -> bool:
        return self.elapsed >= self.total

    def multiple(self, t: float) -> float:
        now = self.elapsed
        if now < self.warmup:
            return max(now / self.warmup, 1e-3)
        return self._profile(min((now - self.warmup) / max(self.total - self.warmup, 1e-9), 1.0))
