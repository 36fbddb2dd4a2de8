"""Stacking weights, mixture quantiles and the band of several laws."""

import itertools

import numpy as np
import pytest
from scipy import optimize, special, stats

from workbench.errors import BadInput
from workbench.scaling import law, stack
from workbench.scaling.doubt.law_band import TOGETHER, law_band
from workbench.scaling.doubt.stacking import (
    mixture_quantile,
    normal_log_density,
    shares,
    stacked,
    stacking_weights,
)

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)


@pytest.fixture(scope="module")
def runs():
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 6), np.logspace(9, 10.5, 6)))
    noise = 0.004 * np.random.default_rng(1).standard_normal(36)
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d}) * np.exp(noise)
    return {"params": n, "tokens": d, "loss": loss, "flops": 6 * n * d}


@pytest.fixture(scope="module")
def two(runs):
    return stack([law("chinchilla"), law("power-compute")], runs, starts=64, resamples=60)


def test_weights_meet_the_conditions_of_the_optimum_and_brute_force():
    draw = np.random.default_rng(0)
    density = draw.normal(0, 1.5, (60, 3))
    share = 1 / np.repeat([30.0, 60.0, 90.0], [10, 20, 30])

    def objective(w):
        return float(share @ special.logsumexp(density, b=np.asarray(w)[None], axis=1))

    weights = stacking_weights(density, share[None])[0]
    slope = share @ (np.exp(density) / (np.exp(density) @ weights)[:, None])
    assert weights.sum() == pytest.approx(1)
    assert (slope <= 1 + 1e-6).all() and slope[weights > 1e-5] == pytest.approx(1, abs=1e-6)
    grid = [(a, b, 1 - a - b) for a, b in itertools.product(np.linspace(0, 1, 101), repeat=2) if a + b <= 1]
    assert objective(weights) >= max(objective(np.clip(w, 0, 1)) for w in grid) - 1e-12


def test_each_cut_off_counts_the_same_and_a_run_the_same_at_each():
    cutoffs, rows = np.array([1.0, 1, 2, 2, 2]), np.array([3, 4, 2, 3, 4])
    share = shares(cutoffs, rows, 5)
    assert share[:, :2].sum(1) == pytest.approx(0.5) and share.sum(1) == pytest.approx(1)
    assert share[:, 0] / share[:, 1] == pytest.approx(share[:, 3] / share[:, 4])


def test_laws_that_held_out_runs_cannot_tell_apart_share_the_weight():
    """One law better by a hair at half the runs, worse by a hair at the others; a third is far off."""
    hair = np.random.default_rng(0).normal(0.0, 0.05, 40)
    density = np.stack([hair, -hair, np.full(40, -9.0)], axis=1)
    weights = stacking_weights(density, shares(np.zeros(40), np.arange(40))).mean(0)
    assert weights[:2].min() > 0.1 and weights[2] < 1e-3


def test_density_is_the_normal_one_and_never_undefined():
    error, spread = np.array([0.1, -2.0]), np.array([0.5, 3.0])
    assert normal_log_density(error, spread) == pytest.approx(stats.norm.logpdf(error, scale=spread))
    assert np.isfinite(normal_log_density(np.array([np.inf, np.nan, 0.0]), np.zeros(3))).all()


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
def test_mixture_quantile_is_the_root_of_its_distribution(probability):
    weights = np.array([0.2, 0.5, 0.3])
    means, spreads = (
        np.array([[0.0, 1.0], [3.0, 1.1], [-2.0, 0.9]]),
        np.array([[1.0, 0.1], [0.5, 0.2], [2.0, 1]]),
    )
    for point, got in enumerate(mixture_quantile(weights, means, spreads, probability)):

        def reached(x, point=point):
            return float(weights @ stats.norm.cdf(x, means[:, point], spreads[:, point])) - probability

        assert got == pytest.approx(optimize.brentq(reached, -20, 20, xtol=1e-13), abs=1e-9)


def test_a_stack_of_one_law_is_its_own_band(runs):
    alone = stack([law("chinchilla")], runs, starts=64, resamples=60)
    point = {"params": np.array([1e8, 5e9]), "tokens": np.array([1e10, 1e11])}
    own = alone.members[0].band(point, 0.8)
    for name in ("predicted", "low", "high"):
        assert alone.band(point, 0.8)[name].to_numpy() == pytest.approx(own[name].to_numpy(), rel=1e-12)


def test_the_law_that_the_runs_came_from_gets_the_weight(two):
    assert two.names[0] == "chinchilla" and two.weights[0] > 0.9
    assert two.held_out > 0 and two.scores[0] > two.scores[1]
    assert set(two.table.law) == {"chinchilla", "power-compute"}


def test_a_band_of_two_laws_holds_what_they_disagree_by(two):
    """With equal weights and far apart, its ends are the outer laws' own quantiles at twice the tail."""
    from dataclasses import replace

    point = {"params": np.array([5e9]), "tokens": np.array([1e9]), "flops": np.array([3e19])}
    means, spreads = two.components(point)
    even = replace(two, weights=np.array([0.5, 0.5]))
    low, high = (np.log(even.band(point)[side].to_numpy()[0]) for side in ("low", "high"))
    assert np.ptp(means) > 0
    inside = 0.5 * (stats.norm.cdf(high, means, spreads) - stats.norm.cdf(low, means, spreads)).sum()
    assert inside == pytest.approx(0.9, abs=1e-9)


def test_what_is_left_out_is_said(runs):
    made = stack(
        [law("chinchilla"), law("data-constrained"), law("E + A/steps**a")], runs, starts=32, resamples=30
    )
    assert made.names == ("chinchilla",)
    assert "needs column unique_tokens" in made.left_out["data-constrained"]
    assert "needs column steps" in made.left_out["custom"]


def test_an_unidentifiable_law_and_a_plateau_leave_nothing(runs):
    with pytest.raises(BadInput, match="law custom: NOT converged.*no plan"):
        stack([law("E + F + A/params**alpha")], runs, starts=32, needed="custom")
    flat = runs | {"loss": np.full(36, 2.0)}
    with pytest.raises(BadInput, match="no plan"):
        stack([law("chinchilla")], flat, starts=32, needed="chinchilla")
    with pytest.raises(BadInput, match="none is left to stack"):
        stack([law("data-constrained")], runs)


def test_laws_of_different_things_are_refused(two):
    other = stack(
        [law("loss-time")], {"step": np.arange(1, 40), "loss": 2 + 1 / np.arange(1.0, 40)}, starts=32
    )
    from dataclasses import replace

    renamed = replace(other.members[0].fit, law=replace(other.members[0].fit.law, target="distance"))
    with pytest.raises(BadInput, match="different things"):
        stacked([two.members[0], replace(other.members[0], fit=renamed)])


def test_how_far_a_point_lies_beyond_the_published_data():
    shape = law("chinchilla")
    cells = {"params": [1e9, 1.6e11, 7e6], "tokens": [1e10, 1e10, 1e12]}
    assert shape.beyond(cells) == pytest.approx([1, 10, 10])
    assert law("power-compute").beyond({"flops": [1e30]}).tolist() == [1]


def test_a_band_over_compute_is_the_stacks_own(two, runs):
    """Along the largest run's tokens a parameter, to a hundred times its compute."""
    import pandas as pd

    table = law_band(two, pd.DataFrame(runs), 0.9)
    whole = table[table.law == TOGETHER]
    assert whole.flops.max() == pytest.approx(100 * runs["flops"].max())
    assert (whole.tokens / whole.params).to_numpy() == pytest.approx(10**1.5)
    again = two.band(whole, 0.9)
    assert whole.low.to_numpy() == pytest.approx(again.low) and whole.high.to_numpy() == pytest.approx(
        again.high
    )
    alone = table[table.law == "chinchilla"]
    assert alone.beyond.max() == pytest.approx(max(70e6 / whole.params.min(), 5e9 / whole.tokens.min()))
    assert law_band(two, pd.DataFrame({"flops": runs["flops"]}), 0.9) is None


def test_a_fit_says_its_laws_and_draws_dashes_beyond_what_was_published(runs, tmp_path, monkeypatch):
    from workbench.scaling import Runs, ScalingFit

    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    asked = ScalingFit(starts=32, resamples=40, against=("over-training",))
    result = asked.run(Runs.from_table(runs))
    assert "chinchilla" in result.facts["laws"] and result.tables["laws"].weight.sum() == pytest.approx(1)
    drawn = result.figure(view="laws").data
    dashes = {t.name: t.line.dash for t in drawn if t.name and "beyond" in t.name}
    assert dashes and set(dashes.values()) == {"dash"}
    bare = asked.with_fields(checks=False, against=()).run(Runs.from_table(runs)).figure(view="laws")
    assert "run with checks" in bare.layout.annotations[0].text
