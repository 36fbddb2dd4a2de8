"""Intervals and tests of what was counted or averaged on a sample of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


def block_bootstrap(
    values: NDArray[np.float64], blocks: NDArray[np.int64], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over items that come in blocks (tokens in windows, tokens in
    texts): whole blocks are drawn with replacement, 2,000 times, because items of one block are not
    independent (Künsch 1989). NaN twice when there are fewer than two blocks.

    values : (items,);  blocks : (items,), the block of each
    """
    _, place = np.unique(blocks, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place).astype(float)
    if len(sums) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES
    )
    low, high = np.quantile((draws @ sums) / (draws @ sizes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): within [0, 1], and right for shares near its ends."""
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == total else min(1.0, centre + half)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """The exact two-sided p of as many flips in one direction and in the other, were both equally likely
    (McNemar 1947, the binomial form); 1 without flips.
    """
    flips = right_to_wrong + wrong_to_right
    return 1.0 if flips == 0 else float(stats.binomtest(right_to_wrong, flips, 0.5).pvalue)


def quantiles(values: NDArray[np.float64], shares: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation between order statistics, as llama.cpp's perplexity tool gives
    them.
    """
    return [float(value) for value in np.quantile(values, shares)]
