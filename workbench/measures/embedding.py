"""How two encoders differ on the same texts, from the vectors of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from workbench.measures.intervals import block_bootstrap

NEIGHBOURS = 10


@dataclass(frozen=True)
class VectorPairs:
    """Outputs (texts, width) of both models."""

    dense: NDArray[np.float64]
    changed: NDArray[np.float64]

    @property
    def cosine(self) -> NDArray[np.float64]:
        """Of each text's two vectors; 1 where both are the same, whatever they are."""
        product = (self.dense * self.changed).sum(-1)
        lengths = np.linalg.norm(self.dense, axis=-1) * np.linalg.norm(self.changed, axis=-1)
        same = (self.dense == self.changed).all(-1)
        return np.where(same, 1.0, product / np.maximum(lengths, np.finfo(float).tiny))


def similarities(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines between all texts (texts, texts)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(float).tiny)
    return np.asarray(unit @ unit.T)


def neighbour_agreement(dense: NDArray[np.float64], changed: NDArray[np.float64]) -> tuple[float, float]:
    """(mean Spearman correlation of each text's similarities to all others, share of its ten nearest that
    stay among the ten nearest). NaN twice with fewer than three texts.
    """
    count = len(dense)
    if count < 3:
        return float("nan"), float("nan")
    near = min(NEIGHBOURS, count - 1)
    before, after = similarities(dense), similarities(changed)
    correlations, shares = [], []
    for text in range(count):
        others = np.arange(count) != text
        one, two = before[text, others], after[text, others]
        ranks = [stats.rankdata(values) for values in (one, two)]
        spread = [float(np.std(values)) for values in ranks]
        correlations.append(1.0 if min(spread) == 0 else float(np.corrcoef(*ranks)[0, 1]))
        kept = set(np.argsort(-one, kind="stable")[:near]) & set(np.argsort(-two, kind="stable")[:near])
        shares.append(len(kept) / near)
    return float(np.mean(correlations)), float(np.mean(shares))


def embedding_measures(pairs: VectorPairs, seed: int = 0) -> dict[str, float]:
    """`distance` is 1 - cosine, 0 where the vectors are the same."""
    distance = 1 - pairs.cosine
    low, high = block_bootstrap(distance, np.arange(len(distance)), seed)
    ranks, neighbours = neighbour_agreement(pairs.dense, pairs.changed)
    quarter, median, three_quarters = np.quantile(distance, (0.25, 0.5, 0.75))
    return {
        "distance": float(distance.mean()),
        "distance_low": low,
        "distance_high": high,
        "distance_quarter": float(quarter),
        "distance_median": float(median),
        "distance_three_quarters": float(three_quarters),
        "cosine": float(pairs.cosine.mean()),
        "worst_cosine": float(pairs.cosine.min()),
        "rank_agreement": ranks,
        "neighbours_kept": neighbours,
        "items": float(len(distance)),
    }


def output_distances(pairs: VectorPairs) -> NDArray[np.float64]:
    """(texts,) mean square of each output's change as a share of the outputs' variance."""
    change = np.square(pairs.changed - pairs.dense).mean(-1)
    return np.asarray(change / max(float(pairs.dense.var(0).mean()), np.finfo(float).tiny))


def output_measures(pairs: VectorPairs, seed: int = 0) -> dict[str, float]:
    """Of numbers that are predicted: the mean square of their change as a share of their variance, 0 where
    nothing changed.
    """
    distance = output_distances(pairs)
    low, high = block_bootstrap(distance, np.arange(len(distance)), seed)
    quarter, median, three_quarters = np.quantile(distance, (0.25, 0.5, 0.75))
    return {
        "distance": float(distance.mean()),
        "distance_low": low,
        "distance_high": high,
        "distance_quarter": float(quarter),
        "distance_median": float(median),
        "distance_three_quarters": float(three_quarters),
        "items": float(len(distance)),
    }
