"""The Kaplan recipe recovers its own constants and predicts a larger model's curve at a batch size never
seen.
"""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import BadInput
from workbench.scaling.kaplan import contours, kaplan_recipe

TRUE = {"Nc": 6.5e13, "alpha_n": 0.077, "Sc": 2100.0, "alpha_s": 0.76, "Bstar": 2e8, "alpha_b": 0.21}


def curve(params, batch, steps):
    """The loss that solves both relations, by fixed-point iteration (independent of the code under test)."""
    loss = np.full(len(steps), 5.0)
    for _ in range(400):
        critical = TRUE["Bstar"] / loss ** (1 / TRUE["alpha_b"])
        new = (TRUE["Nc"] / params) ** TRUE["alpha_n"] + (
            TRUE["Sc"] * (1 + critical / batch) / steps
        ) ** TRUE["alpha_s"]
        loss = 0.7 * loss + 0.3 * new
    return loss


@pytest.fixture(scope="module")
def small_runs():
    steps = np.unique(np.geomspace(300, 60_000, 60).astype(int)).astype(float)
    rows = [
        pd.DataFrame({"params": n, "batch_tokens": b, "step": steps, "loss": curve(n, b, steps)})
        for n in (1e6, 4e6, 1.6e7)
        for b in (3e4, 1e5, 3e5, 1e6)
    ]
    return pd.concat(rows, ignore_index=True)


def test_constants_come_back(small_runs):
    recipe = kaplan_recipe(small_runs)
    assert recipe.critical.params["alpha_b"] == pytest.approx(TRUE["alpha_b"], rel=0.02)
    assert recipe.steps.params["alpha_s"] == pytest.approx(TRUE["alpha_s"], rel=0.01)
    assert recipe.steps.params["alpha_n"] == pytest.approx(TRUE["alpha_n"], rel=0.01)
    assert (recipe.contours.r_squared > 0.99).all()
    assert (
        recipe.contours.groupby("params").critical.apply(lambda c: c.is_monotonic_increasing).all()
    )  # rises as the loss falls


def test_a_larger_model_is_predicted_before_it_is_trained(small_runs):
    steps = np.geomspace(500, 1e5, 40)
    predicted = kaplan_recipe(small_runs).predict(6.4e7, 2e5, steps)
    assert np.max(np.abs(predicted / curve(6.4e7, 2e5, steps) - 1)) < 0.01


def test_wrong_requests(small_runs):
    with pytest.raises(BadInput, match="batch_tokens missing"):
        kaplan_recipe(small_runs.drop(columns="batch_tokens"))
    with pytest.raises(BadInput, match="at least 3"):
        kaplan_recipe(small_runs[small_runs.batch_tokens < 2e5])
    with pytest.raises(BadInput, match="no loss is reached"):
        contours(small_runs, [0.1])
