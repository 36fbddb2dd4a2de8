"""Spiked random matrix theory of batch curvature: how a batch's noise moves eigenvalues
(Granziol, Zohren and Roberts 2022).

The Hessian of a batch of B out of N items is the full one plus noise of entry variance sigma^2 / b,
b = B / (1 - B / N). For a symmetric noise matrix of size P with independent entries,
an eigenvalue lambda of the full matrix appears at

    lambda' = lambda + (P / b) sigma^2 / lambda     if lambda > sqrt(P / b) sigma,
        else the bulk edge 2 sqrt(P / b) sigma.

Here the noise is given by its total, V = P^2 sigma^2 = b E ||H_B - H||_F^2, which probes measure without
entries: (P / b) sigma^2 = V / (P b).
"""

from __future__ import annotations

import math


def effective_batch(batch: float, items: float = math.inf) -> float:
    """b = B / (1 - B / N), the finite-population correction; infinite for the full batch."""
    if batch >= items:
        return math.inf
    return batch / (1 - batch / items)


def noise_level(noise: float, size: float, batch: float, items: float = math.inf) -> float:
    """(P / b) sigma^2 from the total item noise V, the matrix size P and the batch."""
    return noise / (size * effective_batch(batch, items))


def bulk_edge(noise: float, size: float, batch: float, items: float = math.inf) -> float:
    """Edge of the noise semicircle, 2 sqrt(P / b) sigma (Wigner 1955)."""
    return 2 * math.sqrt(noise_level(noise, size, batch, items))


def shifted_eigenvalue(
    value: float, noise: float, size: float, batch: float, items: float = math.inf
) -> float:
    """Where the eigenvalue `value` of the full matrix appears in a batch's
    (Benaych-Georges and Nadakuditi 2011).
    """
    level = noise_level(noise, size, batch, items)
    return value + level / value if value > math.sqrt(level) else 2 * math.sqrt(level)
