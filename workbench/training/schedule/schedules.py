"""Learning-rate schedules as `LRScheduler`s: a profile (a function of the finished fraction),
a warm-up and a sampling rate.

A profile maps p = t / T in [0, 1] (after warm-up) to a multiple of the peak learning rate. Chen, Wolfe &
Kyrillidis (2022) call profile x sampling rate a schedule; every profile here is sampled every step unless
`sampling` says otherwise. What torch has (one-cycle, plateau) is torch's.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from workbench.errors import BadInput

Profile = Callable[[float], float]


def constant(p: float) -> float:
    """1."""
    return 1.0


def linear(p: float, final: float = 0.0) -> float:
    """1 - p, to `final`."""
    return final + (1 - final) * (1 - p)


def cosine(p: float, final: float = 0.0) -> float:
    """(1 + cos pi p) / 2, to `final` (Loshchilov & Hutter 2017, eq. 5 without restarts)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * p))


def rex(p: float, final: float = 0.0) -> float:
    """(1 - p) / (1/2 + (1 - p) / 2): between linear and delayed linear (Chen, Wolfe & Kyrillidis 2022)."""
    return final + (1 - final) * (1 - p) / (0.5 + 0.5 * (1 - p))


def uba(p: float, phi: float = 2.0, final: float = 0.0) -> float:
    """2 (1 + cos pi p) / (2 phi + (2 - phi)(1 + cos pi p)), so 1 / uba - 1 = phi / 2 (1 / cosine - 1):
    cosine at phi = 2, held high longer below.

    Tang et al. (2025), whose own equation could not be read: the form is a public implementation's
    (two others use (1 - p)^phi, which `polynomial` gives). Tested here:
    phi = 2 equals cosine, the relation above, monotone in p and in phi, both ends.
    """
    raised = 1 + math.cos(math.pi * p)
    return final + (1 - final) * (2 * raised / (2 * phi + (2 - phi) * raised) if p < 1 else 0.0)


def delayed_linear(p: float, delay: float = 0.5, final: float = 0.0) -> float:
    """1 until `delay`, then linear."""
    return 1.0 if p < delay else linear((p - delay) / (1 - delay), final)


def polynomial(p: float, power: float = 2.0, final: float = 0.0) -> float:
    """(1 - p)^power."""
    return final + (1 - final) * (1 - p) ** power


def step(p: float, factor: float = 0.1, milestones: tuple[float, ...] = (0.5, 0.75)) -> float:
    """Times `factor` at each milestone (fractions of the run)."""
    return factor ** sum(p >= m for m in milestones)


def exponential(p: float, final: float = 0.01) -> float:
    """final^p."""
    return final**p


def inverse_sqrt(p: float, start: float = 0.05) -> float:
    """sqrt(start / max(p, start)): the decay of Vaswani et al. (2017), flat until `start`."""
    return math.sqrt(start / max(p, start))


def wsd(p: float, decay: float = 0.2, shape: str = "linear", final: float = 0.0) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1 until the last `decay`, then `shape`:
    linear, sqrt (1 - sqrt q), cosine or exponential.
    """
    if p <= 1 - decay:
        return 1.0
    q = (p - (1 - decay)) / decay
    if shape == "exponential":
        return max(final, 1e-2) ** q
    return {
        "linear": linear(q, final),
        "sqrt": final + (1 - final) * (1 - math.sqrt(q)),
        "cosine": cosine(q, final),
    }[shape]


def infinite(
    p: float,
    cooldown: float = 0.3,
    constant: float = 0.3,
    anneal: float = 0.15,
    final: float = 0.01,
    shape: str = "cosine",
) -> float:
    """Cool down to `constant`, hold it while data keep coming, anneal exponentially in the last `anneal`
    (Singh et al. 2025).

    Values are fractions of the peak: at p = cooldown it is `constant`, from 1 - anneal on constant
    (final / constant)^q, at 1 `final`. `shape` of the cool-down: cosine or inverse-sqrt. With anneal = 0 it
    never ends: continue from `constant` without a re-warm.
    """
    if p < cooldown:
        q = p / cooldown
        if shape == "inverse-sqrt":  # 1 / sqrt(1 + (1/constant^2 - 1) q) is 1 at 0 and `constant` at 1
            return 1 / math.sqrt(1 + (constant**-2 - 1) * q)
        return cosine(q, constant)
    if anneal <= 0 or p <= 1 - anneal:
        return constant
    return constant * (final / constant) ** ((p - (1 - anneal)) / anneal)


PROFILES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "rex": rex,
    "uba": uba,
    "delayed-linear": delayed_linear,
    "polynomial": polynomial,
    "step": step,
    "exponential": exponential,
    "inverse-sqrt": inverse_sqrt,
    "wsd": wsd,
    "infinite": infinite,
}
SCHEDULES = (*PROFILES, "one-cycle", "plateau", "power")


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


class PowerLR(LRScheduler):
    """eta(n) = min(eta_max, batch x a x n^b) at n tokens seen, linear warm-up, exponential final decay
    (Shen et al. 2024, eq. 5).

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
        body = min(peak, self.batch * self.a * ((min(t, starts) + 1) * self.tokens) ** self.b)
        if t < self.warmup:
            return body * (t + 1) / (self.warmup + 1)
        return (
            body
            if t <= starts or self.decay <= 0
            else body * self.final ** ((t - starts) / (self.total - starts))
        )

    def get_lr(self) -> list[Any]:
        return [self.rate(float(base), self.last_epoch) for base in self.base_lrs]


def profile(name: str, **options: Any) -> Profile:
    """A profile by name with its options bound; `BadInput` names what it takes."""
    import difflib

    if name not in PROFILES:
        close = difflib.get_close_matches(name, SCHEDULES, 1)
        raise BadInput(
            f"schedule: {name!r} is unknown; {f'did you mean {close[0]}? ' if close else ''}known: "
            f"{', '.join(SCHEDULES)}"
        )
    check_options("schedule", name, PROFILES[name], options, skip=1)
    return functools.partial(PROFILES[name], **options)


def check_options(
    field: str, name: str, function: Callable[..., Any], options: dict[str, Any], skip: int
) -> None:
    accepted = list(inspect.signature(function).parameters)[skip:]
    unknown = set(options) - set(accepted)
    if unknown:
        raise BadInput(
            f"{field}: {name!r} takes no option {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(accepted) or 'none'}"
        )


def make_schedule(
    name: str, warmup: float = 0.0, sampling: int = 1, **options: Any
) -> Callable[[Optimizer, int], LRScheduler | ReduceLROnPlateau]:
    """A factory (optimizer, steps) -> scheduler. `warmup` is a fraction of the steps;
    one-cycle and plateau have none of it.
    """
    if not 0 <= warmup < 1:
        raise BadInput(f"warmup: {warmup} is not accepted, it should be a fraction of the run in [0, 1)")
    if name == "one-cycle":
        check_options("schedule", name, OneCycleLR.__init__, options, skip=1)
        return lambda optimizer, steps: OneCycleLR(
            optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=steps + 1, **options
        )
    if name == "plateau":
        check_options("schedule", name, ReduceLROnPlateau.__init__, options, skip=1)
        return lambda optimizer, steps: ReduceLROnPlateau(optimizer, **options)
    if name == "power":
        check_options("schedule", name, PowerLR.__init__, options, skip=3)
        if not {"batch", "tokens"} <= set(options):
            raise BadInput(
                "schedule: 'power' needs the options batch (sequences a step) and tokens (tokens a step)"
            )
        return lambda optimizer, steps: PowerLR(optimizer, steps, warmup=round(warmup * steps), **options)
    chosen = profile(name, **options)
    return lambda optimizer, steps: ProfileLR(optimizer, chosen, steps, round(warmup * steps), sampling)


def sampled(
    name: str, steps: int, warmup: float = 0.0, sampling: int = 1, lr: float = 1.0, **options: Any
) -> np.ndarray:
    """The learning rate of every step, (steps,) float64, read off the scheduler itself as an optimizer would
    see it.
    """
    import torch

    if name == "plateau":
        raise BadInput(
            "schedule: 'plateau' depends on the losses, so it has no curve of its own; train with it"
        )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make_schedule(name, warmup=warmup, sampling=sampling, **options)(optimizer, steps)
    values = np.empty(steps)
    for t in range(steps):
        values[t] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()  # type: ignore[call-arg]
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
