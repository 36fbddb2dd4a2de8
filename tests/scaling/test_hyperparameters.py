"""Learning-rate and batch laws, critical batch sizes, optimizer speed-up."""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.hyperparameters import (
    advice_of,
    best_settings,
    critical_batch,
    deepseek_law,
    excess_loss,
    fit_step_law,
    minimum_steps,
    speedup,
    step_law,
    steps_and_examples,
)


@pytest.fixture
def steplaw(shared):
    table = pd.read_csv(shared / "data" / "steplaw" / "dense_lr_bs_loss.csv")
    return pd.DataFrame(
        {
            "params": table.N,
            "tokens": table.D,
            "learning_rate": table.lr,
            "batch_tokens": table.bs * 2048.0,
            "loss": table["smooth loss"],
        }
    )


def bowls(noise=0.0):
    """Cells whose best learning rate and batch follow the published law exactly, in a quadratic bowl."""
    rows = []
    rng = np.random.default_rng(0)
    for n in (1e8, 3e8, 1e9):
        for d in (1e10, 1e11):
            lr, batch = step_law(n, d)
            for u in np.linspace(-2, 2, 7):
                for v in np.linspace(-2, 2, 7):
                    loss = 3 + 0.01 * (u * u + 0.6 * u * v + v * v) + noise * rng.standard_normal()
                    rows.append(
                        (
                            n,
                            d,
                            lr * np.exp(u + 0.2),
                            batch * np.exp(v - 0.1),
                            loss if abs(u) < 1.9 or v > 0 else np.nan,
                        )
                    )
                    if abs(u - 2) < 1e-9 and v < -1:
                        rows[-1] = (*rows[-1][:4], 9.0)  # diverged
    table = pd.DataFrame(rows, columns=["params", "tokens", "learning_rate", "batch_tokens", "loss"])
    table.loss = [
        3 + 0.01 * (a * a + 0.6 * a * b + b * b) + noise * rng.standard_normal()
        if np.isfinite(r.loss) and r.loss < 5
        else r.loss
        for r in table.itertuples()
        for a, b in [
            (
                np.log(r.learning_rate / step_law(r.params, r.tokens)[0]),
                np.log(r.batch_tokens / step_law(r.params, r.tokens)[1]),
            )
        ]
    ]
    return table


def test_bowl_recovers_the_law_exactly_despite_diverged_runs():
    settings = best_settings(bowls(), "bowl")
    assert not settings.fallback.any()
    laws = fit_step_law(settings)
    assert laws["learning_rate"].params == pytest.approx({"c": 1.79, "x": 0.713, "y": 0.307}, rel=1e-6)
    assert laws["batch_tokens"].params == pytest.approx({"c": 0.58, "y": 0.571}, rel=1e-6)
    assert excess_loss(bowls(), advice_of(laws)).excess.max() < 1e-3


def test_published_step_law_data(steplaw):
    """Exponents within the published range of estimators, advice judged by the loss it costs;
    diverged runs stay in the table.
    """
    assert (steplaw.groupby(["params", "tokens"]).loss.transform("min") * 1.2 < steplaw.loss).sum() > 100
    laws = fit_step_law(best_settings(steplaw, "bowl"))
    assert -0.85 <= -laws["learning_rate"].params["x"] <= -0.60
    assert 0.19 <= laws["learning_rate"].params["y"] <= 0.33
    assert 0.50 <= laws["batch_tokens"].params["y"] <= 0.64
    published = excess_loss(steplaw, step_law).excess
    assert published.mean() == pytest.approx(0.00096, abs=1e-4) and published.max() == pytest.approx(
        0.0031, abs=1e-4
    )
    assert excess_loss(steplaw, deepseek_law).excess.mean() == pytest.approx(0.0076, abs=5e-4)
    constant = excess_loss(steplaw, lambda n, d: (1e-3, 736 * 2048.0)).excess
    assert constant.mean() == pytest.approx(0.0195, abs=2e-3) and constant.max() == pytest.approx(
        0.044, abs=1e-3
    )
    assert excess_loss(steplaw, advice_of(laws)).excess.mean() < 0.003


def test_mean_of_published_bootstrap_rows(shared):
    rows = pd.read_csv(shared / "data" / "steplaw" / "1004_fitted_lr_bs_scaling_model_parameters.csv").mean()
    assert np.exp(rows.lr_intercept) == pytest.approx(1.797, abs=1e-3)
    assert (rows.lr_coefN, rows.lr_coefD) == (
        pytest.approx(-0.7129, abs=1e-4),
        pytest.approx(0.3075, abs=1e-4),
    )
    assert np.exp(rows.bs_intercept) == pytest.approx(0.581, abs=1e-3) and rows.bs_coefD == pytest.approx(
        0.5709, abs=1e-4
    )


@pytest.mark.parametrize(("model", "expected"), [("85M", 745.32), ("151M", 955.16), ("302M", 1393.73)])
def test_critical_batch_sizes(shared, model, expected):
    table = pd.read_csv(shared / "data" / "critical_batch_size" / "steps_to_target.csv").query(
        "model == @model"
    )
    found = critical_batch(table.batch_size_seqs, table.steps_to_target)
    assert found["at_overhead"] + 1.2 * 256 == pytest.approx(expected, abs=0.006)
    if model == "85M":
        assert found["smin"] == pytest.approx(1293.83, abs=0.01) and found["emin"] == pytest.approx(
            2834258, rel=1e-6
        )


def test_steps_and_examples_obey_the_hyperbola():
    batch = np.geomspace(10, 1e4, 9)
    steps, examples = steps_and_examples(500.0, 1000.0, batch)
    assert (steps / 1000 - 1) * (examples / (1000 * 500) - 1) == pytest.approx(np.ones(9))
    assert minimum_steps(steps, batch, 500.0) == pytest.approx(np.full(9, 1000.0))


def test_speedup_inverts_the_baseline():
    d = np.geomspace(1e8, 1e10, 9)
    baseline = {
        "tokens": d,
        "loss": law("power-data").predict({"E": 2.0, "B": 500, "beta": 0.33}, {"tokens": d}),
    }
    reached = law("power-data").predict(
        {"E": 2.0, "B": 500, "beta": 0.33}, {"tokens": np.array([1.4e9, 3e10])}
    )
    table = speedup(baseline, np.array([1e9, 1e10]), [*reached][:2])
    assert table.speedup.to_numpy() == pytest.approx([1.4, 3.0], rel=1e-3)
    assert table.extrapolated.tolist() == [False, True]
    assert np.isinf(speedup(baseline, np.array([1e9]), [1.0]).speedup[0])


def test_wrong_requests():
    with pytest.raises(BadInput, match="batch_tokens missing"):
        best_settings(bowls().drop(columns="batch_tokens"))
    with pytest.raises(BadInput, match="at least two sizes"):
        fit_step_law(best_settings(bowls().query("params == 1e8")))
    with pytest.raises(BadInput, match="three different batch"):
        critical_batch(np.array([1, 2]), np.array([3, 4]))


def test_published_rates_differ_as_they_are_known_to():
    """Step Law over OpenEuroLLM: 3.1 times at 135 M and 10 B tokens, 1.7 at 7 B and 140 B, batches near."""
    from workbench.scaling.hyperparameters import PUBLISHED_ADVICE, open_euro_llm, step_law

    small, large = (135e6, 1e10), (7e9, 1.4e11)
    assert step_law(*small)[0] / open_euro_llm(*small)[0] == pytest.approx(3.1, abs=0.1)
    assert step_law(*large)[0] / open_euro_llm(*large)[0] == pytest.approx(1.7, abs=0.1)
    for cell in (small, large):
        assert step_law(*cell)[1] / open_euro_llm(*cell)[1] == pytest.approx(1, abs=0.225)
    assert PUBLISHED_ADVICE["DeepSeek (published)"](1e9, 1e10) == pytest.approx(
        (0.3118 * 6e19**-0.125, 0.292 * 6e19**0.3271)
    )
