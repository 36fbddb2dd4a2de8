"""Information criteria, cross-validation by compute, held-out extrapolation."""

import numpy as np
import pytest
from scipy import integrate, stats

from workbench.errors import BadInput
from workbench.scaling.comparison import (
    compare,
    cross_validate,
    extrapolation,
    held_out,
    information,
    log_likelihood,
)
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.objective import Objective

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)


@pytest.fixture(scope="module")
def runs():
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9.5, 8), np.logspace(9, 11, 8)))
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d}) * np.exp(
        0.003 * np.random.default_rng(0).standard_normal(64)
    )
    return {"params": n, "tokens": d, "flops": 6 * n * d, "loss": loss}


def test_gaussian_likelihood_is_scipys(runs):
    found = fit(law("chinchilla"), runs, Objective("squares", "linear"), starts=64)
    r = found.residuals
    assert log_likelihood(found) == pytest.approx(
        stats.norm.logpdf(r, scale=np.sqrt(np.mean(r**2))).sum(), rel=1e-9
    )
    facts = information(found)
    assert facts["aic"] == pytest.approx(12 - 2 * facts["log_likelihood"])
    assert facts["bic"] == pytest.approx(6 * np.log(64) - 2 * facts["log_likelihood"])


def test_huber_density_integrates_to_one_at_the_fitted_scale(runs):
    """The likelihood reported for a Huber fit is that of a proper density:
    check its normaliser by quadrature.
    """
    found = fit(law("chinchilla"), runs, Objective("huber", "linear", 1e-3), starts=64)
    r, d = np.abs(found.residuals), 1e-3
    rho = np.where(r <= d, 0.5 * r**2, d * (r - 0.5 * d))

    def total(s):
        z = integrate.quad(lambda u: np.exp(-(0.5 * u * u if u <= d else d * (u - 0.5 * d)) / s), 0, d)[0]
        z += integrate.quad(lambda u: np.exp(-d * (u - 0.5 * d) / s), d, d + 60 * s / d)[0]
        return -np.sum(rho) / s - len(r) * np.log(2 * z)

    best = max(total(s) for s in np.geomspace(rho.mean() / 30, rho.mean() * 30, 400))
    assert log_likelihood(found) == pytest.approx(best, rel=1e-3)


def test_the_true_law_wins(runs):
    table = compare(
        [law(n) for n in ("chinchilla", "kaplan", "power-compute", "power-data")], runs, starts=64
    )
    assert table.law[0] == "chinchilla"
    assert table.set_index("law").aic.idxmin() == "chinchilla"
    assert table.band_error[0] < 0.005


def test_held_out_uses_only_runs_below_the_cutoff(runs):
    cutoff = np.quantile(runs["flops"], 0.6)
    table = held_out(law("chinchilla"), runs, [cutoff], starts=64)
    below = runs["flops"] <= cutoff
    direct = fit(law("chinchilla"), {k: v[below] for k, v in runs.items()}, starts=64)
    assert len(table) == (~below).sum()
    assert table.predicted.to_numpy() == pytest.approx(
        direct.predict({k: v[~below] for k, v in runs.items()}), rel=1e-6
    )
    assert (table.multiple > 1).all()
    changed = {k: v.copy() for k, v in runs.items()}
    changed["loss"][~below] *= 3  # the future cannot leak into the fit
    assert held_out(law("chinchilla"), changed, [cutoff], starts=64).predicted.to_numpy() == pytest.approx(
        table.predicted.to_numpy(), rel=1e-9
    )
    bins = extrapolation(table)
    assert bins.rows.sum() == len(table) and bins.error.max() < 0.02


def test_cross_validation_leaves_out_whole_bands(runs):
    table = cross_validate(law("chinchilla"), runs, folds=4, starts=64)
    assert table.rows.tolist() == [16, 16, 16, 16]
    assert (table.to_flops.to_numpy()[:-1] <= table.from_flops.to_numpy()[1:]).all()
    assert table.error.max() < 0.02


def test_wrong_requests(runs):
    with pytest.raises(BadInput, match="cutoffs"):
        held_out(law("chinchilla"), runs, [1.0])
    with pytest.raises(BadInput, match="folds"):
        cross_validate(law("chinchilla"), runs, folds=1)
    with pytest.raises(BadInput, match="laws"):
        compare([law("routed")], runs)
