"""Which layer gets which width: an exact integer program over per-layer choices, and its whole Pareto front.

minimise sum_l cost[l, c(l)] subject to sum_l size[l, c(l)] <= budget: one binary variable for each layer
and choice (Yao et al. 2021, HAWQ-V3, who ask for the best of two widths; here any number),
solved to proven optimality by HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from workbench.errors import BadInput


@dataclass(frozen=True)
class Allocation:
    """One choice for each layer. `bound` is the solver's proven lower bound on the cost;
    equal to `cost` at an optimum.
    """

    choice: NDArray[np.int64]
    cost: float
    size: float
    bound: float


def allocate(
    cost: ArrayLike, size: ArrayLike, budget: float, equal: Sequence[tuple[int, int]] = ()
) -> Allocation:
    """The cheapest choice for each layer within `budget`.

    cost, size : (layers, choices), any units;  equal : pairs of layers that must make the same choice
    `BadInput` when the budget is below the smallest possible size (the message says which one is).
    """
    costs, sizes = np.asarray(cost, dtype=float), np.asarray(size, dtype=float)
    if costs.ndim != 2 or costs.shape != sizes.shape:
        raise BadInput(
            f"cost: cost and size must have one shape (layers, choices), got {costs.shape} and {sizes.shape}"
        )
    if not (np.isfinite(costs).all() and np.isfinite(sizes).all()):
        raise BadInput("cost: nan or inf among the sensitivities or sizes; repair the measurement first")
    layers, choices = costs.shape
    variables = layers * choices
    one_each = coo_array(
        (np.ones(variables), (np.repeat(np.arange(layers), choices), np.arange(variables))),
        shape=(layers, variables),
    )
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1), -np.inf, budget)]
    for first, second in equal:
        rows = np.zeros((choices, variables))
        for k in range(choices):
            rows[k, first * choices + k], rows[k, second * choices + k] = 1, -1
        constraints.append(LinearConstraint(rows, 0, 0))
    scale = (
        np.median(np.abs(costs)) or np.abs(costs).max() or 1.0
    )  # the solver's tolerances are absolute: a gap it ignores must be small beside a layer
    found = milp(
        costs.reshape(-1) / scale,
        integrality=np.ones(variables),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BadInput(
            f"budget: {budget:.6g} cannot be met; the smallest choice of every layer already takes "
            f"{sizes.min(1).sum():.6g}"
        )
    choice = found.x.reshape(layers, choices).argmax(1)
    rows = np.arange(layers)
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return Allocation(
        choice, float(costs[rows, choice].sum()), float(sizes[rows, choice].sum()), float(bound * scale)
    )


def log_variance(
    sensitivity: ArrayLike, variance: ArrayLike, weights: ArrayLike, average: float
) -> NDArray[np.float64]:
    """Real-valued widths b_l = average + 1/2 log2(s_l v_l / G),
    with G the geometric mean of s_l v_l over the weights.

    sensitivity : (layers,) loss for a unit of squared error on one weight,
        as a Hessian block's trace over its size
    variance : (layers,) of the layer's weights;  weights : (layers,) how many there are;
        average : bits a weight over all layers They minimise sum_l n_l s_l v_l 4^-b_l, the loss when rounding
            noise is a fixed share of the variance and falls fourfold a bit, subject to sum_l n_l b_l =
            average sum_l n_l (Lagrange; for layers of one size the rule of transform coding, Huang
            and Schultheiss 1963). No width is kept from being negative. `BadInput` for what is not finite
            and positive; traces that noise made negative must be raised first.
    """
    s, v, n = (np.asarray(a, dtype=float) for a in (sensitivity, variance, weights))
    for name, found in (("sensitivity", s), ("variance", v), ("weights", n)):
        if found.ndim != 1 or found.shape != s.shape or not (np.isfinite(found).all() and (found > 0).all()):
            raise BadInput(f"{name}: one positive finite number a layer is needed, got {found.tolist()}")
    logs = np.log2(s) + np.log2(v)
    return average + 0.5 * (logs - np.average(logs, weights=n))


def front(
    cost: ArrayLike, size: ArrayLike, points: int = 40, equal: Sequence[tuple[int, int]] = ()
) -> list[Allocation]:
    """The Pareto front: the optimum at `points` budgets between the smallest and the largest size,
    without repeats.
    """
    sizes = np.asarray(size, dtype=float)
    found: list[Allocation] = []
    for budget in np.linspace(sizes.min(1).sum(), sizes.max(1).sum(), points):
        best = allocate(cost, size, budget * (1 + 1e-12), equal)
        if not found or best.cost < found[-1].cost:
            found.append(best)
    return found


def with_interactions(
    interactions: ArrayLike, size: ArrayLike, budget: float, start: Sequence[int], sweeps: int = 50
) -> Allocation:
    """Lower sum_ij I[i, c(i), j, c(j)], costs that depend on pairs of layers,
    by single changes and exchanges from `start`.

    interactions : (layers, choices, layers, choices), symmetric; the diagonal blocks hold each layer's own
        cost A local optimum (no bound is proven: `bound` is -inf); every move keeps the budget.
    """
    table, sizes = np.asarray(interactions, dtype=float), np.asarray(size, dtype=float)
    layers, choices = sizes.shape
    rows = np.arange(layers)
    choice = np.array(start, dtype=np.int64)

    def total(pick: NDArray[np.int64]) -> float:
        return float(table[rows[:, None], pick[:, None], rows[None], pick[None]].sum())

    best = total(choice)
    for _ in range(sweeps):
        improved = False
        for i in range(layers):
            for a in range(choices):
                for j in range(i, layers):
                    for b in range(choices) if j != i else (a,):
                        trial = choice.copy()
                        trial[i], trial[j] = a, b
                        if (trial == choice).all() or sizes[rows, trial].sum() > budget:
                            continue
                        if (value := total(trial)) < best - 1e-15:
                            choice, best, improved = trial, value, True
        if not improved:
            break
    return Allocation(choice, best, float(sizes[rows, choice].sum()), -np.inf)
