"""Weight spectra against matrices whose spectra are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.curvature.studies.weight_spectrum import (
    marchenko_pastur_density,
    marchenko_pastur_median,
    noise_fit,
    power_law,
    weight_row,
)


@pytest.mark.parametrize("q", [0.1, 0.25, 0.5, 1.0])
def test_marchenko_pastur_law(q: float) -> None:
    low, high = (1 - q**0.5) ** 2, (1 + q**0.5) ** 2
    grid = low + (high - low) * np.sin(np.linspace(0, np.pi / 2, 200_001)) ** 2
    density = marchenko_pastur_density(grid, q)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=2e-3)
    assert np.trapezoid(density * grid, grid) == pytest.approx(1, abs=2e-3)
    below = grid <= marchenko_pastur_median(q)
    assert np.trapezoid(density[below], grid[below]) == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("shape", [(300, 300), (200, 800), (800, 200)])
def test_noise_with_planted_spikes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    noise = 0.03 * torch.randn(shape)
    spike = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    row, values = weight_row(noise + 3 * spike / torch.linalg.matrix_norm(spike))
    assert row["noise_deviation"] == pytest.approx(0.03, rel=0.03)
    assert row["spikes"] in (1, 2)  # finite size lets the noise reach past its edge once in a while
    assert noise_fit(values[1:], min(shape) / max(shape)).high >= 0.97 * values[1]


def test_singular_values_and_ranks_of_known_matrices() -> None:
    row, values = weight_row(torch.diag(torch.tensor([4.0, 2.0, 2.0, 0.0])))
    assert values * 4 == pytest.approx([16, 4, 4, 0])
    assert (
        row["stable_rank"] == pytest.approx(24 / 16)
        and row["rank"] == 3
        and row["frobenius"] == pytest.approx(24**0.5)
    )
    row, _ = weight_row(torch.eye(16))
    assert row["effective_rank"] == pytest.approx(16) and row["stable_rank"] == pytest.approx(16)
    row, _ = weight_row(torch.zeros(12, 9))
    assert row["stable_rank"] == 0 and "power_law" not in row


def test_power_law_exponent_of_a_pareto_sample() -> None:
    draw = np.random.default_rng(0)
    sample = draw.pareto(1.5, 4000) + 1  # p(x) ~ x^-2.5
    found = power_law(sample)
    assert found is not None and abs(found.exponent - 2.5) < 3 * found.error and found.tail > 1000
    mixed = np.concatenate([draw.uniform(0, 1, 3000), sample])
    found = power_law(mixed)
    assert found is not None and found.lowest >= 0.9 and abs(found.exponent - 2.5) < 4 * found.error
    assert power_law(np.ones(5)) is None
