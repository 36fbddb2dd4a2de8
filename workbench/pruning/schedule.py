"""Schedules: the sparsities a run passes through.

Traits: "stages": it goes from stage to stage of `train-sparse`; "inside a stage": `train-sparse` can follow
it from step to step; "at once": nothing is reached gradually. `prune` takes those that do not count stages.
"""

from __future__ import annotations

import math

from workbench.axis import Options, parameter
from workbench.pruning.axes import SPARSITY_SCHEDULE


class Events(Options):
    events: int = parameter(1, "pruning events", ge=1)


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


@SPARSITY_SCHEDULE.add("one-shot", formula="s_f", source="baseline", traits="at once")
def one_shot(final: float, stages: int, options: Options) -> list[float]:
    return [final]


@SPARSITY_SCHEDULE.add(
    "cubic",
    formula="s_f - s_f (1 - t / n)^3",
    source="Zhu and Gupta 2017, eq. 1",
    options=Events,
    traits="inside a stage",
)
def cubic_events(final: float, stages: int, options: Events) -> list[float]:
    return [cubic(0.0, final, t, options.events) for t in range(1, options.events + 1)]


@SPARSITY_SCHEDULE.add("linear", formula="s_f t / n", source="baseline", options=Events)
def linear(final: float, stages: int, options: Events) -> list[float]:
    return [final * t / options.events for t in range(1, options.events + 1)]


@SPARSITY_SCHEDULE.add(
    "from-start",
    formula="s_f in every stage",
    source="baseline",
    traits=("stages", "at once"),
    home="train-sparse.sparsity_schedule",
)
def from_start(final: float, stages: int, options: Options) -> list[float]:
    return [final] * stages


@SPARSITY_SCHEDULE.add(
    "geometric",
    formula="1 - 0.8^n, n evenly spaced",
    source="Misra et al. 2022 (APP)",
    traits="stages",
    home="train-sparse.sparsity_schedule",
    beside={"stages": 2},
)
def geometric_stages(final: float, stages: int, options: Options) -> list[float]:
    return geometric(final, stages)


@SPARSITY_SCHEDULE.add(
    "late",
    formula="0 until the last stage",
    source="Chen et al. 2021 (DSEE)",
    traits="stages",
    home="train-sparse.sparsity_schedule",
    beside={"stages": 2},
)
def late_stages(final: float, stages: int, options: Options) -> list[float]:
    return late(final, stages)


def annealed(peak: float, share: float, rise: float = 0.25, hold: float = 0.75) -> float:
    """Rises to `peak` until `rise` of the run, holds until `hold`, then is zero:
    masks move early and rest late (Huang et al. 2024, AST).

    The paper names the three parts; the places of the bends are this project's choice.
    """
    return peak * min(share / rise, 1.0) if share < hold else 0.0
