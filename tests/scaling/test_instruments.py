"""The instruments end to end: results, saving, figures, the command line, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.names import catalog
from workbench.results import Result
from workbench.scaling import Runs, ScalingFit, ScalingPlan, law

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs():
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9.5, 6), np.logspace(9, 11, 6)))
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d}) * np.exp(
        0.003 * np.random.default_rng(0).standard_normal(36)
    )
    return Runs.from_table({"params": n, "tokens": d, "loss": loss})


def test_they_are_in_the_catalog():
    assert catalog()["scaling-fit"] is ScalingFit and catalog()["scaling-plan"] is ScalingPlan


def test_fit_result_survives_saving_and_draws_every_view(runs, tmp_path):
    result = ScalingFit(starts=64, resamples=50, intervals="profile").run(runs)
    assert result.facts["converged"] and result.facts["alpha"] == pytest.approx(0.35, abs=0.03)
    assert set(result.table.parameter) == {"E", "A", "B", "alpha", "beta"}
    assert ((result.table.low <= result.table.estimate) & (result.table.estimate <= result.table.high)).all()
    assert {
        "runs",
        "influence",
        "held_out",
        "extrapolation",
        "comparison",
        "curves",
        "contour",
        "correlation",
        "optima",
    } <= set(result.tables)
    again = Result.load(result.save(tmp_path / "saved"))
    assert again.facts["objective"] == result.facts["objective"]
    for view in ("fit", "residuals", "isoflop", "contour", "held out", "draws", "profile"):
        figure = again.figure(view=view)
        assert len(figure.data) and figure.layout.title.text
    assert again.view_model()().view == "fit"
    with pytest.raises(BadInput, match="view"):
        again.figure(view="pie")


def test_same_question_same_answer(runs):
    first = ScalingFit(starts=64, resamples=50, against=()).run(runs, cache=False)
    second = ScalingFit(starts=64, resamples=50, against=()).run(runs, cache=False)
    assert first.facts == second.facts
    pd.testing.assert_frame_equal(first.table, second.table)


def test_cutoff_fits_below_and_predicts_above(runs):
    cutoff = float(np.quantile(runs.table.flops, 0.7))
    result = ScalingFit(starts=64, resamples=50, against=(), fit_below=cutoff).run(runs)
    assert result.facts["runs"] + result.facts["held_out_runs"] == 36
    table = result.tables["runs"]
    assert (table.flops[table.fitted] <= cutoff).all() and (table.flops[~table.fitted] > cutoff).all()
    assert (
        result.facts["held_out_error"] == pytest.approx(np.abs(table.error[~table.fitted]).mean())
        and result.facts["held_out_error"] < 0.02
    )


def test_excluded_rows_change_nothing_but_the_fit(runs):
    table = runs.table.copy()
    table.loc[4, "loss"] *= 1.5
    spoiled = Runs(table)
    clean = ScalingFit(starts=64, resamples=50, against=(), exclude=(4,)).run(spoiled)
    assert clean.facts["runs"] == 35 and not clean.tables["runs"].fitted[4]
    spoilt = ScalingFit(starts=64, resamples=50, against=(), objective="squares").run(spoiled)
    assert spoilt.tables["influence"].row[0] == 4
    assert clean.facts["rmse"] < spoilt.facts["rmse"] / 5


def test_own_formula_through_the_instrument(runs):
    result = ScalingFit(
        law="floor + a * params**(-p) + b * tokens**(-q)", starts=128, resamples=50, against=("chinchilla",)
    ).run(runs)
    assert result.facts["converged"]
    reference = ScalingFit(starts=128, resamples=50, against=()).run(runs)
    assert result.facts["objective"] == pytest.approx(reference.facts["objective"], rel=1e-4)


def test_plan(runs):
    result = ScalingPlan(starts=64, resamples=50, flops=1e24, inference_tokens=1e12).run(runs)
    row = result.table.set_index("quantity")
    assert row.estimate["params"] * row.estimate["tokens"] * 6 == pytest.approx(1e24)
    assert row.low["params"] <= row.estimate["params"] <= row.high["params"]
    assert result.facts["beyond_largest_run"] == pytest.approx(1e24 / runs.table.flops.max())
    for view in ("frontier", "over-training", "trajectory"):
        assert len(result.figure(view=view).data)
    hours = ScalingPlan(starts=64, resamples=50, gpu_hours=1000, peak_flops=1e15, utilisation=0.4)
    assert hours.budget(runs) == pytest.approx(1000 * 3600 * 4e14)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"law": "chinchila"}, "did you mean chinchilla"),
        ({"law": "routed"}, "needs column experts"),
        ({"fit_below": 1.0}, "0 of 36 rows remain"),
        ({"exclude": (99,)}, "row 99 does not exist"),
        ({"drop_highest": 40}, "drop_highest"),
        ({"law": "E + A*__import__(params)"}, "__import__.* is not available"),
        ({"level": 2}, "level"),
        ({"startz": 3}, "did you mean starts"),
    ],
)
def test_wrong_fit_requests(runs, fields, message):
    with pytest.raises(BadInput, match=message):
        ScalingFit(**fields).run(runs)


def test_a_cut_off_that_holds_nothing_out_says_so(runs):
    found = ScalingFit(fit_below=1e40, starts=64, resamples=50, against=(), checks=False).run(runs)
    assert found.facts["held_out_runs"] == 0 and "held_out_error" not in found.facts


def test_one_model_size_is_refused_with_the_reason(runs):
    one = runs.where(runs.table.params == runs.table.params[0])
    with pytest.raises(BadInput, match=r"params: every fitted run has 1e.07"):
        ScalingFit().run(one)
    assert ScalingFit(law="power-data", starts=64, resamples=50, against=()).run(one).facts["runs"] == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flops": 1e20, "money": 3.0}, "exactly one"),
        ({"gpu_hours": 3.0}, "peak_flops"),
        ({"law": "power-data"}, "cannot divide a budget"),
    ],
)
def test_wrong_plan_requests(runs, fields, message):
    with pytest.raises(BadInput, match=message):
        ScalingPlan(**fields).run(runs)


def test_command_line_with_other_column_names(tmp_path, runs, capsys):
    from workbench.cli import main

    table = runs.table.rename(columns={"params": "size", "loss": "final nats"}).drop(columns="flops")
    file = tmp_path / "mine.csv"
    table.to_csv(file, index=False)
    columns = "params=size, loss=final nats"
    assert (
        main(
            [
                "run",
                "scaling-fit",
                "--runs",
                str(file),
                "--columns",
                columns,
                "--starts",
                "64",
                "--resamples",
                "50",
                "--out",
                str(tmp_path / "fit"),
            ]
        )
        == 0
    )
    assert "converged" in capsys.readouterr().out
    assert Result.load(tmp_path / "fit").facts["runs"] == 36
    assert (
        main(
            [
                "run",
                "scaling-plan",
                "--runs",
                str(file),
                "--columns",
                columns,
                "--flops",
                "1e23",
                "--starts",
                "64",
                "--resamples",
                "50",
                "--out",
                str(tmp_path / "plan"),
            ]
        )
        == 0
    )
    assert main(["run", "scaling-fit", "--runs", str(file)]) == 2
    assert "needs column params" in capsys.readouterr().err


def test_a_law_of_ones_own_stands_beside_those_that_ship(runs, monkeypatch):
    from workbench.axis import Options
    from workbench.scaling import LAW, Law, laws

    monkeypatch.setattr(LAW, "_entries", dict(LAW.entries))

    @LAW.add("mine", title="Mine", formula="E + A / N^alpha", source="here")
    def mine(options: Options) -> Law:
        return Law.from_formula("E + A / params**alpha", parameters={"E": (0.5, 3), "A": (1, 1e4)})

    shape = law("mine")
    assert (shape.name, shape.title, shape.source, shape.columns) == ("mine", "Mine", "here", ("params",))
    assert "mine" in laws() and "formula" not in laws()
    one = ScalingFit(law="mine", starts=32, resamples=20, checks=False)
    assert one.run(runs, cache=False).facts["law"] == "mine"
    other = one.with_fields(law="power-params")
    assert one.code() != other.code() and one.code() != one.with_fields(against=("precision",)).code()


def test_a_formula_is_a_law_and_an_objective_has_its_own_options(runs):
    made = ScalingFit(law="E + A/params**alpha")
    assert made.law == "E + A/params**alpha" and made.law.name == "formula"
    assert made.model_dump(mode="json")["law"] == "E + A/params**alpha"
    assert ScalingFit(law={"name": "formula", "text": "E + A/params**alpha"}) == made
    assert ScalingFit(**{"objective.delta": 0.1}).objective_for(law("chinchilla")).delta == 0.1
    with pytest.warns(FutureWarning, match=r"write objective\.delta"):
        assert ScalingFit(delta=0.1).objective.options.delta == 0.1
    with pytest.raises(BadInput, match=r"objective\.delta: squares has no such option"):
        ScalingFit(**{"objective": "squares", "objective.delta": 0.1})
    with pytest.raises(BadInput, match="did you mean huber"):
        ScalingFit(objective="hubr")
