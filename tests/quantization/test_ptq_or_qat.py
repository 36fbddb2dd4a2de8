"""Training through the rounding against rounding afterwards: both sides are the instruments they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.errors import BadInput
from workbench.quantization import PtqOrQat
from workbench.subjects import Subject, subject
from workbench.training.data_order import Draws
from workbench.training.loop import Settings, Training

FEW = {"steps": 4, "batch_size": 8, "test_examples": 32, "calibration_examples": 8}


def test_each_width_is_trained_and_rounded(cache: Path) -> None:
    on = subject("digits-vit")
    study = PtqOrQat(widths=[8, 2], **FEW)
    result = study.run(on, cache=False)
    assert result.table["bits"].tolist() == [8, 2]
    assert (result.table["gap"] == result.table["trained"] - result.table["rounded"]).all()
    assert result.facts["gap_2_bits"] == result.table["gap"][1]
    alone = study.trained(2).run(on, cache=False)
    assert result.table["trained"][1] == pytest.approx(alone.facts["loss"])
    assert result.table["rounded"][0] < result.table["rounded"][1], "two bits cost more than eight"
    assert len(result.figure().data) == 2


def test_both_sides_are_trained_alike(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One optimizer, one schedule and the same batches: sides that differ in the rounding alone."""
    starts: list[Settings] = []
    start = Training.start

    def seen(on: Subject, **settings: Any) -> Training:
        run = start(on, **settings)
        starts.append(run.settings)
        return run

    monkeypatch.setattr(Training, "start", seen)
    PtqOrQat(widths=[4], **FEW).run(subject("digits-vit"), cache=False)
    dense, through = starts
    for name in ("optimizer", "schedule", "clip", "weight_decay", "warmup", "steps", "batch_size"):
        assert getattr(dense, name) == getattr(through, name), name
    assert isinstance(dense.order, Draws) and isinstance(through.order, Draws)
    assert dense.order.seed == through.order.seed


def test_widths_are_checked_before_anything_is_trained() -> None:
    with pytest.raises(BadInput, match="widths: there is none"):
        PtqOrQat(widths=[]).check(subject("digits-vit"))
    with pytest.raises(BadInput):
        PtqOrQat(widths=[1]).check(subject("digits-vit"))
