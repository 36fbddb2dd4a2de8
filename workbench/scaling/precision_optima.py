"""What fitted laws of precision say is best: exponent against mantissa bits, how much data a format bears,
and the share of a run to spend on quantization-aware training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import optimize

from workbench.errors import BadInput
from workbench.scaling.formulas.lawbook import law

Constants = Mapping[str, float]


def best_float_split(constants: Constants, bits: float) -> tuple[float, float]:
    """(exponent bits, mantissa bits) of the lowest loss for a format of `bits`, one of them the sign
    (Sun et al. 2025): M + 1/2 = nu bits / (delta + nu), E + 1/2 = delta bits / (delta + nu).

    They are not rounded, and negative where a format has too few bits for both.
    """
    share = constants["nu"] / (constants["delta"] + constants["nu"])
    return (1 - share) * bits - 0.5, share * bits - 0.5


def critical_tokens(
    constants: Constants, params: float, exponent_bits: float, mantissa_bits: float, block_size: float
) -> float:
    """Tokens beyond which more of them raise the loss of training in a format (Sun et al. 2025);
    infinite without a shared scale (`block_size` 1).
    """
    c = constants
    worth = c["gamma"] * (exponent_bits + 0.5) ** c["delta"] * (mantissa_bits + 0.5) ** c["nu"]
    spread = math.log2(block_size)
    if spread <= 0:
        return math.inf
    return float((c["d"] * params ** c["alpha"] * worth / spread) ** (1 / (2 * c["beta"])))


def best_qat_fraction(constants: Constants, params: float, tokens: float, bits: float) -> float:
    """Share of the tokens in quantization-aware training at which the law's loss is lowest."""
    shape = law("quantization-aware")

    def loss(fraction: float) -> float:
        point = {"params": params, "tokens": tokens, "bits": bits, "qat_fraction": fraction}
        return float(shape.predict(constants, {name: np.full(1, v) for name, v in point.items()})[0])

    grid = np.linspace(0.0, 1.0, 201)[1:-1]
    nearest = float(min(grid, key=loss))
    found = optimize.minimize_scalar(loss, bounds=(nearest - 0.005, nearest + 0.005), method="bounded")
    return float(found.x)


def published_qat_fraction(params: float, tokens: float, bits: float, a: float = 6.7297) -> float:
    """exp(log S - a / log S) / S with S the tokens for each byte of parameters (Dremov et al. 2025).
    `BadInput` where S is no more than 1, below which the rule says nothing.
    """
    each = tokens / (params * bits / 8)
    if each <= 1:
        raise BadInput(
            f"tokens: {tokens:g} are {each:.3g} for each byte of parameters; more than 1 are needed"
        )
    return math.exp(-a / math.log(each))
