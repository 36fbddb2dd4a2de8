"""The power schedule (Shen et al. 2024), which needs no total number of steps but for its last decay."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from workbench.axis import Options, parameter
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class PowerLR(LRScheduler):
    """eta(n) = min(eta_max, batch x a x n^b) at n tokens seen, exponential final decay; the warm-up is a
    straight line to what the law gives at its end (Shen et al. 2024, eq. 5).

    eta_max is the optimizer's learning rate. batch : sequences per step. tokens : tokens of one step. It
    depends on no total except through the final decay over the last `decay` fraction,
    to `final` x the value it started from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        batch: int,
        tokens: float,
        a: float = 4.0,
        b: float = -0.51,
        warmup: int = 0,
        decay: float = 0.1,
        final: float = 0.01,
        last_epoch: int = -1,
    ) -> None:
        self.total, self.batch, self.tokens, self.a, self.b = total, batch, tokens, a, b
        self.warmup, self.decay, self.final = warmup, decay, final
        super().__init__(optimizer, last_epoch)

    def rate(self, peak: float, t: float) -> float:
        """The learning rate of step t (from 0), which ends at (t + 1) x tokens."""
        starts = self.total * (1 - self.decay)
        seen = min(max(t, self.warmup), starts) + 1  # steps
        body = min(peak, self.batch * self.a * (seen * self.tokens) ** self.b)
        if t < self.warmup:
            return body * (t + 1) / (self.warmup + 1)
        return (
            body
            if t <= starts or self.decay <= 0
            else body * self.final ** ((t - starts) / (self.total - starts))
        )

    def get_lr(self) -> list[Any]:
        return [self.rate(float(base), self.last_epoch) for base in self.base_lrs]


class Power(Options):
    batch: int = parameter(help="sequences of a step", ge=1)
    tokens: float = parameter(help="tokens of a step", gt=0)
    a: float = parameter(4.0, "amplitude of the law", gt=0)
    b: float = parameter(-0.51, "power of the tokens seen", lt=0)
    decay: float = parameter(0.1, "share of the run, at its end, that decays", ge=0, lt=1)
    final: float = parameter(0.01, "last rate over the one the decay starts from", gt=0, le=1)


@LEARNING_RATE_SCHEDULE.add(
    "power",
    formula="min(peak, batch a n^b) at n tokens seen, then final^q over the last `decay`",
    source="Shen et al. 2024, eq. 5",
    options=Power,
    traits="scheduler",
    beside={"schedule.batch": 32, "schedule.tokens": 128},
)
def power(optimizer: Optimizer, steps: int, warmup: float, options: Power) -> LRScheduler:
    return PowerLR(optimizer, steps, warmup=round(warmup * steps), **options.model_dump())
