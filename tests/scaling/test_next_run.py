"""The next run: pools and targets in words, ask and tell, what is refused, the instrument end to end."""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.names import catalog
from workbench.results import Result
from workbench.scaling import NextRun, Proposer, Runs, law
from workbench.scaling.comparison import compute_of
from workbench.scaling.proposing.cells import cells, points
from workbench.scaling.proposing.proposals import beliefs_of

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)
LAWS = ("chinchilla", "over-training")
POOL = "params=1e7:3e9:6, tokens=1e9:1e11:6"
TARGET = "params=7e9, tokens=1.4e11"
SMALL = dict(starts=32, resamples=60)


def table(noise=0.004, seed=2):
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 6), np.logspace(9, 10.5, 6)))
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d})
    return {
        "params": n,
        "tokens": d,
        "loss": loss * np.exp(noise * np.random.default_rng(seed).standard_normal(36)),
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def proposer():
    return Proposer(table(), LAWS, TARGET, POOL, **SMALL)


def test_points_in_words_are_a_grid_even_in_the_logarithm():
    grid = cells("params=1e6:1e8:3, tokens=2e9")
    assert grid.params.tolist() == pytest.approx([1e6, 1e7, 1e8]) and set(grid.tokens) == {2e9}
    assert grid.flops.tolist() == pytest.approx((6 * grid.params * 2e9).tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params", "pool: 'params' is not accepted, write"),
        ("parms=1e9", "pool: 'parms' is unknown; did you mean params"),
        ("params=x", "pool: 'params=x' is not accepted"),
        ("params=1e9:1e8:4", "0 < from < to"),
        ("params=1e8:1e9:1.5", "whole number"),
        ("params=1e8:1e9", "give a number, or from:to:how many"),
        ("params=1e8, params=1e9", "given twice"),
        ("params=1e6:1e9:1000, tokens=1e6:1e9:1000", "at most 100,000"),
        ("params=nan", "not accepted"),
        (" , ", "is empty"),
    ],
)
def test_words_that_are_no_points_are_refused(text, message):
    with pytest.raises(BadInput, match=message):
        cells(text, "pool")


def test_points_from_a_file_have_its_columns_by_their_other_names(tmp_path):
    file = tmp_path / "pool.csv"
    pd.DataFrame({"N": [1e7, 1e8], "D": [1e9, 2e9], "cost": [3.0, 4.0]}).to_csv(file, index=False)
    assert list(points(str(file), "pool")) == ["params", "tokens", "cost", "flops"]
    pd.DataFrame({"N": [1e7, -1.0], "D": [1e9, 2e9]}).to_csv(file, index=False)
    with pytest.raises(BadInput, match="pool: params: row 1 is -1.0"):
        points(str(file), "pool")
    with pytest.raises(BadInput, match="pool: '.*gone.csv' does not exist"):
        points(str(tmp_path / "gone.csv"), "pool")
    with pytest.raises(
        BadInput, match="target: bits: row 0 is 100.0, expected a number above 0 and at most 64"
    ):
        points("bits=100", "target")


def test_beliefs_hold_what_the_calibrated_band_holds(proposer):
    """Variance and scatter of one law are the square of its band's spread."""
    from dataclasses import replace

    alone = replace(proposer.stack, members=proposer.stack.members[:1], weights=np.ones(1))
    cell = cells(TARGET)
    beliefs = beliefs_of(alone, cell)
    _, spread = alone.components(cell)
    assert beliefs.variance() + beliefs.scatter() == pytest.approx(spread[0] ** 2)


def test_falls_of_a_law_that_is_linear_are_those_of_regression():
    """E + B log(tokens) fitted by squares: the proposal's falls from the draws' covariance, by hand."""
    draw = np.random.default_rng(0)
    tokens = np.geomspace(1e6, 1e9, 30)
    runs = {"tokens": tokens, "loss": 10 - 0.3 * np.log(tokens) + 0.01 * draw.normal(size=30)}
    linear = "E + B*log(tokens)"
    pool = {"tokens": np.geomspace(1e6, 1e8, 5), "cost": np.arange(1, 6)}
    from workbench.scaling import Objective

    made = Proposer(
        runs, (linear,), {"tokens": [1e11]}, pool, objective=Objective("squares", "linear"), **SMALL
    )
    member = made.stack.members[0]
    covariance = np.cov(member.drawn.theta.T, ddof=0)
    at = np.stack([np.log(pool["tokens"]), np.ones(5)], 1)  # B, E in the order of their names
    goal = np.array([np.log(1e11), 1.0])
    scale = (member.factor(0.9) / 1.6448536269514722) ** 2
    falls = (
        scale
        * (at @ covariance @ goal) ** 2
        / (np.einsum("ci,ij,cj->c", at, covariance, at) + member.scatter**2)
    )
    assert made.ask(1).pool.fall.to_numpy() == pytest.approx(falls, rel=1e-9)


def test_the_first_run_is_the_best_by_the_rule_and_all_fit_the_budget(proposer):
    asked = proposer.ask(3, budget=1e21)
    earns = asked.pool[(asked.pool.cost <= 1e21) & (asked.pool.narrows >= 0.01)]
    assert asked.table.candidate.iloc[0] == earns.per_cost.idxmax()
    total = proposer.ask(1, budget=1e21, rule="total")
    assert total.table.candidate.iloc[0] == asked.pool[asked.pool.cost <= 1e21].fall.idxmax()
    assert (
        asked.table.spent.iloc[-1] == pytest.approx(asked.table.cost.sum()) and asked.table.cost.sum() <= 1e21
    )
    assert asked.table.candidate.is_unique
    widths = [asked.half_width, *asked.table.half_width]
    assert (np.diff(widths) < 0).all()
    assert (asked.target.low_after > asked.target.low).all() and (
        asked.target.high_after < asked.target.high
    ).all()


def test_enough_is_said(proposer):
    assert "half-width is" in proposer.ask(3, width=10.0).note and len(proposer.ask(3, width=10.0).table) == 0
    dear = proposer.ask(2, budget=float(proposer.pool.cost.min()) * 0.5)
    assert len(dear.table) == 0 and "fits what is left of the budget" in dear.note
    small = proposer.ask(2, budget=float(proposer.pool.cost.min()) * 2)
    assert len(small.table) == 0 and "worth its cost" in small.note


def test_a_told_run_is_foretold_beside_observed_and_narrows_the_interval():
    made = Proposer(table(), LAWS, TARGET, POOL, **SMALL)
    before = made.ask(1, budget=1e21).half_width
    new = {"params": [3e9, 1e9], "tokens": [4e10, 1e11]}
    told = made.tell(new | {"loss": law("chinchilla").predict(TRUTH, new)})
    assert list(told) == ["predicted", "low", "high", "observed", "inside"] and told.inside.all()
    assert len(made.runs) == 38 and made.ask(1, budget=1e21).half_width < before
    with pytest.raises(BadInput, match="those that were made need column loss"):
        made.tell(new)


def test_noise_free_runs_are_recovered_and_no_run_is_worth_its_cost():
    made = Proposer(table(0.0), ("chinchilla",), TARGET, POOL, **SMALL)
    found = made.stack.members[0].fit.params
    assert [found[k] for k in TRUTH] == pytest.approx(list(TRUTH.values()), rel=1e-6)
    asked = made.ask(2)
    assert asked.half_width < 1e-6 and len(asked.table) == 0 and "known to rounding" in asked.note


def refused(message, runs=None, laws=LAWS, pool=POOL, target=TARGET):
    with pytest.raises(BadInput, match=message):
        Proposer(table() if runs is None else runs, laws, target, pool, **SMALL)


def test_what_cannot_be_planned_is_said_so():
    flat = table() | {"loss": np.full(36, 2.5)}
    refused("NOT converged.*there is no plan", flat)
    refused("NOT converged.*there is no plan", laws=("E + F + A/params**alpha",))
    refused("pool: every candidate has params 1e.08.*no plan", pool="params=1e8, tokens=1e9:1e11:4")
    refused("params: every run has 1e.08.*no plan", table() | {"params": np.full(36, 1e8)})
    refused(r"law E \+ F.*NOT conv", laws=("E + F + A/params**alpha", "chinchilla"))
    refused("target: needs column tokens of law chinchilla", target="params=1e9")
    refused("pool: needs column tokens of law chinchilla", pool="params=1e7:1e9:4")
    refused("law: 'chinchila' is unknown; did you mean chinchilla", laws=("chinchila",))
    refused("pool: cost of row 1", pool={"params": [1e7, 1e8], "tokens": [1e9, 1e9], "cost": [1.0, 0.0]})
    refused("pool: no cost", laws=("power-params",), pool={"params": [1e7, 1e8]})
    refused("cannot determine", {k: v[::7][:4] for k, v in table().items()}, ("chinchilla",))


def test_the_instrument_end_to_end(tmp_path):
    runs = Runs.from_table(table())
    assert catalog()["next-run"] is NextRun
    result = NextRun(batch=2, against=("over-training",), **SMALL).run(runs)
    assert result.facts["half_width_after"] < result.facts["half_width"] and len(result.table) >= 1
    assert result.facts["low"] < result.facts["predicted"] < result.facts["high"]
    assert result.tables["target"].flops.iloc[0] == pytest.approx(10 * compute_of(runs.table).max())
    assert result.tables["pool"].cost.max() <= result.tables["target"].flops.iloc[0] / 3
    again = Result.load(result.save(tmp_path / "saved"))
    for view in ("pool", "target", "laws"):
        figure = again.figure(view=view)
        assert len(figure.data) >= 2 and figure.layout.title.text and figure.layout.xaxis.title.text
    with pytest.raises(BadInput, match="view"):
        again.figure(view="pie")


def test_a_changed_pool_file_is_another_question(tmp_path):
    runs, file = Runs.from_table(table()), tmp_path / "pool.csv"
    pd.DataFrame({"params": [1e7, 1e9], "tokens": [1e9, 1e11]}).to_csv(file, index=False)
    ask = NextRun(pool=str(file))
    first = ask.key(runs)
    pd.DataFrame({"params": [1e7, 2e9], "tokens": [1e9, 1e11]}).to_csv(file, index=False)
    assert ask.key(runs) != first


def test_the_command_line_prints_the_runs_and_refuses_in_one_line(tmp_path, capsys):
    from workbench.cli import main

    file = tmp_path / "runs.csv"
    pd.DataFrame(table()).to_csv(file, index=False)
    given = ["run", "next-run", "--runs", str(file), "--against", "over-training", "--starts", "32"]
    assert main([*given, "--resamples", "40", "--target", TARGET, "--pool", POOL, "--batch", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("next-run: proposed") and "narrows" in told and "half_width" in told
    assert main([*given, "--pool", "params=1e8, tokens=1e9:1e10:3"]) == 2
    assert "every candidate has params" in capsys.readouterr().err
