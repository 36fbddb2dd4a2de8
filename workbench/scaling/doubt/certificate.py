"""Is this a minimum, and is it the only one? What a solver's "success" flag does not say.

Three independent looks: the slope left over, measured against the pulls that must cancel there; the
curvature, whose near-zero directions are combinations of parameters that the runs do not determine;
and how many starts agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective, Problem

Array = np.ndarray
#: Largest |sum of pulls| / sum of |pulls| over parameters that still counts as a stationary point.
SLOPE_LIMIT = 1e-5
#: Scaled curvature below this share of the largest is a direction that the data leave open.
FLAT_LIMIT = 1e-4
#: A minimum lies where one more Newton step promises less than this share of the objective,
GAIN_LIMIT = 1e-6
#: and where the smallest scaled curvature exceeds what summing rounded numbers leaves.
CURVATURE_LIMIT = 1e-12


@dataclass(frozen=True)
class Certificate:
    """slope: largest relative gradient; curvature: smallest eigenvalue of the Hessian scaled to unit diagonal
    (beyond rounding at a minimum); condition: largest over smallest; flat: combinations of parameters that
    are hardly determined, as text; starts, reached: how many starts, and the share that ended within 0.1 %
    of the best objective; at_bound: parameters that ended on a limit of their range; idle: parameters that do
    not change the prediction there, so that a zero slope proves nothing; gain: relative decrease that one
    more Newton step promises.
    """

    slope: float
    curvature: float
    condition: float
    gain: float
    flat: tuple[str, ...] = ()
    at_bound: tuple[str, ...] = ()
    starts: int = 0
    reached: float = 0.0
    other_optima: int = 0
    exact: bool = False
    idle: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """A minimum: no slope, nothing left to gain, and a curvature that rounding cannot explain."""
        return not self.idle and (
            self.exact
            or (self.slope <= SLOPE_LIMIT and self.gain < GAIN_LIMIT and self.curvature > CURVATURE_LIMIT)
        )

    @property
    def text(self) -> str:
        """One line a reader can act on."""
        if self.idle:
            return (
                f"NOT converged: {', '.join(self.idle)} without any effect on the prediction here (a "
                "plateau, or a term that vanished)"
            )
        if not self.converged:
            why = (
                f"slope {self.slope:.1e} (limit {SLOPE_LIMIT:.0e})"
                if self.slope > SLOPE_LIMIT
                else f"curvature {self.curvature:.1e} is none beyond rounding (a plateau or a saddle)"
                if self.curvature <= CURVATURE_LIMIT
                else f"a gain is left (limit {100 * GAIN_LIMIT:g} %)"
            )
            return (
                f"NOT converged: {why}; one Newton step promises to lower the objective by "
                f"{100 * self.gain:.3g} %"
            )
        parts = ["converged"]
        if self.starts > 1:
            parts.append(f"{100 * self.reached:.0f} % of {self.starts} starts agree")
        if self.other_optima:
            parts.append(f"{self.other_optima} other local optimum(s) close in objective")
        if self.at_bound:
            parts.append("at the limit of its range: " + ", ".join(self.at_bound))
        if self.flat:
            parts.append("hardly determined: " + "; ".join(self.flat))
        return ", ".join(parts)


def certify(
    problem: Problem,
    theta: Array,
    weights: Array | None = None,
    starts: int = 0,
    reached: float = 0.0,
    other_optima: int = 0,
) -> Certificate:
    """Certificate of one working-coordinate vector (p,)."""
    names = [p.name for p in problem.law.free]
    value, gradient, majorant = problem.linearise(theta[None], weights)
    if not names:
        return Certificate(0.0, np.inf, 1.0, 0.0, starts=starts, reached=reached, exact=True)
    d = problem.objective.threshold
    r = problem.residuals(theta[None])[0]
    w = np.ones(problem.rows) if weights is None else weights
    pull = np.clip(r, -d, d) * w
    jacobian = problem.jacobian(theta)
    spread = np.abs(pull) @ np.abs(jacobian)
    size = float(np.abs(problem.y).max()) or 1.0
    exact = bool(np.abs(r[w > 0]).max(initial=0.0) <= 1e-9 * size)
    g = gradient[0]
    reach = np.abs(jacobian).max(0, initial=0.0) * (1.0 + np.abs(theta))
    held = ((theta <= problem.low) & (g > 0)) | ((theta >= problem.high) & (g < 0))
    idle = ~held & (reach <= 1e-9 * size)
    relative = np.where(held | (spread == 0), 0.0, np.abs(g) / np.where(spread > 0, spread, 1.0))
    hessian = majorant[0] if exact else problem.hessian(theta[None], weights)[0]
    diagonal = np.maximum(np.diag(majorant[0]), 1e-300)
    free = np.flatnonzero(~held)
    scale = 1.0 / np.sqrt(diagonal[free])
    scaled = hessian[np.ix_(free, free)] * scale[:, None] * scale[None, :]
    flat: list[str] = []
    lowest, condition, gain = np.inf, 1.0, 0.0
    if len(free) and np.isfinite(scaled).all():
        eigenvalues, vectors = np.linalg.eigh(scaled)
        lowest = float(eigenvalues[0])
        top = float(eigenvalues[-1])
        condition = top / lowest if lowest > 0 else np.inf
        for k in np.flatnonzero(eigenvalues < FLAT_LIMIT * top):
            flat.append(_combination(vectors[:, k], [names[i] for i in free]))
        lifted = np.maximum(np.abs(eigenvalues), 1e-12 * max(top, 1e-300))
        along = vectors.T @ (g[free] * scale)
        gain = float(min(1.0, 0.5 * np.sum(along**2 / lifted) / max(value[0], 1e-300)))
    elif len(free):
        lowest, condition, gain = -np.inf, np.inf, 1.0
    return Certificate(
        float(relative.max(initial=0.0)),
        lowest,
        condition,
        gain,
        tuple(flat),
        tuple(n for n, h in zip(names, held, strict=True) if h),
        starts,
        reached,
        other_optima,
        exact,
        tuple(n for n, i in zip(names, idle, strict=True) if i),
    )


def certify_values(
    law: Law,
    columns: Mapping[str, Any],
    target: Array,
    values: Mapping[str, float],
    objective: Objective | None = None,
) -> Certificate:
    """Judge parameter values from anywhere (a paper, another program) on given runs."""
    problem = Problem(
        law, {c: np.asarray(columns[c]) for c in law.columns}, np.asarray(target), objective or Objective()
    )
    return certify(problem, problem.working(values))


def _combination(vector: Array, names: list[str]) -> str:
    """'A with alpha' style text: the parameters that move together along a direction, larger shares first."""
    order = np.argsort(-np.abs(vector))
    strong = [i for i in order if abs(vector[i]) > 0.3]
    sign = np.sign(vector[strong[0]])
    return " ".join(f"{'+' if vector[i] * sign > 0 else '-'}{names[i]}" for i in strong)
