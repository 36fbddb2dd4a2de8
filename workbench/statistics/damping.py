"""Second moments that can be inverted."""

from __future__ import annotations

from torch import Tensor


def damped(gram: Tensor, damp: float) -> Tensor:
    """A copy of the inputs' second moment that can be inverted:
    unseen inputs get 1, the diagonal gains `damp` times its mean.
    """
    found = gram.clone()
    diagonal = found.diagonal()
    unseen = diagonal == 0
    diagonal[unseen] = 1.0 if bool(unseen.all()) else diagonal[~unseen].mean()
    diagonal += damp * diagonal.mean()
    return found
