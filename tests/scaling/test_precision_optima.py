from __future__ import annotations

import math

import numpy as np
import pytest

from workbench import BadInput
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.precision_optima import (
    best_float_split,
    best_qat_fraction,
    critical_tokens,
    published_qat_fraction,
)

FLOAT = {
    "E": 1.8,
    "n": 480.0,
    "d": 2000.0,
    "alpha": 0.35,
    "beta": 0.37,
    "gamma": 1e3,
    "delta": 3.2,
    "nu": 2.9,
}
QAT = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37, "theta": 0.1, "kappa": 0.5, "phi": 2.0}
QAT |= {"chi": 0.6, "psi": 0.1, "omega": 0.2, "lam": 1.0, "mu": 0.5, "nu": 0.1, "xi": 0.2, "rho": 0.1}


def test_the_split_and_the_critical_data_are_the_laws_own_minima():
    shape = law("float-precision")
    mantissa = np.linspace(0, 6, 60_001)
    columns = {"params": 1e8, "tokens": 1e10, "block_size": 128.0}
    fixed = {name: np.full(mantissa.shape, value) for name, value in columns.items()}
    losses = shape.predict(FLOAT, fixed | {"mantissa_bits": mantissa, "exponent_bits": 7 - mantissa})
    exponent_best, mantissa_best = best_float_split(FLOAT, 8)
    assert mantissa_best == pytest.approx(mantissa[losses.argmin()], abs=2e-4)
    assert exponent_best + mantissa_best == pytest.approx(7)
    tokens = np.geomspace(1e6, 1e16, 100_001)
    fixed = {"params": 1e8, "exponent_bits": 2.0, "mantissa_bits": 1.0, "block_size": 128.0}
    losses = shape.predict(
        FLOAT, {k: np.full(tokens.shape, v) for k, v in fixed.items()} | {"tokens": tokens}
    )
    assert critical_tokens(FLOAT, 1e8, 2, 1, 128) == pytest.approx(tokens[losses.argmin()], rel=1e-3)
    assert critical_tokens(FLOAT, 1e8, 2, 1, 1) == math.inf


def test_the_best_share_of_quantization_aware_training_is_the_laws_own_minimum():
    shares = np.linspace(0, 1, 20_001)[1:-1]
    fixed = {"params": 1e8, "tokens": 1e10, "bits": 4.0}
    columns = {k: np.full(shares.shape, v) for k, v in fixed.items()} | {"qat_fraction": shares}
    losses = law("quantization-aware").predict(QAT, columns)
    assert best_qat_fraction(QAT, 1e8, 1e10, 4) == pytest.approx(shares[losses.argmin()], abs=1e-3)
    assert published_qat_fraction(1e8, 1e10, 4) == pytest.approx(
        math.exp(math.log(200) - 6.7297 / math.log(200)) / 200
    )
    assert published_qat_fraction(1e8, 1e11, 4) > published_qat_fraction(1e8, 1e10, 4)
    with pytest.raises(BadInput, match="more than 1"):
        published_qat_fraction(1e8, 1e7, 8)
