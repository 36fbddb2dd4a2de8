"""Schedules: the sparsities a run passes through."""

from __future__ import annotations

SCHEDULES = ("one-shot", "cubic", "linear")


def cubic(start: float, final: float, step: int, steps: int) -> float:
    """s_t = s_f + (s_i - s_f) (1 - t / n)^3 (Zhu and Gupta 2017, eq. 1), t = step, n = steps."""
    return final + (start - final) * (1 - step / steps) ** 3


def sparsities(schedule: str, final: float, steps: int, start: float = 0.0) -> list[float]:
    """The sparsity after each of the pruning events; the last one is `final`."""
    if schedule == "one-shot":
        return [final]
    if schedule == "linear":
        return [start + (final - start) * t / steps for t in range(1, steps + 1)]
    return [cubic(start, final, t, steps) for t in range(1, steps + 1)]
