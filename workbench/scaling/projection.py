"""Variable projection: parameters that enter linearly are solved for, not searched (Golub and Pereyra, 1973).

For fixed exponents a Chinchilla law is linear in E, A and B; the best non-negative ones come from a tiny
least-squares problem per start. So the search runs over the exponents alone and a poor guess of A or B cannot
ruin a start.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from workbench.scaling.formulas.laws import CompiledLaw, Law
from workbench.scaling.formulas.program import Program
from workbench.scaling.objective import Problem

Array = np.ndarray


def non_negative_least_squares(basis: Array, target: Array, signed: Array) -> tuple[Array, Array]:
    """min ||basis c - target||^2 with c_k >= 0 unless signed[k]; exact, by trying every active set.

    basis (s, rows, k), target (s, rows) or (rows,), k <= 6.
    Returns c (s, k) and the residual sum of squares (s,).
    """
    s, _, k = basis.shape
    target = np.broadcast_to(target, basis.shape[:2])
    norm = np.sqrt((basis**2).sum(1))
    unit = basis / np.where(norm > 0, norm, 1.0)[:, None, :]
    gram = np.matmul(unit.transpose(0, 2, 1), unit)
    moment = np.matmul(unit.transpose(0, 2, 1), target[:, :, None])[:, :, 0]
    total = (target**2).sum(1)
    best, cost = np.zeros((s, k)), np.full(s, np.inf)
    always = [i for i in range(k) if signed[i]]
    optional = [i for i in range(k) if not signed[i]]
    for size in range(len(optional), -1, -1):
        for chosen in combinations(optional, size):
            index = sorted([*always, *chosen])
            if not index:
                improved = total < cost
                best[improved], cost[improved] = 0.0, total[improved]
                continue
            block = gram[:, index][:, :, index] + 1e-14 * np.eye(len(index))
            c = np.linalg.solve(block, moment[:, index][:, :, None])[:, :, 0]
            allowed = np.all((c >= 0) | signed[index], axis=1)
            rss = total - (c * moment[:, index]).sum(1)
            improved = allowed & (rss < cost)
            cost[improved] = rss[improved]
            best[improved] = 0.0
            best[np.ix_(np.flatnonzero(improved), np.array(index))] = c[improved]
    return best / np.where(norm > 0, norm, 1.0), cost


class Projection:
    """Solves a problem's linear parameters for given values of the others."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        law = problem.law
        names = law.compile("linear").linear_names()
        self.linear = names[:6]
        self.linear_index = [i for i, p in enumerate(law.free) if p.name in self.linear]
        if not self.linear:
            return
        plain: CompiledLaw = law.compile("linear")
        outputs = [
            plain.value,
            *(plain.graph.derivative(plain.value, law.free[i].name) for i in self.linear_index),
        ]
        self.program = Program(plain.graph, outputs, plain.names).bind(problem.columns)
        self.signed = np.array([law.free[i].low < 0 for i in self.linear_index])

    def complete(self, theta: Array) -> Array:
        """theta (s, p) working coordinates with the linear parameters replaced by their best values.

        In a log objective rows are weighted by 1 / observation,
        which is the same to first order in the residual.
        """
        if not self.linear:
            return theta
        problem = self.problem
        law = problem.law
        theta = theta.copy()
        # at working value 0 (or 1 for logs) slopes are d f / d c times dc / d working:
        # evaluate there, then undo
        for i in self.linear_index:
            theta[:, i] = 0.0
        scale = 1.0 / np.abs(problem.target) if problem.objective.space == "log" else np.ones(problem.rows)
        for block in problem.blocks(len(theta) * (1 + len(self.linear))):
            rows = slice(block.start, min(block.stop, len(theta)))
            if rows.start >= len(theta):
                break
            out = self.program(theta[rows])
            n = rows.stop - rows.start
            shape = (n, problem.rows)
            slopes = np.stack([np.broadcast_to(o, shape) for o in out[1:]], axis=2)
            at = np.array([1.0 if law.free[i].scale == "log" else 0.0 for i in self.linear_index])
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is left out below
                offset = np.broadcast_to(out[0], shape) - slopes @ at
            basis, target = slopes * scale[None, :, None], (problem.target - offset) * scale
            fine = np.isfinite(basis).all((1, 2)) & np.isfinite(target).all(1)
            basis[~fine], target = 0.0, np.where(fine[:, None], target, 0.0)
            c, _ = non_negative_least_squares(basis, target, self.signed)
            for k, i in enumerate(self.linear_index):
                p = law.free[i]
                if (
                    p.scale == "log"
                ):  # a term that wants to vanish starts small enough to be harmless, large enough to return
                    largest = np.abs(slopes[:, :, k]).max(1)
                    tiny = 1e-4 * np.median(np.abs(problem.target)) / np.where(largest > 0, largest, 1.0)
                    theta[rows, i] = np.log(np.maximum(c[:, k], tiny))
                else:
                    theta[rows, i] = c[:, k]
        return np.clip(theta, problem.low, problem.high)


def sample_starts(law: Law, count: int, seed: int) -> Array:
    """Working coordinates (count, p) spread evenly over the declared start intervals
    (scrambled Sobol points).
    """
    low = np.array([p.to_working(p.start[0]) for p in law.free])
    high = np.array([p.to_working(p.start[1]) for p in law.free])
    if not len(low):
        return np.zeros((1, 0))
    from scipy.stats import qmc  # slow to import

    points = qmc.Sobol(len(low), seed=seed).random_base2(int(np.ceil(np.log2(max(count, 2)))))[:count]
    return low + points * (high - low)
