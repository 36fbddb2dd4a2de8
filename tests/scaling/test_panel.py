"""The scaling panel without a browser: every control changes what it should and nothing else."""

import numpy as np
import pytest

from widgets.scaling import ScalingPanel
from workbench.errors import BadInput
from workbench.scaling import Runs, fit, law

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)


@pytest.fixture
def panel():
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9.5, 6), np.logspace(9, 11, 6)))
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d}) * np.exp(
        0.003 * np.random.default_rng(0).standard_normal(36)
    )
    loss[20] *= 1.3
    return ScalingPanel(Runs.from_table({"params": n, "tokens": d, "loss": loss}))


def point_of(panel, row):
    for number, trace in enumerate(panel.plot.figure.data):
        if trace.customdata is not None and row in np.asarray(trace.customdata).ravel():
            return {
                "trace": number,
                "point": int(np.flatnonzero(np.asarray(trace.customdata).ravel() == row)[0]),
                "x": 0,
                "y": 0,
            }
    raise AssertionError(f"run {row} is not in the figure")


def test_it_opens_with_a_fit(panel):
    assert "36 runs fitted: converged" in panel.note.value
    assert panel.result.facts["alpha"] == pytest.approx(0.35, abs=0.05)
    assert "N* <b>" in panel.plan.value and len(panel.plot.figure.data) > 3


@pytest.mark.parametrize("view", ["fit", "residuals", "contour"])
def test_a_click_drops_a_run_and_a_second_click_brings_it_back(panel, view):
    panel.view.value = view
    panel.plot.clicked = point_of(panel, 20)
    assert (
        panel.dropped == {20}
        and "35 runs fitted; 1 dropped" in panel.note.value
        and panel.plot.clicked is None
    )
    keep = np.arange(36) != 20
    direct = fit(
        law("chinchilla"), {c: panel.runs.table[c].to_numpy()[keep] for c in ("params", "tokens", "loss")}
    )
    assert panel.result.facts["objective"] == pytest.approx(direct.objective_value, rel=1e-6)
    panel.plot.clicked = point_of(panel, 20)
    assert panel.dropped == set() and "36 runs fitted" in panel.note.value
    panel.plot.clicked = {"trace": 0, "point": 1, "x": 0, "y": 0}  # a curve when there is one, no run
    assert panel.dropped in (set(), {1})


def test_cutoff_fits_below_and_shows_the_error_above(panel):
    panel.cutoff.value = float(np.quantile(panel.runs.table.flops, 0.7))
    assert panel.result.facts["held_out_runs"] == (panel.runs.table.flops > panel.cutoff.value).sum()
    assert "held-out error" in panel.facts.value
    panel.cutoff.value = 10**panel.cutoff.max
    assert "held-out error" not in panel.facts.value


def test_budget_moves_the_plan_without_refitting(panel):
    fitted, before = panel.result, panel.plan.value
    panel.budget.value *= 100
    assert panel.result is fitted and panel.plan.value != before


def test_laws_and_mistakes_are_said_in_words(panel):
    panel.law.value = "E + A/params**a + B/tokens**b"
    assert panel.result.facts["law"] == "custom"
    panel.law.value = "chinchila"
    assert "did you mean chinchilla" in panel.note.value and "wb-error" in panel.note.value
    panel.law.value = "power-data"
    assert "cannot divide a budget" in panel.plan.value
    panel.law.value = "chinchilla"
    panel.dropped = set(range(33))
    panel.objective.value = "squares"
    assert "3 of 36 rows remain" in panel.note.value
    panel.restore.click()
    assert panel.dropped == {*()} and "36 runs fitted" in panel.note.value
    assert panel.instrument.exclude == ()


def test_a_law_without_its_columns_is_refused(panel):
    with pytest.raises(BadInput, match="law routed: needs column experts"):
        ScalingPanel(panel.runs, law="routed")


def ghosts(panel):
    return [t for t in panel.plot.figure.data if t.name == "next run (not made)"]


def test_the_next_run_is_a_ghost_on_the_fit_until_the_fit_changes(panel):
    panel.following.laws["kaplan"].value = False
    panel.following.job.start()
    panel.following.job.wait()
    result = panel.following.result
    assert result is not None and "kaplan" not in set(result.tables["laws"].law)
    assert "would narrow the interval" in panel.following.answer.value
    drawn = ghosts(panel)
    assert drawn[0].x[0] == result.table.tokens[0] and drawn[0].y[0] == result.table.predicted[0]
    assert "narrows the interval by" in drawn[0].hovertext[0]
    panel.view.value = "laws"
    assert any(t.name and "weight" in t.name for t in panel.plot.figure.data)
    panel.view.value = "fit"
    panel.following.laws["over-training"].value = False
    assert panel.following.result is None and ghosts(panel) == [] and panel.following.answer.value == ""


def test_a_law_that_divides_no_budget_has_no_next_run(panel):
    panel.law.value = "power-data"
    panel.following.job.start()
    panel.following.job.wait()
    assert "cannot divide a budget" in panel.following.job.note.value
