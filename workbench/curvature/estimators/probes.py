"""Random probe vectors, and the standard errors of means over few of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from workbench.curvature.operators.curvature_operator import Operator


def rademacher(operator: Operator, numbers: Sequence[int], seed: int) -> Tensor:
    """Probes number `numbers` of a seed's sequence, entries +-1, (k, size);
    a probe does not depend on how they are grouped.
    """
    rows = torch.empty(len(numbers), operator.size, dtype=operator.dtype, device=operator.device)
    for row, number in zip(rows, numbers, strict=True):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        row.copy_(torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)).mul_(2).sub_(
            1
        )
    return rows


def gaussian(operator: Operator, numbers: Sequence[int], seed: int) -> Tensor:
    """Standard normal probes, (k, size); otherwise as `rademacher`."""
    rows = torch.empty(len(numbers), operator.size, dtype=operator.dtype, device=operator.device)
    for row, number in zip(rows, numbers, strict=True):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        row.copy_(torch.randn(operator.size, generator=generator, dtype=torch.float32))
    return rows


def standard_error(samples: ArrayLike) -> float:
    """Standard error of the mean of n independent samples,
    widened so that two of them cover 95.45 % also for few, skewed samples.

    s / sqrt(n) * t(0.97725; n - 1) / 2 * (1 + 7 g^2 / 6 n): with few probes s itself is uncertain (Student),
    and quadratic forms dominated by a few eigenvalues are skewed; the last factor removes the leading
    coverage error of a sample skewness g (Hall 1992, section 2.5, at z = 2). NaN for fewer than two samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    count = len(values)
    if count < 2:
        return math.nan
    from scipy import stats  # slow to import

    half = float(values.std(ddof=1)) / math.sqrt(count) * float(stats.t.ppf(stats.norm.cdf(2), count - 1))
    return half / 2 * float(skewness_factor(values))


def skewness_factor(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 + 7 g^2 / 6 n for n samples (n, ...) of skewness g:
    by how much Student's interval of about two standard errors is too short (Hall 1992).
    """
    spread = samples.std(0, ddof=1)
    third = ((samples - samples.mean(0)) ** 3).mean(0)
    skewness = np.divide(third, spread**3, out=np.zeros_like(third), where=spread**3 > 0)
    return 1 + 7 * skewness**2 / (6 * len(samples))
