"""Second moments that can be inverted."""

from __future__ import annotations

import torch
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


def factor_from_the_last(gram: Tensor, damp: float) -> Tensor | None:
    """Upper triangular R with R R^T the damped second moment: Cholesky's factorisation from the last column
    to the first. None when the matrix is numerically singular.

    It is made in place, in the layout that LAPACK writes: without `out` PyTorch first copies the triangle
    against the grain, which takes longer than the factorisation.
    """
    lower = damped(gram, damp).flip(0, 1).mT.contiguous().mT
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return None if bool(failed) else lower.flip(0, 1)
