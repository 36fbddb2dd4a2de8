"""How large an error is beside the signal, and how heavy the tails are."""

from __future__ import annotations

import math

from torch import Tensor


def decibel(signal: Tensor | float, noise: Tensor | float) -> float:
    """10 log10(signal / noise), at most SILENT."""
    return 10 * math.log10(max(float(signal), 1e-30) / max(float(noise), 1e-20 * max(float(signal), 1e-10)))


def kurtosis(values: Tensor) -> float:
    """E x^4 / (E x^2)^2."""
    square = values.double().square()
    return float(square.square().mean() / square.mean().square().clamp_min(1e-60))
