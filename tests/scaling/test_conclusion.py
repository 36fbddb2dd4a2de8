"""A scaling report concludes what its fit can bear: a plan with intervals, or a warning in its place."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.progress import Progress
from workbench.results import Result
from workbench.scaling import Runs, ScalingFit, ScalingPlan, law
from workbench.scaling.conclusion import better_law, conclusion, doubt_of

TRUTH = dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37)


@pytest.fixture(scope="module")
def runs() -> Runs:
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 5), np.logspace(9, 11, 5)))
    loss = law("chinchilla").predict(TRUTH, {"params": n, "tokens": d})
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(25))
    return Runs.from_table({"params": n, "tokens": d, "loss": loss * noise})


def test_a_plan_is_said_with_its_budget_and_its_intervals(runs: Runs) -> None:
    settings = dict(law="chinchilla", starts=32, resamples=20, checks=False, against=())
    fitted = ScalingFit(**settings).run(runs, Progress(), cache=False)
    planned = ScalingPlan(**settings, flops=1e22).run(runs, Progress(), cache=False)
    short = conclusion(fitted, planned)
    assert short.warning == "" and "role" not in short._repr_html_()
    assert short.sentences[0].startswith("chinchilla fits 25 runs within 0.2")
    assert "1e+22 FLOPs" in short.sentences[1]
    assert list(short.table.columns) == ["estimate", "low", "high"]
    assert list(short.table.index[:2]) == ["parameters", "training tokens"]
    assert len(conclusion(fitted).table) == 0


def stand_in(errors: dict[str, float], certificates: dict[str, str], converged: bool = True) -> Result:
    table = pd.DataFrame(
        {
            "law": list(errors),
            "held_out_error": list(errors.values()),
            "certificate": list(certificates.values()),
        }
    )
    text = certificates["chinchilla"]
    facts = {"law": "chinchilla", "runs": 36, "rmse": 0.01, "certificate": text, "converged": converged}
    return Result(ScalingFit(), pd.DataFrame(), facts, {"comparison": table})


def test_a_fit_that_did_not_converge_is_a_warning_that_names_the_law_to_take() -> None:
    undone = "NOT converged: E without any effect"
    found = stand_in(
        {"chinchilla": 0.25, "kaplan": 0.05, "power-compute": 0.02},
        {"chinchilla": undone, "kaplan": "converged", "power-compute": undone},
        converged=False,
    )
    assert better_law(found) == ("kaplan", 0.05, 0.25)  # the nearest of all did not converge either
    short = conclusion(found)
    assert (
        "did not converge (E without any effect)" in short.warning and "fit kaplan instead" in short.warning
    )
    assert 'role="alert"' in short._repr_html_()
    assert short.sentences[-1] == "kaplan predicts held-out larger runs better: 5 % against 25 %."
    assert "such as kaplan" in doubt_of(found.facts)


def test_the_best_law_is_not_argued_with() -> None:
    found = stand_in({"chinchilla": 0.02, "kaplan": 0.05}, {"chinchilla": "converged", "kaplan": "converged"})
    assert better_law(found) is None and conclusion(found).warning == ""
