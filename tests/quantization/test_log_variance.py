"""Widths by the logarithm of variance: the closed form against Lagrange's conditions and a numerical optimum,
the integer program against all choices.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from workbench.errors import BadInput
from workbench.quantization.allocation.integer_program import (
    Allocation,
    allocate,
    log_variance,
)

RANDOM = np.random.default_rng(0)
S, V, N = RANDOM.lognormal(0, 1.5, 6), RANDOM.lognormal(0, 1, 6), RANDOM.integers(10, 90, 6).astype(float)


def loss(bits: np.ndarray) -> float:
    return float((N * S * V * 4.0**-bits).sum())


def best(widths: tuple[int, ...] | np.ndarray) -> Allocation:
    """The integer program over the cost and size of each width, within 3 bits a weight."""
    bits = np.asarray(widths, dtype=float)
    return allocate((N * S * V)[:, None] * 4.0**-bits, N[:, None] * bits, 3.0 * N.sum() * (1 + 1e-12))


def test_the_closed_form_satisfies_lagranges_conditions() -> None:
    bits = log_variance(S, V, N, 3.0)
    assert np.average(bits, weights=N) == pytest.approx(3.0)
    slopes = (
        -np.log(4) * S * V * 4.0**-bits
    )  # of the loss per weight and bit: the multiplier, one for all layers
    assert slopes == pytest.approx(np.full(6, slopes[0]))


def test_the_closed_form_is_the_numerical_optimum() -> None:
    constraint = {"type": "eq", "fun": lambda b: np.average(b, weights=N) - 3.0}
    found = minimize(lambda b: np.log(loss(b)), np.full(6, 3.0), constraints=[constraint], tol=1e-12)
    bits = log_variance(S, V, N, 3.0)
    assert loss(bits) <= np.exp(found.fun) * (1 + 1e-9) and found.x == pytest.approx(bits, abs=1e-2)


def test_equal_layers_get_the_classical_rule_and_doubling_a_deviation_a_bit() -> None:
    sizes = np.full(6, 50.0)
    assert log_variance(S, V, sizes, 4.0) == pytest.approx(
        4 + 0.5 * np.log2(S * V / np.prod(S * V) ** (1 / 6))
    )
    assert log_variance(np.ones(2), [4.0, 1.0], [1.0, 1.0], 3.0) == pytest.approx(
        [3.5, 2.5]
    )  # a deviation twice as large: one bit more


def test_the_program_is_the_best_of_all_choices_and_approaches_the_closed_form() -> None:
    widths = (2, 3, 4, 8)
    found = best(widths)
    choices = [np.array(c) for c in itertools.product(range(4), repeat=6)]
    bits = np.array(widths)
    inside = [c for c in choices if (N * bits[c]).sum() <= 3.0 * N.sum() + 1e-9]
    assert loss(bits[found.choice].astype(float)) == pytest.approx(
        min(loss(bits[c].astype(float)) for c in inside)
    )
    assert found.size <= 3.0 * N.sum() * (1 + 1e-9) and found.bound == pytest.approx(found.cost)
    fine = np.arange(-2, 9, 0.125)
    near = best(fine)
    assert np.abs(fine[near.choice] - log_variance(S, V, N, 3.0)).max() < 0.3
    assert loss(fine[near.choice]) == pytest.approx(loss(log_variance(S, V, N, 3.0)), rel=0.05)


def test_what_has_no_logarithm_is_refused() -> None:
    for bad in ([1.0, -1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(BadInput, match="sensitivity"):
            log_variance(bad, [1.0, 1.0], [1.0, 1.0], 3.0)
    with pytest.raises(BadInput, match="variance"):
        log_variance([1.0, 1.0], [1.0], [1.0, 1.0], 3.0)
