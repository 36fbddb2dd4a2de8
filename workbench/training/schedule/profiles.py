"""Profiles: learning rate over its peak as a function of the finished fraction p = t / T in [0, 1]."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from pydantic import field_validator

from workbench.axis import Options, parameter
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class Ended(Options):
    final: float = parameter(0.0, "last rate over the peak", ge=0, le=1)


def between(final: float, share: float) -> float:
    """`final` at share 0, 1 at share 1."""
    return final + (1 - final) * share


def half_cosine(p: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * p))


@LEARNING_RATE_SCHEDULE.add("constant", formula="1", source="")
def constant(p: float, options: Options) -> float:
    """1."""
    return 1.0


@LEARNING_RATE_SCHEDULE.add("linear", formula="1 - p", source="", options=Ended)
def linear(p: float, options: Ended) -> float:
    """1 - p, to `final`."""
    return between(options.final, 1 - p)


@LEARNING_RATE_SCHEDULE.add(
    "cosine", formula="(1 + cos pi p) / 2", source="Loshchilov & Hutter 2017, eq. 5", options=Ended
)
def cosine(p: float, options: Ended) -> float:
    """(1 + cos pi p) / 2, to `final` (Loshchilov & Hutter 2017, eq. 5 without restarts)."""
    return options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * p))


@LEARNING_RATE_SCHEDULE.add(
    "rex", formula="(1 - p) / (1/2 + (1 - p) / 2)", source="Chen, Wolfe & Kyrillidis 2022", options=Ended
)
def rex(p: float, options: Ended) -> float:
    """(1 - p) / (1/2 + (1 - p) / 2): between linear and delayed linear (Chen, Wolfe & Kyrillidis 2022)."""
    return options.final + (1 - options.final) * (1 - p) / (0.5 + 0.5 * (1 - p))


class Uba(Ended):
    phi: float = parameter(
        0.5,
        "2 is cosine, smaller holds the rate high longer, larger lets it fall sooner",
        gt=0,
        le=50,
        scale="log",
    )


@LEARNING_RATE_SCHEDULE.add(
    "uba",
    formula="2 (1 + cos pi p) / (2 phi + (2 - phi)(1 + cos pi p))",
    source="Tang et al. 2025, the form of a public implementation",
    options=Uba,
)
def uba(p: float, options: Uba) -> float:
    """2 (1 + cos pi p) / (2 phi + (2 - phi)(1 + cos pi p)), so 1 / uba - 1 = phi / 2 (1 / cosine - 1):
    cosine at phi = 2, held high longer below.

    Tang et al. (2025), whose own equation could not be read: the form is a public implementation's
    (two others use (1 - p)^phi, which `polynomial` gives). Tested here: phi = 2 equals cosine,
    the relation above, monotone in p and in phi, both ends. The authors tie phi to how badly conditioned
    the problem is and no one value is theirs; 0.5 stands here because at 2 there would be nothing of
    the method left. Tune it with the budget.
    """
    raised = 1 + math.cos(math.pi * p)
    phi = options.phi
    return between(options.final, 2 * raised / (2 * phi + (2 - phi) * raised) if p < 1 else 0.0)


class Delayed(Ended):
    delay: float = parameter(0.5, "share of the run at the peak", ge=0, lt=1)


@LEARNING_RATE_SCHEDULE.add(
    "delayed-linear",
    formula="1 until delay, then linear",
    source="Li et al. 2020, Chen et al. 2022",
    options=Delayed,
)
def delayed_linear(p: float, options: Delayed) -> float:
    """1 until `delay`, then linear."""
    if p < options.delay:
        return 1.0
    return between(options.final, 1 - (p - options.delay) / (1 - options.delay))


class Polynomial(Ended):
    power: float = parameter(2.0, "power", gt=0, le=50)


@LEARNING_RATE_SCHEDULE.add("polynomial", formula="(1 - p)^power", source="", options=Polynomial)
def polynomial(p: float, options: Polynomial) -> float:
    """(1 - p)^power."""
    return between(options.final, (1 - p) ** options.power)


class Steps(Options):
    factor: float = parameter(0.1, "ratio of the rates after and before a milestone", gt=0, lt=1)
    milestones: tuple[float, ...] = parameter((0.5, 0.75), "shares of the run at which the rate falls")

    @field_validator("milestones")
    @classmethod
    def rising(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        ends = (0.0, *shares, 1.0)
        if not all(one < other for one, other in itertools.pairwise(ends)):
            raise ValueError(f"{shares} are no rising shares of the run between 0 and 1")
        return shares


@LEARNING_RATE_SCHEDULE.add("step", formula="factor^(milestones passed)", source="", options=Steps)
def step(p: float, options: Steps) -> float:
    """Times `factor` at each milestone (fractions of the run)."""
    return float(options.factor ** sum(p >= m for m in options.milestones))


class Exponential(Options):
    final: float = parameter(0.01, "last rate over the peak", gt=0, le=1)


@LEARNING_RATE_SCHEDULE.add("exponential", formula="final^p", source="", options=Exponential)
def exponential(p: float, options: Exponential) -> float:
    """final^p."""
    return float(options.final**p)


class InverseSqrt(Options):
    start: float = parameter(0.05, "share of the run before the fall", gt=0, le=1)


@LEARNING_RATE_SCHEDULE.add(
    "inverse-sqrt",
    formula="sqrt(start / max(p, start))",
    source="Vaswani et al. 2017",
    options=InverseSqrt,
)
def inverse_sqrt(p: float, options: InverseSqrt) -> float:
    """sqrt(start / max(p, start)): the decay of Vaswani et al. (2017), flat until `start`."""
    return math.sqrt(options.start / max(p, options.start))


class Wsd(Ended):
    decay: float = parameter(0.2, "share of the run, at its end, that decays", gt=0, le=1)
    shape: Literal["linear", "sqrt", "cosine", "exponential"] = parameter("linear", "shape of the decay")


@LEARNING_RATE_SCHEDULE.add(
    "wsd", formula="1 until the last `decay`, then shape(q)", source="Hu et al. 2024", options=Wsd
)
def wsd(p: float, options: Wsd) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1 until the last `decay`, then `shape`:
    linear, sqrt (1 - sqrt q), cosine or exponential.
    """
    if p <= 1 - options.decay:
        return 1.0
    q = (p - (1 - options.decay)) / options.decay
    if options.shape == "exponential":
        return float(max(options.final, 1e-2) ** q)
    shares = {"linear": 1 - q, "sqrt": 1 - math.sqrt(q), "cosine": half_cosine(q)}
    return between(options.final, shares[options.shape])


class Infinite(Options):
    cooldown: float = parameter(0.3, "share of the run of the cool-down", gt=0, lt=1)
    constant: float = parameter(0.3, "rate that is held, over the peak", gt=0, le=1)
    anneal: float = parameter(0.15, "share of the run, at its end, that anneals; 0 never ends", ge=0, lt=1)
    final: float = parameter(0.01, "last rate over the peak", gt=0, le=1)
    shape: Literal["cosine", "inverse-sqrt"] = parameter("cosine", "shape of the cool-down")


@LEARNING_RATE_SCHEDULE.add(
    "infinite",
    formula="shape(p) to `constant`, held, then constant (final / constant)^q",
    source="Singh et al. 2025",
    options=Infinite,
)
def infinite(p: float, options: Infinite) -> float:
    """Cool down to `constant`, hold it while data keep coming, anneal exponentially in the last `anneal`
    (Singh et al. 2025).

    Values are fractions of the peak: at p = cooldown it is `constant`, from 1 - anneal on constant
    (final / constant)^q, at 1 `final`. `shape` of the cool-down: cosine or inverse-sqrt. With anneal = 0 it
    never ends: continue from `constant` without a re-warm.
    """
    held, anneal = options.constant, options.anneal
    if p < options.cooldown:
        q = p / options.cooldown
        if options.shape == "inverse-sqrt":  # 1 / sqrt(1 + (1/held^2 - 1) q) is 1 at 0 and `held` at 1
            return 1 / math.sqrt(1 + (held**-2 - 1) * q)
        return held + (1 - held) * 0.5 * (1 + math.cos(math.pi * q))
    if anneal <= 0 or p <= 1 - anneal:
        return held
    return float(held * (options.final / held) ** ((p - (1 - anneal)) / anneal))
