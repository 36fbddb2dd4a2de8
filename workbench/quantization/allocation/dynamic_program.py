"""The same choice by a dynamic program over what is spent, layer after layer."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.quantization.allocation.integer_program import Allocation
from workbench.quantization.allocation.solver import WIDTH_SOLVER

#: Shares of a unit within which sizes count as whole numbers of it.
WHOLE = 1e-6


class Steps(Options):
    steps: int = parameter(
        50_000,
        "steps that all that can be spent is counted in, where sizes share no coarser unit; with fewer a "
        "budget is used less fully, never more",
        ge=100,
        le=1_000_000,
        scale="log",
    )


@WIDTH_SOLVER.add(
    "dynamic-program",
    formula="best(l, s) = min_c best(l - 1, s - size[l, c]) + cost[l, c]",
    source="Malinovskii et al. 2024, HIGGS: widths by dynamic programming",
    options=Steps,
)
def dynamic_program(cost: ArrayLike, size: ArrayLike, limit: float, options: Steps) -> Allocation:
    """The optimum where all sizes are whole numbers of one unit, of which there are at most `steps`. Else
    sizes are rounded up to steps, which do not depend on the limit: what is found stays within it, and more
    never costs more. `bound` is the cost where it is the optimum, else -inf.
    """
    costs, sizes = np.asarray(cost, dtype=float), np.asarray(size, dtype=float)
    if not (np.isfinite(costs).all() and np.isfinite(sizes).all()):
        raise BadInput("cost: nan or inf among the sensitivities or sizes; repair the measurement first")
    least = sizes.min(1)
    if least.sum() > limit:
        raise BadInput(
            f"budget: {limit:.6g} cannot be met; the smallest choice of every layer already takes "
            f"{least.sum():.6g}"
        )
    more = sizes - least[:, None]
    most = float(more.max(1).sum())
    unit, exact = unit_of(more, most, options.steps)
    units = np.rint(more / unit) if exact else np.ceil(more / unit - WHOLE)
    room = int(min(math.floor((limit - least.sum()) / unit + WHOLE), units.max(1).sum()))
    picks = table_of(costs, units.astype(np.int64), room)
    choice = np.zeros(len(costs), dtype=np.int64)
    for layer in range(len(costs) - 1, -1, -1):
        choice[layer] = picks[layer][room]
        room -= int(units[layer, choice[layer]])
    rows = np.arange(len(costs))
    total = float(costs[rows, choice].sum())
    return Allocation(choice, total, float(sizes[rows, choice].sum()), total if exact else -np.inf)


def table_of(costs: NDArray[np.float64], units: NDArray[np.int64], room: int) -> list[NDArray[np.uint8]]:
    """For each layer, the choice that is best when it and those before it spend at most 0 ... room units."""
    best = np.zeros(room + 1)
    picks = []
    for cost, size in zip(costs, units, strict=True):
        found = np.full(room + 1, np.inf)
        pick = np.zeros(room + 1, dtype=np.uint8)
        for k in np.argsort(size, kind="stable"):
            if size[k] > room:
                continue
            trial = best[: room + 1 - size[k]] + cost[k]
            better = trial < found[size[k] :]
            found[size[k] :][better] = trial[better]
            pick[size[k] :][better] = k
        best = found
        picks.append(pick)
    return picks


def unit_of(more: NDArray[np.float64], most: float, steps: int) -> tuple[float, bool]:
    """The coarsest size that all of these are whole numbers of, and True; a `steps`-th of `most` and False
    where there are more of them than that, or none.
    """
    finest = most / steps if most else 1.0
    unit = 0.0
    for value in np.unique(more[more > 0]):
        rest = float(value)
        while rest > WHOLE * finest:  # Euclid's algorithm, with the nearest remainder: sizes are rounded
            unit, rest = rest, abs(unit - rest * round(unit / rest))
        if unit < finest * (1 - WHOLE):
            return finest, False
    return (unit, True) if unit else (1.0, True)
