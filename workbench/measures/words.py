"""What a number means: words with thresholds, and a verdict against somebody's own tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Kullback-Leibler divergence to the dense model in nats an item, below which the word holds.
WORDS = ((0.005, "same"), (0.03, "close"), (0.1, "visible"), (math.inf, "changed"))
LEGEND = "same < 0.005, close < 0.03, visible < 0.1, changed above (nats)"


def word(divergence: float) -> str:
    """same, close, visible or changed."""
    return next(name for bound, name in WORDS if divergence < bound or bound == math.inf)


@dataclass(frozen=True)
class Verdict:
    """accept, regression, cannot tell or does not fit; and how many more texts would tell (0 when known)."""

    name: str
    more_texts: int = 0

    def __str__(self) -> str:
        if self.name == "cannot tell" and self.more_texts:
            return f"cannot tell ({self.more_texts} more texts would)"
        return self.name


def verdict(
    value: float,
    low: float,
    high: float,
    tolerance: float,
    texts: int,
    size: float | None = None,
    budget: float | None = None,
) -> Verdict:
    """What a measured value (less is better) with its interval says about a tolerance.

    An interval's width falls with the square root of the number of texts, so the number that would tell is
    the one at which its half width is the distance of the value to the tolerance. It is 0 when more texts
    cannot be counted on to tell: no interval, or a value that is the tolerance.
    """
    if size is not None and budget and size > budget:
        return Verdict("does not fit")
    if math.isnan(low) or math.isnan(high):
        return Verdict("cannot tell")
    if high <= tolerance:
        return Verdict("accept")
    if low > tolerance:
        return Verdict("regression")
    half = high - value if tolerance > value else value - low
    distance = abs(tolerance - value)
    if distance == 0:
        return Verdict("cannot tell")
    needed = math.ceil(round(texts * (half / distance) ** 2, 6))
    return Verdict("cannot tell", max(1, needed - texts))
