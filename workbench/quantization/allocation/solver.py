"""How widths are chosen once costs and sizes are known."""

from __future__ import annotations

from numpy.typing import ArrayLike

from workbench.axis import Axis, Options
from workbench.quantization.allocation.integer_program import Allocation, allocate

#: `entry(cost, size, limit, options)` gives an `Allocation`: the least cost within the limit.
WIDTH_SOLVER = Axis(
    "width-solver",
    "how the widths are chosen once costs and sizes are known",
    found_in="workbench.quantization.allocation",
)


@WIDTH_SOLVER.add(
    "integer-program",
    formula="min sum_l cost[l, c(l)] with sum_l size[l, c(l)] <= budget, by branch and bound",
    source="Yao et al. 2021, HAWQ-V3, eq. 7",
)
def integer_program(cost: ArrayLike, size: ArrayLike, limit: float, options: Options) -> Allocation:
    return allocate(cost, size, limit)
