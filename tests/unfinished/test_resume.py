"""Kind: what trains can be interrupted at any step; the same run, asked for again, goes on from there and
ends where an uninterrupted one does, bit for bit, in everything it reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import workbench
from tests.unfinished.stopping import Stopped
from workbench.progress import Progress
from workbench.pruning import Prune, Subtune, TrainSparse
from workbench.quantization import TrainQuantized
from workbench.results import Result
from workbench.training import Train
from workbench.training.loop import Training
from workbench.unfinished import left_behind

TIMED = ("seconds", "items_per_second")


def reported(result: Result) -> tuple[dict[str, Any], list[pd.DataFrame]]:
    tables = [result.table, *(result.tables[name] for name in sorted(result.tables))]
    return (
        {name: value for name, value in result.facts.items() if name not in TIMED},
        [table.drop(columns=[name for name in TIMED if name in table]) for table in tables],
    )


def assert_same(first: Result, second: Result) -> None:
    facts, tables = reported(first)
    other_facts, other_tables = reported(second)
    assert facts == other_facts
    for table, other in zip(tables, other_tables, strict=True):
        pd.testing.assert_frame_equal(table, other, check_exact=True)
    states = [result.subject.model.state_dict() for result in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


RECOVERY = {"recovery.steps": 8, "recovery.batch_size": 8, "recovery.learning_rate": 1e-3}
SPARSE: dict[str, Any] = {"steps": 8, "batch_size": 8, "sparsity": 0.5}
ROUNDED: dict[str, Any] = {"steps": 8, "batch_size": 8, "test_examples": 32}
RUNS: dict[str, tuple[Any, str]] = {
    "train": (Train(steps=8, batch_size=8, micro_batch=3, ema=0.5, evaluate_every=3), "train"),
    "train batch rule": (Train(steps=8, batch_size=8, batch_rule="norm-test"), "train"),
    "train adversary": (Train(steps=8, batch_size=8, loss="concurrent-adversary"), "train"),
    "train agvm": (Train(steps=8, batch_size=8, optimizer="agvm"), "train"),
    "recovery": (
        Prune(
            method="magnitude", recovery="finetune", schedule="cubic", **RECOVERY, **{"schedule.events": 3}
        ),
        "recovery",
    ),
    "recovery low-rank": (
        Prune(method="wanda", recovery="low-rank", sparsity=0.5, **RECOVERY),
        "recovery",
    ),
    "recovery heads": (
        Prune(
            method="magnitude",
            pattern="heads",
            recovery="distil",
            schedule="linear",
            **RECOVERY,
            **{"schedule.events": 2},
        ),
        "recovery",
    ),
    "recovery channels": (
        Prune(
            method="magnitude",
            pattern="channels",
            sparsity=0.5,
            recovery="finetune",
            schedule="linear",
            **RECOVERY,
            **{"schedule.events": 2},
        ),
        "recovery",
    ),
    "pat": (
        Prune(method="pat", pattern="channels", sparsity=0.25, recovery="finetune", **RECOVERY),
        "pruning-aware",
    ),
    "lsq": (TrainQuantized(**ROUNDED), "training"),
    "lsq after a dense part": (TrainQuantized(switch_at=0.5, reset_optimizer=True, **ROUNDED), "training"),
    "ternary": (TrainQuantized(method={"name": "ternary", "ramp": 0.5}, **ROUNDED), "training"),
    "nipq": (TrainQuantized(method="nipq", activation_bits=8, **ROUNDED), "training"),
    "csq": (TrainQuantized(method="csq", distillation=0.5, **ROUNDED), "training"),
    "fliqs": (TrainQuantized(method="fliqs", **ROUNDED), "training"),
    "double-rounding": (TrainQuantized(method="double-rounding", **ROUNDED), "training"),
    "static in stages": (
        TrainSparse(method="static", schedule="geometric", stages=2, **SPARSE),
        "train",
    ),
    "regrow": (TrainSparse(masks={"name": "regrow", "period": 2}, **SPARSE), "train"),
    "ast": (TrainSparse(method="ast", **SPARSE), "train"),
    "gates": (TrainSparse(method="block-movement", pattern="hybrid 16x16", **SPARSE), "train"),
    "pst": (TrainSparse(method="pst", **SPARSE), "train"),
    "slope": (TrainSparse(method="slope", pattern="2:4", steps=8, batch_size=8), "train"),
    "half": (TrainSparse(method="hft", stages=2, **SPARSE), "train"),
}


#: Each way in which a run's state is more than that of the loop; the others only with --long.
QUICK = (
    "train",
    "train adversary",
    "recovery",
    "recovery heads",
    "recovery channels",
    "pat",
    "lsq after a dense part",
    "csq",
    "static in stages",
    "ast",
)
CASES = [
    pytest.param(name, moves, marks=[] if name in QUICK and moves == 6 else pytest.mark.long)
    for name in RUNS
    for moves in (3, 6)
]


@pytest.mark.parametrize(("name", "moves"), CASES)
def test_what_was_stopped_goes_on_bit_for_bit(name: str, moves: int, checkpoints: dict[str, Path]) -> None:
    run, label = RUNS[name]
    on = workbench.subject(checkpoints["vit"], data="random")
    whole = run.run(on, cache=False, progress=Progress())
    assert left_behind() == []
    stopping = Stopped(label, moves)
    partial = run.run(on, progress=stopping)
    assert partial.partial and stopping.said == [] and len(left_behind()) == 1
    going_on = Stopped("never", 1)
    resumed = run.run(on, progress=going_on)
    assert not resumed.partial and any("goes on at step" in text for text in going_on.said)
    assert_same(whole, resumed)
    assert left_behind() == []


@pytest.mark.parametrize("moves", [1, 2])
def test_subtune_keeps_its_candidates(moves: int, checkpoints: dict[str, Path]) -> None:
    """Stopped after any candidate: what they came to is not computed again, and losers leave nothing."""
    on = workbench.subject(checkpoints["vit"], data="random")
    run = Subtune(steps=3, most=2, gain=0.0, batch_size=8, learning_rate=1e-2)
    whole = run.run(on, cache=False, progress=Progress())
    assert run.run(on, progress=Stopped("block", moves)).partial and len(left_behind()) == 1
    began: list[int] = []
    original = Training.one_step

    def counted(training: Training) -> None:
        began.append(training.step)
        original(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "one_step", counted)
        resumed = run.run(on, progress=Progress())
    assert len(began) <= 3 * (len(whole.table) - moves)
    assert_same(whole, resumed)
    assert left_behind() == []


def test_the_others_begin_where_they_are_told(checkpoints: dict[str, Path]) -> None:
    """`fresh` begins again; other fields are another run; an interrupted one that is inside another does not
    take its place.
    """
    on = workbench.subject(checkpoints["vit"], data="random")
    run, label = RUNS["train"]
    run.run(on, progress=Stopped(label, 3))
    other = run.with_fields(learning_rate=2e-3)
    seen = Stopped(label, 2)
    other.run(on, progress=seen)
    assert seen.said == [] and len(left_behind()) == 2
    going_on = Stopped(label, 2)
    assert len(run.run(on, progress=going_on).table) == 5 and "step 3 of 8" in going_on.said[0]
    begun = Stopped(label, 2)
    assert len(run.run(on, progress=begun, fresh=True).table) == 2 and begun.said == []


def test_a_part_of_a_training_is_not_the_subject_of_a_stored_result(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored result's subject is computed again when its weights are asked for; stopped on the way, it is
    not handed on as if it were whole.
    """
    on = workbench.subject(checkpoints["vit"], data="random")
    run, label = RUNS["train"]

    def three(progress: Stopped) -> None:
        Stopped.__init__(progress, label, 3)

    whole = run.run(on, progress=Progress())
    again = run.run(on, progress=Progress())
    monkeypatch.setattr(
        "workbench.instruments.TextProgress", type("Three", (Stopped,), {"__init__": three, "close": str})
    )
    with pytest.raises(KeyboardInterrupt):
        _ = again.subject.model
    monkeypatch.undo()
    for name, value in whole.subject.model.state_dict().items():
        assert torch.equal(value, again.subject.model.state_dict()[name])
