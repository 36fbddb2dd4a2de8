"""Laws of more than size and data: noise-free tables recovered, published constants against the tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from workbench.errors import BadInput
from workbench.scaling import Objective, Runs, ScalingFit, fit, law

DATA = ROOT.parent / "shared" / "data" / "scalebench"
ABSENT = pytest.mark.skipif(not DATA.exists(), reason="public run tables are not beside the checkout")
FARSEER = {"s": -0.062465473, "q": 0.13, "K": np.exp(0.1284880679442551), "B": 230.73437075885855}
FARSEER |= {"b": 0.1729, "J": np.exp(-1.544209554), "A": -1.665630816, "a": 0.0459, "E": 3.133347198805445}
DRAWN = (
    "parallel-streams",
    "vocabulary",
    "granularity",
    "joint-experts",
    "upcycling",
    "upcycling-size",
    "rate-surface",
    "data-mixing",
    "domain-sum",
    "accuracy-of-loss",
    "error-of-loss",
    "farseer",
)


def script():
    """The module that draws the tables, with the constants."""
    import importlib.util

    file = Path(ROOT, "data", "runs", "draw_from_laws.py")
    spec = importlib.util.spec_from_file_location("draw_from_laws", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", DRAWN)
def test_a_noise_free_table_is_recovered(name):
    made, shape = script(), law(name)
    columns = made.table(name)
    exact = columns | {shape.target: shape.predict(made.CONSTANTS[name], columns)}
    found = fit(shape, exact, starts=128)
    assert found.certificate.converged
    assert found.params == pytest.approx(made.CONSTANTS[name], rel=1e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_the_shipped_table_is_what_is_drawn(name):
    shipped = Runs.open(f"drawn/{name}").table
    for column, values in script().table(name).items():
        assert shipped[column].to_numpy() == pytest.approx(values, rel=1e-6)


def scalebench(name):
    return pd.concat(
        [pd.read_csv(DATA / f"{name}_{part}.csv") for part in ("train", "test")], ignore_index=True
    )


@ABSENT
def test_farseers_published_constants_predict_its_table():
    table = scalebench("farseer").rename(columns={"N": "params", "D": "tokens"})
    error = np.abs(law("farseer").predict(FARSEER, table) / table.loss - 1)
    assert error.mean() < 0.003 and error.max() < 0.015


@ABSENT
@pytest.mark.parametrize(
    ("group", "published"),
    [
        ("pile", {"E": 1.288766, "A": 1.973498e8, "k": 0.334456, "alpha": 0.196333}),
        ("stack", {"E": 0.691237, "A": 1.130616e7, "k": 0.393463, "alpha": 0.189371}),
    ],
)
def test_the_published_fits_of_parallel_streams_are_reproduced(group, published):
    table = scalebench("parallel")
    table = table[table.group == group].rename(columns={"num_params": "params", "parallel_size": "streams"})
    found = fit(law("parallel-streams"), table, Objective(), starts=64)
    assert found.params == pytest.approx(published, rel=2e-3)


def test_routing_with_one_expert_is_a_dense_model():
    """E = 1: the effective number of experts is Estart, and the law is Chinchilla's with moved constants."""
    made = script().CONSTANTS["joint-experts"]
    start = made["Estart"]
    columns = {"active_params": np.array([1e8, 1e9]), "tokens": np.array([1e10, 2e10])}
    got = law("joint-experts").predict(made, columns | {"experts": np.ones(2)})
    size = columns["active_params"] ** (made["alpha"] + made["gamma"] * np.log(start))
    data = columns["tokens"] ** (made["beta"] + made["zeta"] * np.log(start))
    by_hand = (
        made["c"] + made["a"] * start ** made["delta"] * size + made["b"] * start ** made["omega"] * data
    )
    assert got == pytest.approx(by_hand, rel=1e-12)


def test_the_surface_is_lowest_where_step_law_says():
    made = script().CONSTANTS["rate-surface"]
    cell = {"params": np.array([1e9]), "tokens": np.array([2e10])}
    rate, batch = 1.79 * 1e9**-0.713 * 2e10**0.307, 0.58 * 2e10**0.571
    lowest = law("rate-surface").predict(made, cell | {"learning_rate": rate, "batch_tokens": batch})
    assert lowest == pytest.approx(
        law("chinchilla").predict({k: made[k] for k in ("E", "A", "B", "alpha", "beta")}, cell)
    )
    double = law("rate-surface").predict(made, cell | {"learning_rate": 2 * rate, "batch_tokens": batch})
    assert double - lowest == pytest.approx(made["h"] * np.log(2) ** 2)


def test_mixtures_have_as_many_domains_as_are_asked_for():
    from workbench.scaling.formulas.lawbook import LAW

    three = law(LAW.chosen({"name": "data-mixing", "domains": 3}, "law"))
    assert three.columns == ("proportion_1", "proportion_2", "proportion_3") and len(three.free) == 4
    with pytest.raises(BadInput, match="domains"):
        LAW.chosen({"name": "data-mixing", "domains": 1}, "law")


def test_two_steps_from_size_to_accuracy():
    """A law of the task's loss, then one of the accuracy: noise-free, both predict a larger model."""
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 5), np.logspace(9, 11, 5)))
    first = {"E": 0.5, "A": 6.0, "B": 40.0, "alpha": 0.2, "beta": 0.25}
    second = {"a": -0.6, "k": 6.0, "L0": 0.9, "b": 0.95}
    runs = {"params": n, "tokens": d}
    runs["loss"] = runs["task_loss"] = law("chinchilla").predict(first, runs)
    runs["accuracy"] = law("accuracy-of-loss").predict(second, runs)
    losses, accuracies = (
        fit(law("chinchilla"), runs, starts=64),
        fit(law("accuracy-of-loss"), runs, starts=64),
    )
    large = {"params": np.array([7e9]), "tokens": np.array([4e12])}
    predicted = accuracies.predict({"task_loss": losses.predict(large)})
    exact = law("accuracy-of-loss").predict(second, {"task_loss": law("chinchilla").predict(first, large)})
    assert predicted == pytest.approx(exact, rel=1e-6)


def test_an_accuracy_is_fitted_by_the_instrument(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    asked = ScalingFit(law="accuracy-of-loss", starts=32, resamples=30, checks=False, against=())
    assert asked.run(Runs.open("drawn/accuracy-of-loss")).facts["converged"]
