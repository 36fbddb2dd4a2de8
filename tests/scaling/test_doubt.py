"""Certificates and intervals that do not say more than the runs do."""

import runpy

import numpy as np
import pytest

from tests.benchmarks.bench_prediction_intervals import held, outside, pooled
from workbench.scaling.doubt.certificate import certify
from workbench.scaling.doubt.prediction import cut_off, prediction_intervals
from workbench.scaling.doubt.uncertainty import bootstrap
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.objective import Objective, Problem
from workbench.scaling.runs import Runs
from workbench.scaling.scaling_fit import ScalingFit
from workbench.scaling.scaling_plan import ScalingPlan, non_embedding, size_meaning
from workbench.storage import data_folder

TRUTH = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
SQUARES = Objective("squares", "linear")


def grid(noise=0.0, points=6, seed=0):
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9.5, points), np.logspace(9, 11, points)))
    exact = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d})
    draw = np.random.default_rng(seed).standard_normal(len(n))
    return {"params": n, "tokens": d, "loss": exact * np.exp(noise * draw)}


@pytest.mark.parametrize("start", [(-2000.0, 50.0, 0.8), (-1500.0, 45.0, 0.85)])
def test_a_curved_valley_is_followed_to_its_end(start):
    """Kind: a point on the way is called a minimum. The model, range and values are those of NIST's Bennett5
    (scaled curvature 2e-10), with noise drawn here; scipy's lm is the oracle.
    """
    from scipy.optimize import least_squares

    x = np.linspace(7.447168, 10.4, 154)
    y = -2523.5058 * (46.736564 + x) ** (-1 / 0.93218483)
    y = y + 1.9e-3 * np.random.default_rng(0).standard_normal(154)
    model = Law.from_formula(
        "b1*(b2+x)**(-1/b3)",
        columns=["x"],
        target="y",
        positive=False,
        parameters=[
            Parameter("b1", start=(-2000, -1500)),
            Parameter("b2", start=(45, 50)),
            Parameter("b3", start=(0.8, 0.85)),
        ],
    )
    found = fit(model, {"x": x, "y": y}, SQUARES, np.array([start]))
    values = np.array([found.params[n] for n in ("b1", "b2", "b3")])
    oracle = least_squares(
        lambda b: b[0] * (b[1] + x) ** (-1 / b[2]) - y,
        values,
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    assert found.certificate.converged
    np.testing.assert_allclose(values, oracle.x, rtol=1e-4)
    problem = Problem(model, {"x": x}, y, SQUARES)
    early = certify(problem, problem.working(dict(zip(("b1", "b2", "b3"), start, strict=True))))
    assert not early.converged


@pytest.mark.parametrize(
    ("formula", "values"),
    [
        ("a * tanh(b * x)", {"a": 1.5, "b": 400.0}),  # the slope of b vanished long ago
        ("a + b * exp(-c * x)", {"a": 1.5, "b": 1e-9, "c": 20.0}),
        ("a / (1 + exp(b - c * x))", {"a": 1.5, "b": -60.0, "c": 2.0}),
    ],
)
def test_a_plateau_is_no_minimum(formula, values):
    x = np.linspace(1, 3, 30)
    y = 1.5 + 0.1 * np.random.default_rng(1).standard_normal(30)
    values = values | {"a": float(y.mean())}
    model = Law.from_formula(formula, columns=["x"], target="y", positive=False)
    problem = Problem(model, {"x": x}, y, SQUARES)
    found = certify(problem, problem.working(values))
    assert not found.converged and "NOT converged" in found.text


def test_every_resample_counts():
    """Kind: intervals from those resamples that were easy. A law with a term that half of the resamples turn
    off leaves refits that creep; all of them are in the interval.
    """
    table = grid(0.02, 4)
    rows = np.random.default_rng(3).permutation(16)[:9]
    found = fit(law("chinchilla"), {k: v[rows] for k, v in table.items()}, starts=64)
    drawn = bootstrap(found, 120)
    assert len(drawn.theta) == 120 and drawn.unsettled < 60
    assert np.isfinite(drawn.theta).all(1).mean() > 0.9


@pytest.mark.parametrize(
    "name",
    [
        "chinchilla",
        "weight-precision",
        "post-training-precision",
        "mixed-quantization",
        "float-precision",
        "quantization-aware",
        "data-constrained",
        "sparse",
    ],
)
def test_runs_without_noise_are_fitted_and_certified(name):
    """Kind: a check of scatter fails where there is none. Default objective, default intervals."""
    made = law(name)
    drawn = runpy.run_path(str(data_folder() / "runs" / "draw_from_laws.py"))
    truth = TRUTH if name == "chinchilla" else drawn["CONSTANTS"][name]
    columns = {c: drawn["column"](c, np.random.default_rng(i)) for i, c in enumerate(made.columns)}
    exact = made.predict(truth, columns)
    result = ScalingFit(law=name, starts=64, resamples=20, against=(), checks=False).run(
        Runs.from_table(columns | {made.target: exact}, target=made.target), cache=False
    )
    assert result.facts["rmse"] < 1e-6
    assert result.facts["converged"], result.facts["certificate"]
    assert np.isfinite(result.table[["low", "high"]].to_numpy(float)).all()


def test_bands_hold_new_runs_of_a_true_law():
    """With the true law, bands beyond the cut-off must not be wrong in the other direction either."""
    inside = []
    for seed in range(8):
        table = grid(0.01, 8, seed)
        compute = 6 * table["params"] * table["tokens"]
        limit = cut_off(compute, 0.25)
        below = {k: v[compute <= limit] for k, v in table.items()}
        above = {k: v[compute > limit] for k, v in table.items()}
        found = fit(law("chinchilla"), below, starts=32)
        band = prediction_intervals(found, below, bootstrap(found, 60), calibrate=seed < 2).band(above)
        inside.append(np.mean((band.low <= above["loss"]) & (above["loss"] <= band.high)))
    assert np.mean(inside) > 0.88


def test_band_grows_with_compute_and_with_level():
    table = grid(0.01)
    found = fit(law("chinchilla"), table, starts=32)
    coming = prediction_intervals(found, table, bootstrap(found, 60))
    near, far = (
        coming.band({"params": 3e9, "tokens": d}).pipe(lambda t: float((t.high / t.low).iloc[0]))
        for d in (1e11, 1e13)
    )
    assert far > 1.1 * near > 1
    wide, slim = (coming.band({"params": 3e9, "tokens": 1e11}, level) for level in (0.95, 0.5))
    assert (wide.high > slim.high).all() and (wide.low < slim.low).all()
    scatter = coming.scatter
    assert scatter == pytest.approx(0.01, rel=0.5)
    assert near >= np.exp(2 * 1.6 * scatter)


def test_bands_hold_on_some_published_runs(shared):
    """Kind: intervals that carry the parameters' scatter alone (they held 13 % of these Chinchilla runs)."""
    runs = held(0.1, shared / "data", ("chinchilla", "isoflops", "farseer"))
    assert outside(runs) == [] and 0.80 <= pooled(runs) <= 0.97
    assert len(runs[0].beyond) == 23 and runs[0].covered().mean() > 0.8
    assert runs[0].bands()["bootstrap"][0] < 0.3


@pytest.mark.long
def test_bands_hold_on_all_published_runs(shared):
    """Pooled 80 to 97 % of the runs beyond the cut-off, no table outside the 99 % binomial range of 0.9."""
    runs = held(0.1, shared / "data")
    assert len(runs) >= 15
    assert 0.80 <= pooled(runs) <= 0.97
    assert outside(runs) == []


def test_the_plan_says_which_size_it_means_and_carries_the_scatter():
    table = grid(0.01) | {"non_embedding_params": 0.8 * grid()["params"]}
    runs = Runs.from_table(table)
    result = ScalingPlan(starts=32, resamples=40, against=(), flops=1e22).run(runs, cache=False)
    assert result.facts["size_means"] == "total parameters"
    row = result.table.set_index("quantity").loc["loss"]
    assert row.high / row.low > np.exp(2 * 1.6 * 0.005)
    advice = result.tables["advice"]
    assert advice.counts[0] == "non-embedding parameters, by the runs' ratio"
    assert advice.params[0] == pytest.approx(0.8 * result.facts["params"], rel=1e-6)
    bare = Runs.from_table(grid(0.01))
    assert non_embedding(bare, 1e9) == (
        1e9,
        "taken as non-embedding parameters (the runs have no column non_embedding_params)",
    )
    activated = Law.from_formula("E + A / active_params**alpha + B / tokens**beta")
    assert "activated" in size_meaning(activated, bare)
    named = Runs.from_table({"N": [1e8, 1e9], "D": [1e9, 1e10], "loss": [3.0, 2.5]})
    assert "column 'N'" in size_meaning(law("chinchilla"), named)
