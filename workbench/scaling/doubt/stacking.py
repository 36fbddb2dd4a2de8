"""Laws that fit equally well, averaged: one band that holds scatter, parameters and the choice of law.

Every law predicts the runs beyond a ladder of compute cut-offs from those below (`doubt.prediction`). The
weights w maximise the mean log density that the mixture sum_k w_k N(m_k, v_k) gives to what was seen there,
each cut-off counting the same (stacking of predictive distributions, Yao, Vehtari, Simpson and Gelman 2018,
eq. 3, with cut-offs in compute in the place of left-out points), as a mean over reweighted held-out runs, so
that laws which these cannot tell apart share the weight. v_k is the spread that law k's calibrated band
stands for: a stack of one law is that law's own band.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.scaling.doubt.prediction import PredictionIntervals, expected_spread, prediction_intervals
from workbench.scaling.doubt.uncertainty import bootstrap
from workbench.scaling.fitting import DEFAULT_STARTS, columns_of, fit
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective

Array = np.ndarray
#: A law of less weight than this is no longer plausible.
PLAUSIBLE = 0.01
#: The level at which the densities are compared.
COMPARED = 0.9
STEPS = 2000
BAGS = 64


def stacking_weights(log_density: Array, share: Array) -> Array:
    """(bags, laws) weights on the simplex that maximise, for each row of share (bags, points), the mean log
    of the mixture's density, sum_i share_i ln sum_k w_k exp(log_density_ik); log_density (points, laws).

    The problem is concave; solved by its fixed point w_k <- sum_i share_i w_k p_ik / sum_j w_j p_ij
    (expectation maximisation of a mixture's proportions), which never lowers the objective.
    """
    density = np.exp(log_density - log_density.max(1, keepdims=True))
    weights = np.full((len(share), density.shape[1]), 1.0 / density.shape[1])
    for _ in range(STEPS):
        better = weights * ((share / (weights @ density.T)) @ density)
        moved = np.abs(better - weights).max()
        weights = better
        if moved < 1e-9:
            break
    weights = np.where(weights < 1e-6, 0.0, weights)
    return weights / weights.sum(1, keepdims=True)


def shares(cutoffs: Array, rows: Array, bags: int = BAGS, seed: int = 0) -> Array:
    """(bags, points), each row of sum one: what a held-out run counts. Runs are weighted by draws from the
    exponential distribution (Bayesian bootstrap, Rubin 1981), the same at every cut-off that holds them out;
    the cut-offs count the same.
    """
    known, run = np.unique(rows, return_inverse=True)
    drawn = np.random.default_rng(seed).exponential(size=(bags, len(known)))[:, run]
    for cutoff in np.unique(cutoffs):
        there = cutoffs == cutoff
        drawn[:, there] /= drawn[:, there].sum(1, keepdims=True)
    return drawn / len(np.unique(cutoffs))


def normal_log_density(error: Array, spread: Array) -> Array:
    """(points,) log density of N(0, spread^2); spreads below rounding count as rounding, and an error that is
    no number as very unlikely.
    """
    spread = np.maximum(spread, 1e-12)
    with np.errstate(all="ignore"):
        found = -0.5 * (error / spread) ** 2 - np.log(spread) - 0.5 * np.log(2 * np.pi)
    return np.where(np.isfinite(found), found, -1e6)


def mixture_quantile(weights: Array, means: Array, spreads: Array, probability: float) -> Array:
    """(points,) quantile of sum_k w_k N(means[k], spreads[k]^2); means, spreads (laws, points).

    It lies between the smallest and the largest of the components' own quantiles, and is bisected there.
    """
    from scipy import special  # slow to import

    own = means + spreads * special.ndtri(probability)
    used = weights > 0
    low, high = own[used].min(0), own[used].max(0)
    spreads = np.maximum(spreads, 1e-300)
    for _ in range(80):
        middle = 0.5 * (low + high)
        reached = np.einsum("k,kp->p", weights, special.ndtr((middle - means) / spreads))
        low, high = (
            np.where(reached < probability, middle, low),
            np.where(reached < probability, high, middle),
        )
    return 0.5 * (low + high)


@dataclass(frozen=True)
class Stack:
    """Laws of one target on the same runs, with weights.

    members : the laws' calibrated intervals, of weight above zero first
    weights : (laws,) on the simplex
    scores : (laws,) mean log density of each law alone at the held-out runs (nan without any)
    held_out : how many held-out runs decided; 0: too few runs to hold any out, and all weigh the same
    left_out : law -> why it is not in the stack
    """

    members: tuple[PredictionIntervals, ...]
    weights: Array
    scores: Array
    held_out: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.fit.law.name for member in self.members)

    @property
    def log_space(self) -> bool:
        return self.members[0].fit.objective.space == "log"

    @property
    def plausible(self) -> tuple[int, ...]:
        """Which members have a weight that counts."""
        return tuple(int(k) for k in np.flatnonzero(self.weights >= PLAUSIBLE))

    @property
    def said(self) -> str:
        """The laws with their weights, as text."""
        weighed = zip(self.names, self.weights, strict=True)
        return ", ".join(f"{name} {100 * w:.0f} %" for name, w in weighed if w >= PLAUSIBLE)

    @property
    def table(self) -> pd.DataFrame:
        """law, weight, log_score, parameters, error (mean |relative| at held-out runs), certificate."""
        return pd.DataFrame(
            {
                "law": self.names,
                "weight": self.weights,
                "log_score": self.scores,
                "parameters": [len(m.fit.law.free) for m in self.members],
                "held_out_error": [
                    float(m.backtests.error.abs().mean()) if len(m.backtests) else np.nan
                    for m in self.members
                ],
                "certificate": [m.fit.certificate.text for m in self.members],
            }
        )

    def components(self, columns: Any, level: float = COMPARED) -> tuple[Array, Array]:
        """(laws, points) means and spreads in the objective's space."""
        means = [self.space(np.ravel(m.fit.predict(columns))) for m in self.members]
        points = len(means[0])
        spreads = [np.broadcast_to(scale_of(m, level) * m.spread(columns), points) for m in self.members]
        return np.stack(means), np.stack(spreads)

    def middle(self, columns: Any) -> Array:
        """(points,) the mean of the laws, of logarithms where these are compared, in the target's units."""
        means = np.stack([self.space(np.ravel(m.fit.predict(columns))) for m in self.members])
        return self.natural(self.weights @ means)

    def space(self, values: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.log(values) if self.log_space else values

    def natural(self, values: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(values) if self.log_space else values

    def band(self, columns: Any, level: float = 0.9) -> pd.DataFrame:
        """predicted, low, high for new runs, in the target's own units: mean (of logarithms, where these are
        compared) and quantiles of the mixture.
        """
        if not 0 < level < 1:
            raise BadInput(f"level: {level} is not accepted, give a share between 0 and 1")
        means, spreads = self.components(columns, level)
        ends = [mixture_quantile(self.weights, means, spreads, 0.5 + s * level / 2) for s in (-1, 1)]
        return pd.DataFrame(
            {
                "predicted": self.natural(self.weights @ means),
                "low": self.natural(ends[0]),
                "high": self.natural(ends[1]),
            }
        )


def scale_of(member: PredictionIntervals, level: float) -> float:
    """A normal spread whose central interval is the member's band, over the member's expected spread."""
    from scipy import stats  # slow to import

    return member.factor(level) / float(stats.norm.ppf(0.5 + level / 2))


def stacked(members: Sequence[PredictionIntervals], left_out: Mapping[str, str] | None = None) -> Stack:
    """Weigh laws whose intervals were calibrated on the same runs, by the cut-offs that all of them reach.

    BadInput when they predict different columns or compare in different spaces.
    """
    if not members:
        raise BadInput(
            "laws: none is left to stack; " + "; ".join(f"{k}: {v}" for k, v in (left_out or {}).items())
        )
    kinds = {(m.fit.law.target, m.fit.objective.space) for m in members}
    if len(kinds) > 1:
        raise BadInput(f"laws: they predict different things ({kinds}), so that no band is common to them")
    common = set.intersection(*(set(m.backtests.cutoff) for m in members))
    past = [m.backtests[m.backtests.cutoff.isin(common)] for m in members]
    cutoffs = past[0].cutoff.to_numpy()
    density = np.stack(
        [
            normal_log_density(
                p.error.to_numpy(),
                scale_of(m, COMPARED) * expected_spread(p.scatter, p.refits, p.multiple, m.drift),
            )
            for m, p in zip(members, past, strict=True)
        ],
        axis=1,
    ).reshape(len(cutoffs), len(members))
    weights = np.full(len(members), 1.0 / len(members))
    scores = np.full(len(members), np.nan)
    if len(cutoffs):
        weights = stacking_weights(density, shares(cutoffs, past[0].row.to_numpy())).mean(0)
        scores = density.mean(0)
    order = np.argsort(-weights, kind="stable")
    return Stack(
        tuple(members[k] for k in order), weights[order], scores[order], len(cutoffs), dict(left_out or {})
    )


def stack(
    laws: Sequence[Law],
    runs: Any,
    objective: Objective | None = None,
    starts: int = DEFAULT_STARTS,
    resamples: int = 200,
    seed: int = 0,
    needed: str = "",
    progress: Progress | None = None,
) -> Stack:
    """Fit each law to the runs, calibrate its intervals, and weigh the laws.

    Laws whose columns the runs lack, that have too few rows, or whose fit did not converge are left out,
    with the reason; BadInput when none remains, or when the law called `needed` is among them. A stop leaves
    the laws that are not fitted yet out.
    """
    return stacked(*fitted_members(laws, runs, objective, starts, resamples, seed, needed, progress))


def fitted_members(
    laws: Sequence[Law],
    runs: Any,
    objective: Objective | None = None,
    starts: int = DEFAULT_STARTS,
    resamples: int = 200,
    seed: int = 0,
    needed: str = "",
    progress: Progress | None = None,
) -> tuple[list[PredictionIntervals], dict[str, str]]:
    """The laws' intervals on the runs, and why the others are left out; as `stack`."""
    progress = progress or Progress()
    table = getattr(runs, "table", runs)
    members: list[PredictionIntervals] = []
    left_out = dict.fromkeys((one.name for one in laws), "stopped before it was fitted")
    for law in progress.track(list(laws), "laws"):
        left_out.pop(law.name, None)
        try:
            members.append(_member(law, table, objective, starts, resamples, seed, lambda: progress.stopped))
        except BadInput as error:
            if law.name == needed:
                raise
            left_out[law.name] = str(error)
    return members, left_out


def _member(
    law: Law,
    table: Any,
    objective: Objective | None,
    starts: int,
    resamples: int,
    seed: int,
    stop: Callable[[], bool] | None,
) -> PredictionIntervals:
    """A law's intervals; BadInput when its fit says nothing about runs to come."""
    columns, _ = columns_of(law, table)
    for name, values in columns.items():
        if len(np.unique(values)) == 1 and not law.fixed:
            raise BadInput(
                f"{name}: every run has {values[0]:g}, so law {law.name} cannot learn how the loss depends "
                "on it and there is no plan; add runs that differ or take a law without it"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as many rows as parameters: refused below
        found = fit(law, table, objective, starts, seed=seed, stop=stop)
    if not found.certificate.converged:
        raise BadInput(
            f"law {law.name}: {found.certificate.text}; there is no plan: take a smaller law or add runs"
        )
    if found.problem.rows <= found.problem.size:
        raise BadInput(
            f"runs: {found.problem.rows} for the {found.problem.size} parameters of law {law.name} say "
            "nothing about error; add runs or take a smaller law"
        )
    drawn = bootstrap(found, resamples, seed, stop=stop)
    return prediction_intervals(found, table, drawn, seed, stop)
