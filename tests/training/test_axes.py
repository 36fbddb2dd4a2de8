"""The axes of training: a user's own entries train, every option of every entry can be given,
and pairs that cannot be are refused before a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.test_studies import with_test_split
from workbench.axis import Choice, Options, axis, parameter
from workbench.errors import BadInput
from workbench.training import OptimizerComparison, ScheduleStudy, Train
from workbench.training.batch.rules import BATCH_RULE
from workbench.training.optimizer.optimizers import OPTIMIZER, OptimizerOptions, make_optimizer
from workbench.training.precision.precision import PRECISION
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE, make_schedule, sampled
from workbench.training.studies.lists import labels, listed

FEW = {"steps": 6, "batch_size": 10, "learning_rate": 1e-2}


@pytest.fixture
def own_entries() -> Iterator[None]:
    class Damped(OptimizerOptions):
        damping: float = parameter(0.1, "pull to zero", ge=0)

    class Halves(Options):
        pieces: int = parameter(2, "pieces", ge=1)

    @OPTIMIZER.add("test-descent", formula="w <- w - lr g", source="a test", options=Damped)
    def descent(
        model: nn.Module, learning_rate: float, weight_decay: float, options: Damped
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=options.damping)

    @LEARNING_RATE_SCHEDULE.add("test-halves", formula="2^-floor(pieces p)", source="a test", options=Halves)
    def halves(p: float, options: Halves) -> float:
        return 0.5 ** math.floor(options.pieces * p)

    yield
    del OPTIMIZER.entries["test-descent"], LEARNING_RATE_SCHEDULE.entries["test-halves"]


def test_own_optimizer_and_schedule_train(own_entries: None) -> None:
    """They do what torch's does at their rates; names, options and hints are there as those of others."""
    on = with_test_split()
    run = Train(
        **FEW,
        optimizer={"name": "test-descent", "damping": 0.0},
        schedule={"name": "test-halves", "pieces": 3},
        warmup=0.0,
    ).run(on, cache=False)
    np.testing.assert_allclose(run.table.lr, [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3])
    plain = Train(
        **FEW, optimizer={"name": "sgd", "momentum": 0.0}, schedule="constant", weight_decay=0.0, warmup=0.0
    ).run(on, cache=False)
    assert run.table.loss[0] == plain.table.loss[0] and run.table.loss[1] == plain.table.loss[1]
    with pytest.raises(BadInput, match="did you mean test-halves"):
        Train(schedule="test-halfs")
    study = ScheduleStudy(
        schedules=["test-halves", "test-halves pieces=5"], examples=20, batch_size=10, seeds=1,
        learning_rate_points=1, budgets=(1.0,), workers=1, evaluate_limit=10,
    )  # fmt: skip
    assert list(study.run(on, cache=False).table.name) == ["test-halves", "test-halves pieces=5"]


def another(info: Any) -> Any:
    """A value that is not the default and lies within the bounds."""
    value = info.default
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(0.5 * v for v in value)
    if isinstance(value, str):
        return next(choice for choice in get_args(info.annotation) if choice != value)
    if isinstance(value, int):
        return value + 1
    low = next((rule.ge for rule in info.metadata if hasattr(rule, "ge")), -math.inf)
    return 0.1 if not value else value * 0.9 if value * 0.9 >= low else value * 1.1


@pytest.mark.parametrize("field", ["optimizer", "schedule", "precision", "batch_rule"])
def test_every_option_of_every_entry_can_be_given(field: str) -> None:
    """From Python as a mapping and with a dot, and it survives JSON."""
    required = {"batch": 8, "tokens": 256.0, "format": "int4"}
    names = {"inner": "lamb", "gradient_format": "e5m2"}
    home = axis(Train.model_fields[field].json_schema_extra["axis"])
    for name, entry in home.entries.items():
        needed = {k: required[k] for k, i in entry.options.model_fields.items() if i.is_required()}
        for option, info in entry.options.model_fields.items():
            value = names.get(option) or needed.get(option) or another(info)
            options = needed | {option: value}
            made = Train(**{field: {"name": name, **options}})
            assert made == Train(**{field: name if not needed else {"name": name, **needed},
                                    f"{field}.{option}": value})  # fmt: skip
            assert Train(**json.loads(json.dumps(made.model_dump(mode="json")))) == made
            given = getattr(made, field).options
            assert given != entry.options(**needed) or option in needed, (name, option)
            if field == "optimizer" and (option, value) != ("weight_map", "soft-cap"):
                make_optimizer(getattr(made, field), 1e-3)(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
            if field == "schedule":
                make_schedule(getattr(made, field))(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), 10)


def test_options_change_what_is_trained() -> None:
    on = with_test_split()
    plain = Train(**FEW).run(on, cache=False).table.loss
    for given in (
        {"optimizer": {"name": "adamw", "betas": (0.5, 0.6)}},
        {"optimizer.eps": 0.1},
        {"schedule": {"name": "cosine", "final": 0.9}},
        {"precision": {"name": "rounded", "format": "int4", "rotation": 1}},
    ):
        assert Train(**FEW, **given).run(on, cache=False).table.loss.iloc[-1] != plain.iloc[-1]
    grown = Train(**FEW, batch_rule={"name": "norm-test", "eta": 0.05, "largest": 40, "sample": 8})
    sizes = grown.run(on, cache=False).table.batch_size
    assert sizes.iloc[0] == 10 and sizes.iloc[-1] > 10


def test_uba_is_not_cosine_unless_phi_is_two() -> None:
    assert Train(schedule="uba").schedule.options.phi == 0.5
    cosine = sampled("cosine", 40)
    assert np.abs(sampled("uba", 40) - cosine).max() > 0.1
    np.testing.assert_allclose(sampled({"name": "uba", "phi": 2.0}, 40), cosine, atol=1e-14)


def test_a_recorded_run_of_uba_at_two_is_as_it_was(cache: Any, checkpoints: Any) -> None:
    """When it was recorded, phi was 2 where it was not given."""
    from tests.recorded.record import RECORDED, machine, read, recorded
    from tests.recorded.test_recorded_runs import differences

    entry = read()["train-mkor-uba"]
    if entry["machine"] != machine():
        pytest.skip(f"recorded with {entry['machine']}")
    fields = {**entry["fields"], "schedule": {"name": "uba", "phi": 2.0}}
    now = recorded({**entry, "fields": fields}, checkpoints)
    assert differences({k: entry[k] for k in RECORDED if k in entry}, now, entry["name"]) == []


@pytest.mark.parametrize("optimizer", ["mkor", "muon", "adafactor"])
def test_a_momentum_that_is_not_there_cannot_be_cycled(optimizer: str) -> None:
    on = with_test_split()
    with pytest.raises(BadInput, match=r"schedule\.cycle_momentum: .* has no momentum"):
        Train(**FEW, optimizer=optimizer, schedule="one-cycle").check(on)
    Train(**FEW, optimizer=optimizer, schedule={"name": "one-cycle", "cycle_momentum": False}).check(on)


def test_what_an_optimizer_cannot_be_is_refused_before_the_run() -> None:
    on = with_test_split()
    for given, words in (
        ({"optimizer": {"name": "mkor", "inner": "mkor"}}, "inner"),
        ({"optimizer": {"name": "muon", "weight_map": "soft-cap"}}, "weight_map"),
        ({"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": True}}, "nesterov"),
    ):
        with pytest.raises(BadInput, match=words):
            Train(**given).check(on)
    for given, words in (
        ({"optimizer": {"name": "adamw", "betas": (0.9, 1.0)}}, r"optimizer\.betas: "),
        ({"optimizer": {"name": "adamw", "rank": 3}}, "an option of galore"),
        ({"schedule": "power"}, r"schedule\.batch: "),
        ({"precision": "int8 rotation 3"}, r"precision\.rotation: 3"),
        ({"precision": "tf32"}, "known: fp32, bf16, fp16"),
    ):
        with pytest.raises(BadInput, match=words):
            Train(**given)


def test_names_of_one_release_ago() -> None:
    with pytest.warns(FutureWarning, match="learning_rate"):
        assert Train(lr=0.5).learning_rate == 0.5
    with pytest.warns(FutureWarning, match=r"precision\.rotation"):
        assert Train(precision="int8", rotation=2).precision.options.rotation == 2
    with pytest.warns(FutureWarning, match="uba phi=5"):
        assert ScheduleStudy(schedules="rex,uba", phi=3.0).schedules == ["rex", "uba phi=3.0"]
    with pytest.warns(FutureWarning, match="learning_rate_points"):
        assert OptimizerComparison(lr_points=2).learning_rate_points == 2


def test_lists_of_choices() -> None:
    found = listed(OPTIMIZER, ["adamw", "muon momentum=0.9 nesterov=false", "adamw", "adamw eps=1.0"], "list")
    assert [str(c) for c in found] == ["adamw", "muon", "adamw"] and found[1].options.nesterov is False
    assert labels(found) == ["adamw", "muon", "adamw eps=1.0"]
    with pytest.raises(BadInput, match="optimizers: 'adamv' is unknown; did you mean adamw"):
        OptimizerComparison(optimizers="adamv,sgd").check(with_test_split())
    with pytest.raises(BadInput, match="an option of"):
        OptimizerComparison(optimizers=["sgd rank=3"]).check(with_test_split())


def test_the_key_of_a_run_knows_what_was_chosen() -> None:
    on = with_test_split()
    keys = {
        Train(**given).key(on)
        for given in ({}, {"optimizer": "lion"}, {"optimizer.eps": 0.1}, {"schedule": "uba"},
                      {"precision": "int8"}, {"precision": "int8 rotation 1"})
    }  # fmt: skip
    assert len(keys) == 6 and isinstance(Train().optimizer, Choice)
    assert "adamw" in OPTIMIZER and "fixed" in BATCH_RULE and "bf16" in PRECISION
