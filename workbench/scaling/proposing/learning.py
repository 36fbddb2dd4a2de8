"""What a run would teach about others: expected falls of variance, before any run is paid for.

Law k of weight w_k says of all points together (targets and candidates)

    f ~ N(m_k, R_k^T R_k),    a run at candidate c gives    y = f_c + N(0, n_k^2)

R_k (r, points): one row a draw of the law's parameters, divided by sqrt(draws), so that R_k^T R_k is the
covariance of the predictions over the draws (Evensen 1994's ensemble form, which needs no derivative and is
the closed form of Bayesian linear regression for a law that is linear in its parameters), and one row for
what the law itself may be wrong by beyond the largest run (`doubt.prediction`: a slope in ln compute).

The expected fall of a target's variance by a run at c is, by the law of total variance, the variance over y
of the mean that one would hold after it:

    Var_y E[f_t | y],    E[f_t | y] = sum_k w_k(y) (m_kt + K_k,tc / (K_k,cc + n_k^2) (y - m_kc))
    w_k(y) proportional to w_k N(y; m_kc, K_k,cc + n_k^2)

For one law this is K_tc^2 / (K_cc + n^2); for several it also holds what the run would say about which of
them is right. The integral over y is a trapezoidal sum in each law's own predictive distribution (for smooth
functions that die out as fast as exact; Gauss-Hermite needs twice the points where laws are unequally sure).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
#: Points of the sum over a run's outcomes under each law, and how many standard deviations they reach.
NODES, REACH = 33, 5.0
#: Outcomes of a run that is in a batch but has not been made, each followed on its own.
WORLDS = 8


@dataclass(frozen=True)
class Beliefs:
    """What the laws say of all points.

    roots : (laws, r, points), see the module
    noise : (laws,) standard deviation of a run about its law
    means : (worlds, laws, points); weights : (worlds, laws), each row on the simplex. One world, until a run
        of unknown outcome is taken as made: its outcomes are then followed apart.
    """

    roots: Array
    noise: Array
    means: Array
    weights: Array

    @classmethod
    def of(cls, roots: Array, noise: Array, means: Array, weights: Array) -> Beliefs:
        """Of one world: means (laws, points), weights (laws,)."""
        return cls(roots, noise, means[None], weights[None])

    def variance(self) -> Array:
        """(points,) variance of the law's value, parameters and choice of law, in the mean world."""
        own = np.square(self.roots).sum(1)
        middle = np.einsum("wk,wkp->wp", self.weights, self.means)
        apart = np.square(self.means - middle[:, None])
        return np.einsum("wk,wkp->wp", self.weights, own[None] + apart).mean(0)

    def scatter(self) -> float:
        """Variance of a run about the law, over the laws."""
        return float((self.weights.mean(0) * self.noise**2).sum())

    def falls(self, targets: Array, candidates: Array) -> Array:
        """(targets, candidates) expected fall of the variance of each target by a run at each candidate."""
        at = self.roots[:, :, candidates]
        cross = np.matmul(self.roots[:, :, targets].transpose(0, 2, 1), at)  # (laws, targets, candidates)
        spread = np.square(at).sum(1) + self.noise[:, None] ** 2  # of the outcome; (laws, candidates)
        with np.errstate(all="ignore"):
            gain = np.where(spread[:, None] > 0, cross / spread[:, None], 0.0)
        worlds = zip(self.means, self.weights, strict=True)
        return np.mean([_world_falls(m, w, gain, spread, targets, candidates) for m, w in worlds], axis=0)

    def after(self, candidate: int, seed: int = 0) -> Beliefs:
        """With a run at the candidate taken as made, whatever it gives: its outcomes become worlds."""
        at = self.roots[:, :, candidate]  # (laws, r)
        spread = np.square(at).sum(1) + self.noise**2
        size = np.sqrt(spread)
        with np.errstate(all="ignore"):
            gain = np.where(
                spread[:, None] > 0, np.einsum("krp,kr->kp", self.roots, at) / spread[:, None], 0.0
            )
            less = np.where(spread > 0, size / (size + self.noise), 0.0)
        roots = self.roots - less[:, None, None] * at[:, :, None] * gain[:, None, :]  # Potter 1963
        means, weights = self.means, self.weights
        if len(means) == 1 and len(self.noise) > 1:
            means, weights = np.repeat(means, WORLDS, 0), np.repeat(weights, WORLDS, 0)
        outcome = self._outcomes(means[:, :, candidate], weights, size, seed)
        moved = outcome[:, None] - means[:, :, candidate]  # (worlds, laws)
        return Beliefs(
            roots,
            self.noise,
            means + gain[None] * moved[:, :, None],
            _reweighed(weights, moved, spread),
        )

    def _outcomes(self, means: Array, weights: Array, size: Array, seed: int) -> Array:
        """(worlds,) one outcome each: a law by its weight and a place in its distribution, evenly spread."""
        from scipy import special, stats  # slow to import

        count = len(means)
        if count == 1:
            return np.einsum("wk,wk->w", weights, means)
        even = stats.qmc.Sobol(2, seed=seed).random(count)
        chosen = (np.cumsum(weights, axis=1) < even[:, :1]).sum(1).clip(0, len(size) - 1)
        rows = np.arange(count)
        return means[rows, chosen] + size[chosen] * special.ndtri(even[:, 1])


def _reweighed(weights: Array, moved: Array, spread: Array) -> Array:
    """Weights after outcomes that lie `moved` (..., laws) from each law's mean, of variance `spread`."""
    with np.errstate(all="ignore"):
        told = np.log(weights) - 0.5 * np.log(spread) - 0.5 * moved**2 / spread
    told = np.where(np.isnan(told), -np.inf, told)
    top = told.max(-1, keepdims=True)
    made = np.where(np.isfinite(top), np.exp(told - np.where(np.isfinite(top), top, 0.0)), weights)
    return made / made.sum(-1, keepdims=True)


def _world_falls(
    means: Array, weights: Array, gain: Array, spread: Array, targets: Array, candidates: Array
) -> Array:
    """`falls` in one world; means (laws, points), weights (laws,), gain (laws, targets, candidates),
    spread (laws, candidates).
    """
    used = np.flatnonzero(weights > 0)
    means, weights, gain, spread = means[used], weights[used], gain[used], spread[used]
    if len(used) == 1:
        return gain[0] ** 2 * spread[0]
    nodes = np.linspace(-REACH, REACH, NODES)
    shares = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    at, now = means[:, candidates], weights @ means[:, targets]
    held = means[:, targets][:, :, None] - now[None, :, None]  # (laws, targets, 1)
    fall = np.zeros((len(targets), len(candidates)))
    for k in range(len(used)):
        for node, share in zip(nodes, shares, strict=True):
            moved = (at[k] + node * np.sqrt(spread[k]))[None] - at  # (laws, candidates)
            told = _reweighed(weights, moved.T, spread.T).T
            after = np.einsum("kc,ktc->tc", told, held + gain * moved[:, None])
            fall += weights[k] * share * after**2
    return fall
