"""The critical batch size: steps to a loss, the hyperbola on published and synthetic steps,
the noise scale beside it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.training.test_loop import small
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.tasks import CustomLoss
from workbench.training import CriticalBatch
from workbench.training.studies.critical_batch import fastest, steps_to_target


def larger() -> Subject:
    return small(count=120)


@pytest.mark.parametrize(
    ("model", "target", "expected"), [("85M", 3.42, 745.32), ("151M", 3.24, 955.16), ("302M", 3.07, 1393.73)]
)
def test_published_steps_to_a_loss(shared: Path, model: str, target: float, expected: float) -> None:
    """The panel's own code on published runs: steps a + b / B in log space,
    20 % more examples than a batch of 256 costs.
    """
    runs = pd.read_csv(shared / "data" / "critical_batch_size" / "steps_to_target.csv").query(
        "model == @model"
    )
    table = pd.DataFrame({"batch_size": runs.batch_size_seqs, "steps_to_target": runs.steps_to_target})
    result = CriticalBatch(target=target, reference=256, overhead=0.2).summarise(table)
    facts = result.facts
    assert facts["at_overhead"] == pytest.approx(expected, abs=0.006)
    assert facts["critical_batch"] == pytest.approx((expected - 1.2 * 256) * 5, abs=0.03)
    if model == "85M":
        assert facts["smin"] == pytest.approx(1293.83, abs=0.01) and facts["emin"] == pytest.approx(
            2834258, rel=1e-6
        )
    assert (
        facts["critical_batch_low"] < facts["critical_batch"] < facts["critical_batch_high"]
        and facts["at_overhead_low"] < expected < facts["at_overhead_high"]
    )
    names = [trace.name for trace in result.figure().data]
    assert names == ["fastest rate", "hyperbola"] and len(result.figure(show="trade-off").data) == 3


def test_steps_to_a_known_loss() -> None:
    """0.5 w^2 by gradient descent of rate 0.1: the loss falls by 0.81 a step, so log(target / first)
    / log(0.81) steps.
    """
    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(weight.weight)
    columns = {"inputs": torch.ones(8, 1)}
    on = Subject(
        "parabola",
        weight,
        CustomLoss(lambda output, batch: 0.5 * output.square().mean()),
        {"train": columns, "validation": columns},
    )
    made = {"batch_size": 8, "learning_rate": 0.1, "optimizer": {"name": "sgd", "momentum": 0.0}}
    found, run = steps_to_target(on.copy(), 0.5 * 0.81**7, 100, **made)
    assert found == pytest.approx(7, abs=1e-3) and run.step in (7, 8)
    assert steps_to_target(on.copy(), 0.5 * 0.81**50, 20, **made)[0] == math.inf


def test_the_fastest_rate_of_each_batch_size() -> None:
    rows = [
        (4, 0.1, 0, 90.0),
        (4, 0.1, 1, 110.0),
        (4, 0.2, 0, 60.0),
        (4, 0.2, 1, math.nan),
        (4, 0.4, 0, 200.0),
        (4, 0.4, 1, 200.0),
        (8, 0.1, 0, math.nan),
        (8, 0.1, 1, 1.0),
    ]
    found = fastest(pd.DataFrame(rows, columns=["batch_size", "lr", "seed", "steps_to_target"]))
    assert found.to_dict("records") == [
        {"batch_size": 4, "lr": 0.1, "steps_to_target": 100.0, "examples": 400.0, "inside": False}
    ]


def test_both_estimates_in_one_run(cache: Path) -> None:
    """Live while it runs; the noise scale is measured on the way to the loss,
    the steps to it fall with the batch size.
    """

    class Watching(Progress):
        previews = 0

        def preview(self, result: Result) -> None:
            self.previews += 1
            assert result.figure() is not None

    progress = Watching()
    study = CriticalBatch(
        target=0.6,
        batch_sizes=(5, 20, 60),
        learning_rate_low=1e-2,
        learning_rate_high=4e-2,
        learning_rate_points=3,
        examples=2000,
        steps=60,
        noise_groups=8,
        noise_size=8,
        workers=1,
        resamples=50,
    )
    result = study.run(larger(), progress=progress)
    assert progress.previews >= 9 and result.facts["runs"] == 9 and result.facts["reached"] >= 3
    best = result.tables["best"]
    assert (
        best.steps_to_target.is_monotonic_decreasing
        and (best.examples == best.batch_size * best.steps_to_target).all()
    )
    assert (
        result.facts["critical_batch_low"]
        <= result.facts["critical_batch"]
        <= result.facts["critical_batch_high"]
    )
    noise = result.tables["noise"]
    assert (
        noise.step.is_monotonic_increasing
        and noise.loss.is_monotonic_decreasing
        and result.facts["noise_scale"] in noise.noise_scale.to_numpy()
    )
    for shown in ("steps", "trade-off", "noise"):
        assert result.figure(show=shown).data


def test_nothing_reached_and_wrong_requests(cache: Path) -> None:
    common = dict(
        batch_sizes=(5, 20, 60),
        learning_rate_low=1e-6,
        learning_rate_high=1e-6,
        learning_rate_points=1,
        examples=16,
        steps=10,
        noise_groups=4,
        noise_size=4,
        workers=1,
    )
    result = CriticalBatch(target=0.1, **common).run(larger())
    assert (
        result.facts["reached"] == 0
        and "critical_batch" not in result.facts
        and np.isnan(result.table.steps_to_target).all()
    )
    assert not result.figure().data and not result.figure(show="noise").data
    with pytest.raises(BadInput, match="target: 50 nats are reached before"):
        CriticalBatch(target=50.0, **common).run(larger())
    with pytest.raises(BadInput, match="three different"):
        CriticalBatch(target=0.1, **common | {"batch_sizes": (5, 5, 20)}).run(larger())
    with pytest.raises(BadInput, match="noise_groups"):
        CriticalBatch(target=0.1, **common | {"noise_groups": 100}).run(larger())
