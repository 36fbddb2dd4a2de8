"""Intervals of means over texts and draws of calibration examples, the same texts and draws for everything
that is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workbench.measures.intervals import LEVEL, RESAMPLES
from workbench.measures.language import TokenPairs
from workbench.measures.reference import Comparison

Values = NDArray[np.float64]


def by_text(found: Comparison) -> tuple[Values, Values]:
    """(texts,) sums of a comparison's distances over the items of each text, and how many items those are."""
    values = found.distances()
    pairs = found.pairs
    if isinstance(pairs, TokenPairs):
        texts = pairs.window
    else:
        texts = getattr(pairs, "example", np.arange(len(values)))
    _, place = np.unique(texts, return_inverse=True)
    return np.bincount(place, values).astype(float), np.bincount(place).astype(float)


@dataclass(frozen=True)
class Resampled:
    """Means over one domain, 2,000 times over texts drawn with replacement, as in `block_bootstrap`; and over
    draws of calibration examples drawn with replacement, where there are several.

    items : (texts,)
    """

    items: Values
    seed: int

    def mean(self, sums: Values) -> float:
        """sums : (draws, texts), or (1, texts) of what has no draws"""
        return float(sums.mean(0).sum() / self.items.sum())

    def means(self, sums: Values) -> Values:
        """(2000,)"""
        count = len(self.items)
        if count < 2:
            return np.full(RESAMPLES, np.nan)
        texts = np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        total = texts @ self.items
        if len(sums) == 1:
            return np.asarray((texts @ sums[0]) / total)
        shares = np.full(len(sums), 1 / len(sums))
        draws = np.random.default_rng(self.seed + 1).multinomial(len(sums), shares, size=RESAMPLES)
        return np.asarray(((texts @ sums.T) * draws).sum(1) / len(sums) / total)


def interval(values: Values) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
