"""How two classifiers differ on the same items, from the probabilities of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workbench.measures.intervals import block_bootstrap, mcnemar, wilson

BINS = 15  # equal widths, of the calibration error


@dataclass(frozen=True)
class AnswerPairs:
    """Log-probabilities (items, classes) of both models, the true class and the example of each item."""

    dense: NDArray[np.float64]
    changed: NDArray[np.float64]
    target: NDArray[np.int64]
    example: NDArray[np.int64]

    @property
    def divergence(self) -> NDArray[np.float64]:
        """KL(dense || changed) of each item in nats."""
        return np.asarray((np.exp(self.dense) * (self.dense - self.changed)).sum(-1))


def calibration_error(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> float:
    """Expected calibration error of the first choice: the mean over items of |accuracy - confidence| of the
    item's bin, 15 bins of equal width (Guo et al. 2017, eq. 3).
    """
    confidence, hit = np.exp(log_p.max(-1)), log_p.argmax(-1) == target
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, hit.astype(float) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(target))


def brier(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> float:
    """Mean squared distance of the probabilities to the truth, summed over classes (Brier 1950)."""
    miss = np.exp(log_p)
    miss[np.arange(len(target)), target] -= 1
    return float(np.square(miss).sum(-1).mean())


def worst_class(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> tuple[int, float]:
    """The class whose items are most often missed, and the share of them that is hit."""
    hit = log_p.argmax(-1) == target
    shares = {int(c): float(hit[target == c].mean()) for c in np.unique(target)}
    worst = min(shares, key=lambda c: shares[c])
    return worst, shares[worst]


def classification_measures(pairs: AnswerPairs, seed: int = 0) -> dict[str, float]:
    divergence = pairs.divergence
    low, high = block_bootstrap(divergence, pairs.example, seed)
    before, after = (log_p.argmax(-1) for log_p in (pairs.dense, pairs.changed))
    right_before, right_after = before == pairs.target, after == pairs.target
    lost, won = int((right_before & ~right_after).sum()), int((~right_before & right_after).sum())
    accuracy_low, accuracy_high = wilson(int(right_after.sum()), len(right_after))
    worst, share = worst_class(pairs.changed, pairs.target)
    quarter, median, three_quarters = np.quantile(divergence, (0.25, 0.5, 0.75))
    return {
        "kl": float(divergence.mean()),
        "kl_low": low,
        "kl_high": high,
        "kl_quarter": float(quarter),
        "kl_median": float(median),
        "kl_three_quarters": float(three_quarters),
        "accuracy": float(right_after.mean()),
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "dense_accuracy": float(right_before.mean()),
        "right_to_wrong": float(lost),
        "wrong_to_right": float(won),
        "mcnemar_p": mcnemar(lost, won),
        "agreement": float((before == after).mean()),
        "brier": brier(pairs.changed, pairs.target),
        "dense_brier": brier(pairs.dense, pairs.target),
        "calibration_error": calibration_error(pairs.changed, pairs.target),
        "dense_calibration_error": calibration_error(pairs.dense, pairs.target),
        "worst_class": float(worst),
        "worst_class_accuracy": share,
        "items": float(len(pairs.target)),
    }
