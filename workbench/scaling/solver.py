"""Batched minimisation: every start and every bootstrap resample is one row of one matrix, stepped together.

Two stages, both damped second-order steps with bounds (Levenberg 1944, Marquardt 1963; Moré 1978 for
the scaling):

1. :func:`descend` uses the majorising curvature of the Huber loss (iteratively reweighted least squares). It
   cannot overshoot and works far from a minimum, but ends slowly when most rows sit on the Huber slope.
2. :func:`polish` uses the exact second derivatives and ends quadratically.

A row is done when the decrease that the next step promises is negligible; what "done" proves is judged
separately by :mod:`workbench.scaling.doubt.certificate`, never by the fact that the loop ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workbench.scaling.objective import Problem, Resample, Weights

Array = np.ndarray
#: Scaled curvature below this is what summing rounded numbers leaves.
ROUNDING = 1e-13


@dataclass
class Solutions:
    """Where every start ended: theta (s, p) working coordinates, value (s,) internal objective, steps (s,)
    taken, and settled (s,), whether the next step promised next to nothing."""

    theta: Array
    value: Array
    settled: Array
    steps: Array

    def __getitem__(self, rows: Array) -> Solutions:
        return Solutions(self.theta[rows], self.value[rows], self.settled[rows], self.steps[rows])

    def replaced(self, rows: Array, others: Solutions) -> Solutions:
        """The same with `others` at `rows`; steps are added up."""
        found = Solutions(self.theta.copy(), self.value.copy(), self.settled.copy(), self.steps.copy())
        found.theta[rows], found.value[rows], found.settled[rows] = others.theta, others.value, others.settled
        found.steps[rows] += others.steps
        return found

    @property
    def best(self) -> int:
        return int(np.argmin(self.value))


def _step(
    gradient: Array, curvature: Array, metric: Array, damping: Array, theta: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """Damped step (s, p) inside the bounds and the decrease that the damped model promises.

    metric (s, p): positive diagonal that makes the step independent of the parameters' units.
    """
    p = gradient.shape[1]
    scale = 1.0 / np.sqrt(np.where(metric > 0, metric, 1.0))
    with np.errstate(invalid="ignore"):  # undefined rows are replaced below
        g = gradient * scale
        h = curvature * scale[:, :, None] * scale[:, None, :]
    pinned = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    free = ~pinned
    g = np.where(free, g, 0.0)
    h = h * free[:, :, None] * free[:, None, :]
    index = np.arange(p)
    # the diagonal is one: a hundred roundings of damping keep a flat valley from being singular to the last
    # bit
    h[:, index, index] += np.where(free, np.maximum(damping, 1e-13)[:, None], 1.0)
    bad = ~(np.isfinite(h).all((1, 2)) & np.isfinite(g).all(1))
    if bad.any():
        h[bad], g[bad] = np.eye(p), 0.0
    try:
        move = np.linalg.solve(h, -g[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # singular to the last bit in one row
        move = np.matmul(np.linalg.pinv(h, hermitian=True), -g[:, :, None])[:, :, 0]
    promised = -(g * move).sum(1) - 0.5 * (move * np.matmul(h, move[:, :, None])[:, :, 0]).sum(1)
    move = move * scale
    # a nearly flat direction must not throw the others out of the region where the model means anything
    with np.errstate(over="ignore"):
        shorten = np.minimum(1.0, ((1.0 + np.abs(theta)) / np.maximum(np.abs(move), 1e-300)).min(1))
    return move * shorten[:, None], promised * shorten


def descend(
    problem: Problem,
    theta: Array,
    weights: Weights = None,
    steps: int = 40,
    tolerance: float = 1e-7,
    bounds: tuple[Array, Array] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Solutions:
    """Reweighted Levenberg-Marquardt from every row of theta (s, p); weights (rows,) or (s, rows).

    `tolerance`: a row settles when the promised decrease is below tolerance x value. `bounds`: (low, high),
    each (s, p), instead of the law's; equal entries hold a parameter still.
    """
    low, high = _bounds(problem, len(theta), bounds)
    theta = np.clip(np.array(theta, dtype=np.float64), low, high)
    s = len(theta)
    value, gradient, curvature = problem.linearise(theta, weights)
    damping, growth = np.full(s, 1e-2), np.full(s, 2.0)
    done = ~np.isfinite(value)
    taken = np.zeros(s, dtype=np.int64)
    settled = np.zeros(s, dtype=bool)
    for _ in range(steps):
        rows = np.flatnonzero(~done)
        if not len(rows) or (stop is not None and stop()):
            break
        metric = np.einsum("spp->sp", curvature[rows])
        move, promised = _step(
            gradient[rows], curvature[rows], metric, damping[rows], theta[rows], low[rows], high[rows]
        )
        quiet = promised <= tolerance * value[rows] + 1e-300
        settled[rows[quiet & (damping[rows] < 1.0)]] = True
        done[rows[quiet]] = True
        go = ~quiet
        rows, move, promised = rows[go], move[go], promised[go]
        if not len(rows):
            break
        trial = np.clip(theta[rows] + move, low[rows], high[rows])
        new_value, new_gradient, new_curvature = problem.linearise(trial, _take(weights, rows))
        with np.errstate(all="ignore"):
            gain = (value[rows] - new_value) / promised
        good = np.isfinite(new_value) & (new_value < value[rows])
        kept = rows[good]
        theta[kept], value[kept] = trial[good], new_value[good]
        gradient[kept], curvature[kept] = new_gradient[good], new_curvature[good]
        taken[kept] += 1
        # Nielsen's rule (1999): shrink smoothly after good steps, grow ever faster after failures
        damping[kept] *= np.clip(1.0 - (2.0 * gain[good] - 1.0) ** 3, 0.1, 1.0)
        growth[kept] = 2.0
        lost = rows[~good]
        damping[lost] = np.maximum(damping[lost], 1e-9) * growth[lost]
        growth[lost] *= 2.0
        done[lost[damping[lost] > 1e12]] = True
    return Solutions(theta, value, settled, taken)


def polish(
    problem: Problem,
    theta: Array,
    weights: Weights = None,
    steps: int = 60,
    tolerance: float = 1e-13,
    bounds: tuple[Array, Array] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Solutions:
    """Newton's method with exact second derivatives from every row of theta,
    damped until the curvature is positive.
    """
    low, high = _bounds(problem, len(theta), bounds)
    theta = np.clip(np.array(theta, dtype=np.float64), low, high)
    s = len(theta)
    value, gradient, majorant = problem.linearise(theta, weights)
    hessian = problem.hessian(theta, weights)
    damping, growth = np.zeros(s), np.full(s, 2.0)
    done = ~np.isfinite(value)
    settled, taken = np.zeros(s, dtype=bool), np.zeros(s, dtype=np.int64)
    for _ in range(steps):
        rows = np.flatnonzero(~done)
        if not len(rows) or (stop is not None and stop()):
            break
        metric = np.einsum("spp->sp", majorant[rows])
        scale = 1.0 / np.sqrt(np.where(metric > 0, metric, 1.0))
        pinned = ((theta[rows] <= low[rows]) & (gradient[rows] > 0)) | (
            (theta[rows] >= high[rows]) & (gradient[rows] < 0)
        )
        bent = _downhill(hessian[rows], scale, ~pinned)
        move, promised = _step(
            gradient[rows], bent, metric, damping[rows], theta[rows], low[rows], high[rows]
        )
        quiet = promised <= tolerance * value[rows] + 1e-300
        settled[rows[quiet & (damping[rows] < 1.0)]] = True
        done[rows[quiet]] = True
        go = ~quiet
        rows, move, promised = rows[go], move[go], promised[go]
        if not len(rows):
            break
        trial = np.clip(theta[rows] + move, low[rows], high[rows])
        w = _take(weights, rows)
        new_value, new_gradient, new_majorant = problem.linearise(trial, w)
        with np.errstate(all="ignore"):
            gain = (value[rows] - new_value) / promised
        good = np.isfinite(new_value) & (new_value < value[rows])
        kept = rows[good]
        theta[kept], value[kept] = trial[good], new_value[good]
        gradient[kept], majorant[kept] = new_gradient[good], new_majorant[good]
        if len(kept):
            hessian[kept] = problem.hessian(trial[good], _take(w, good))
        taken[kept] += 1
        damping[kept] = np.where(gain[good] > 0.5, damping[kept] * 0.2, damping[kept])
        damping[kept[damping[kept] < ROUNDING]] = 0.0
        growth[kept] = 2.0
        lost = rows[~good]
        damping[lost] = np.maximum(damping[lost], 10 * ROUNDING) * growth[lost]
        growth[lost] *= 2.0
        stuck = lost[damping[lost] > 1e12]
        done[stuck] = True
        settled[stuck] = (
            True  # no downhill step in any direction of the model: at rounding error, the certificate decides
        )
    return Solutions(theta, value, settled, taken)


def _downhill(hessian: Array, scale: Array, free: Array) -> Array:
    """(s, p, p) curvature with every eigenvalue made positive (saddle-free Newton, Dauphin et al. 2014), in
    scaled coordinates and over the free parameters only; its size along a valley stays what it is, so that
    a curved one is not crept through.
    """
    with np.errstate(invalid="ignore"):
        scaled = hessian * scale[:, :, None] * scale[:, None, :]
        scaled = scaled * free[:, :, None] * free[:, None, :]
    scaled[~np.isfinite(scaled).all((1, 2))] = np.eye(scaled.shape[1])
    values, vectors = np.linalg.eigh(scaled)
    size = np.abs(values)
    size = np.maximum(size, ROUNDING * np.maximum(size.max(1, keepdims=True), 1.0))
    bent = np.matmul(vectors * size[:, None, :], vectors.transpose(0, 2, 1))
    with np.errstate(all="ignore"):  # undefined rows stay undefined, and take no step
        return bent / (scale[:, :, None] * scale[:, None, :])


def distinct(solutions: Solutions, tolerance: float = 1e-3) -> Array:
    """Indices of starts that ended in different places, best first
    (distance in working coordinates, relative to size).
    """
    order = np.argsort(solutions.value, kind="stable")
    order = order[np.isfinite(solutions.value[order])]
    scale = 1.0 + np.abs(solutions.theta[order[0]]) if len(order) else 1.0
    kept: list[int] = []
    for i in order:
        if all(np.max(np.abs(solutions.theta[i] - solutions.theta[j]) / scale) > tolerance for j in kept):
            kept.append(int(i))
            if len(kept) >= 64:
                break
    return np.array(kept, dtype=np.int64)


def _bounds(problem: Problem, starts: int, bounds: tuple[Array, Array] | None) -> tuple[Array, Array]:
    low, high = (problem.low, problem.high) if bounds is None else bounds
    return np.broadcast_to(low, (starts, problem.size)), np.broadcast_to(high, (starts, problem.size))


def _take(weights: Weights, rows: Array) -> Weights:
    if isinstance(weights, Resample):
        return weights.take(rows)
    return weights if weights is None or weights.ndim == 1 else weights[rows]
