"""What was a loop of its own takes the settings of the training loop: recovery between pruning events,
pruning-aware tuning, training through rounding and sparse training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from workbench.progress import Progress
from workbench.pruning import Prune, Subtune, TrainSparse
from workbench.pruning.recovery.recovery import Recovery
from workbench.quantization import TrainQuantized
from workbench.subjects import Subject
from workbench.training import Train
from workbench.training.loop import Training

OTHER: dict[str, Any] = {"optimizer": "lion", "schedule": "cosine", "precision": "bf16"}


def weights(on: Subject) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in on.model.parameters()])


RUNS = {
    "recovery": Prune(
        method="magnitude", recovery="finetune", **{"recovery.steps": 4, "recovery.batch_size": 8}
    ),
    "tuning": Prune(
        method="pat", pattern="channels", sparsity=0.25, recovery="finetune", **{"recovery.steps": 4}
    ),
    "rounding": TrainQuantized(steps=4, batch_size=8, test_examples=32, switch_at=0.5),
    "sparse": TrainSparse(method="static", sparsity=0.5, steps=4, batch_size=8),
}


def told(name: str, settings: dict[str, Any]) -> Any:
    """The instrument with these settings of its run, by the names that it has for them."""
    run = RUNS[name]
    if isinstance(run, Prune):
        return run.with_fields(**{f"recovery.{field}": value for field, value in settings.items()})
    return run.with_fields(**settings)


@pytest.mark.parametrize("name", RUNS)
def test_each_takes_optimizer_schedule_precision_and_accumulation(name: str) -> None:
    """Another optimizer gives other weights; micro-batches give the same ones."""
    chosen: dict[str, Any] = {}

    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        on = workbench.subject("digits-vit")
        return weights(told(name, chosen).run(on, Progress(), cache=False).subject)

    plain = trained()
    chosen["micro_batch"] = 3
    accumulated = trained()
    del chosen["micro_batch"]
    chosen.update(OTHER)
    other = trained()
    chosen["optimizer"] = "muon"
    fourth = trained()
    assert torch.isfinite(other).all() and not torch.equal(other, plain) and not torch.equal(fourth, other)
    assert float((accumulated - plain).norm() / plain.norm()) < 2e-3


def test_recovery_in_parts_is_recovery_in_one(checkpoints: Any) -> None:
    """And one that skips what another did goes on with the other's learning rates."""

    def recovered(parts: tuple[int, ...], skipped: int = 0) -> tuple[Recovery, torch.Tensor]:
        on = workbench.subject(checkpoints["llama"], data="random")
        run = Recovery(on, on.layers(), "finetune", 8, 1e-3, batch_size=4)
        run.skip(skipped)
        for steps in parts:
            run.advance(steps)
        run.finish()
        return run, weights(on)

    whole, expected = recovered((8,))
    parts, found = recovered((3, 1, 4))
    late, _ = recovered((5,), skipped=3)
    assert torch.equal(expected, found) and whole.curve == parts.curve and whole.done == 8
    rates = [row["lr"] for row in whole.run.rows]
    assert [row["lr"] for row in late.run.rows] == pytest.approx(rates[3:]) and late.curve[0]["step"] == 4


TRAINERS: dict[str, Any] = RUNS | {
    "train": Train(steps=4, batch_size=8),
    "subtune": Subtune(steps=4, batch_size=8, most=1),
}
LOOP: dict[str, Any] = {
    "optimizer": "lion",
    "schedule": "linear",
    "precision": "bf16",
    "micro_batch": 3,
    "clip": 0.25,
}


class Begun(Exception):
    """A training has begun."""


@pytest.mark.parametrize("name", TRAINERS)
def test_settings_of_the_loop_reach_it(name: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a trainer with settings of its own in place of the loop's, or that hands only some of them on
    (Subtune had its own learning rate, and always AdamW on a cosine).
    """
    begun: list[Any] = []

    def found(run: Training) -> None:
        begun.append(run)
        raise Begun

    monkeypatch.setattr(Training, "begin", found)
    run = TRAINERS[name]
    if isinstance(run, Prune):
        run = run.with_fields(**{f"recovery.{field}": value for field, value in LOOP.items()})
    else:
        run = run.with_fields(**LOOP)
    with pytest.raises(Begun):
        run.run(workbench.subject(checkpoints["vit"], data="random"), Progress(), cache=False)
    settings = begun[0].settings
    assert "Lion" in type(begun[0].optimizer).__name__ or any(
        "Lion" in type(part).__name__ for part in begun[0].optimizer.parts
    )
    assert str(settings.schedule) == "linear" and str(settings.precision) == "bf16"
    assert settings.micro_batch == 3 and settings.clip == 0.25


def test_no_instrument_trains_beside_the_loop() -> None:
    """Whatever has steps or a learning rate has all of the loop's settings. Self-tuning does not: it steps on
    two losses in turn, of the weights and of their hyperparameters; nor does weights' arithmetic, which
    trains by the loop as it is by default, to have models to begin with.
    """
    of_the_loop = {"optimizer", "micro_batch", "clip", "precision"}
    trainers = {type(run).name() for run in TRAINERS.values()}
    for name, cls in workbench.catalog().items():
        fields = set(cls.model_fields)
        arithmetic = cls.__module__.startswith("workbench.arithmetic.")
        if (
            name != "self-tuning"
            and not arithmetic
            and cls.changes_model
            and {"steps", "learning_rate"} & fields
        ):
            assert name in trainers and of_the_loop <= fields, name
