"""Schedules: the sparsities a run passes through."""

from __future__ import annotations

import math

SCHEDULES = ("one-shot", "cubic", "linear")


def cubic(start: float, final: float, step: int, steps: int) -> float:
    """s_t = s_f + (s_i - s_f) (1 - t / n)^3 (Zhu and Gupta 2017, eq. 1), t = step, n = steps."""
    return final + (start - final) * (1 - step / steps) ** 3


def geometric(final: float, steps: int, factor: float = 0.8) -> list[float]:
    """Densities factor^n with n spaced evenly from 1 to the target over the steps (Misra et al. 2022, APP);
    the last one leaves 1 - final.

    A single step goes to `final` at once; when `final` is denser than one factor, so do all of them.
    """
    last = math.log(1 - final) / math.log(factor)
    first = min(1.0, last)
    exponents = [first + (last - first) * k / (steps - 1) for k in range(steps)] if steps > 1 else [last]
    return [1 - factor**n for n in exponents[:-1]] + [final]


def late(final: float, steps: int) -> list[float]:
    """Dense until the last step."""
    return [0.0] * (steps - 1) + [final]


def sparsities(schedule: str, final: float, steps: int, start: float = 0.0) -> list[float]:
    """The sparsity after each of the pruning events; the last one is `final`."""
    if schedule == "one-shot":
        return [final]
    if schedule == "geometric":
        return geometric(final, steps)
    if schedule == "late":
        return late(final, steps)
    if schedule == "linear":
        return [start + (final - start) * t / steps for t in range(1, steps + 1)]
    return [cubic(start, final, t, steps) for t in range(1, steps + 1)]


def annealed(peak: float, share: float, rise: float = 0.25, hold: float = 0.75) -> float:
    """Rises to `peak` until `rise` of the run, holds until `hold`, then is zero:
    masks move early and rest late (Huang et al. 2024, AST).

    The paper names the three parts; the places of the bends are this project's choice.
    """
    return peak * min(share / rise, 1.0) if share < hold else 0.0
