"""Kind: everything over a second shows progress and obeys Stop; what a Stop leaves is a partial result or one
line, whatever it has left empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import workbench
from tests.unfinished.stopping import Stopped
from workbench.cli import main
from workbench.errors import Stopped as StoppedEarly
from workbench.instruments import Instrument, SubjectInstrument
from workbench.progress import Progress
from workbench.pruning import TrainSparse
from workbench.quantization import TrainQuantized
from workbench.results import Result
from workbench.scaling import load_runs
from workbench.subjects import Subject

ROOT = Path(__file__).parent.parent.parent
#: What an instrument needs so that the small subject is enough for it.
FIELDS: dict[str, dict[str, Any]] = {
    "critical-batch": {"noise_groups": 4, "noise_size": 8},
    "fisher-sweep": {"gradients": "8"},
    "gradient-noise": {"groups": 4, "size": 8},
}
#: They start processes, which takes longer than all that they are asked for here.
SLOW = ("critical-batch", "learning-rate-batch-size", "optimizer-comparison", "schedule-study")
#: Too small a subject for these is none at all, or it has no words; other tests stop them.
ELSEWHERE = ("flatness", "task-suite")


class Moved(Stopped):
    """Asks to stop when anything has been shown for the n-th time."""

    def __init__(self, moves: int) -> None:
        super().__init__("", moves)

    def show(self, label: str, done: int, total: int | None) -> None:
        self.left -= 1
        if self.left <= 0:
            self.stop.set()


def instruments() -> list[Any]:
    own = {name for name, cls in workbench.catalog().items() if cls.__module__.startswith("workbench.")}
    names = [name for name in sorted(own) if name not in ELSEWHERE]
    return [
        pytest.param(name, moves, marks=pytest.mark.long if moves > 1 or name in SLOW else ())
        for name in names
        for moves in (1, 2, 4)
    ]


def halved(on: Subject, folder: Path) -> Path:
    """A saved copy with half the weights in its first layer."""
    changed = on.copy()
    layer = changed.layers()[0]
    layer.write(layer.weight / 2)
    return changed.save(folder)


@pytest.mark.parametrize(("name", "moves"), instruments())
def test_each_instrument_ends_when_it_is_asked_to(
    name: str, moves: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Asked at its first move: it has shown something, and a partial result or one line comes back."""
    cls = workbench.catalog()[name]
    assert issubclass(cls, Instrument)
    if cls.on == "runs":
        on: Any = load_runs(ROOT / "data" / "runs" / "scaling_sweep.csv")
    else:
        on = workbench.subject(
            checkpoints["llama" if name in ("equalize", "rotate", "side-by-side") else "vit"], data="random"
        )
    progress = Moved(moves)
    fields = {"candidates": str(checkpoints["vit"])} if name == "fidelity" else FIELDS.get(name, {})
    if name in ("attribution", "side-by-side", "token-strip"):
        fields = {"changed": str(halved(on, tmp_path / "halved"))}
    try:
        result = cls(**fields).run(on, progress, cache=False)
    except workbench.BadInput as error:
        assert progress.stop.is_set(), error
        assert "stopped" in str(error) and "\n" not in str(error)
    else:
        assert progress.stop.is_set() and result.partial
        assert "(partial: stopped early)" in result.summary() and len(result.table) >= 0


class Empty(SubjectInstrument):
    """Sums up what it has not got."""

    def _run(self, on: Subject, progress: Progress) -> Result:
        found = [item for item in progress.track([3, 1], "items")]
        return self.result(None, {"smallest": min(found), "first": np.array(found)[0]})  # type: ignore[arg-type]


def test_what_a_stop_left_empty_is_one_line(checkpoints: dict[str, Path]) -> None:
    """Allocate, error-anatomy, layer-sensitivity and scaling-fit ended a Stop in a traceback. An instrument
    that does so without a Stop is at fault, and shows it.
    """
    on = workbench.subject(checkpoints["vit"], data="random")
    with pytest.raises(StoppedEarly, match="^empty: stopped before there was anything to report$"):
        Empty().run(on, Moved(1), cache=False)
    with pytest.raises(ValueError, match="min"):

        class Broken(Empty):
            def _run(self, on: Subject, progress: Progress) -> Result:
                return self.result(None, {"smallest": min([])})  # type: ignore[arg-type, type-var]

        Broken().run(on, Progress(), cache=False)


def test_train_quantized_stopped_reports_no_loss_it_has_not_measured(checkpoints: dict[str, Path]) -> None:
    """An example that was not listed: it evaluated after the Stop, over no batch, and blamed the labels."""
    on = workbench.subject(checkpoints["vit"], data="random")
    result = TrainQuantized(steps=8, batch_size=8, test_examples=16).run(
        on, Stopped("training", 3), cache=False
    )
    assert result.partial and len(result.table) == 3 and "loss" not in result.facts


def test_a_chain_ends_with_its_first_partial_step(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An example that was not listed: the second step of a method ran on a half trained subject."""
    ran: list[str] = []

    def stopping(instrument: TrainSparse, on: Subject, progress: Progress) -> Result:
        ran.append(str(instrument.method))
        progress.stop.set()
        assert progress.stopped
        return instrument.result(workbench.results.pd.DataFrame(), {}, subject=on)

    monkeypatch.setattr(TrainSparse, "_run", stopping)
    recipe = workbench.method("spdf").recipe
    assert len(recipe) > 1
    source = ["--subject", str(checkpoints["vit"]), "--data", "random"]
    assert main(["run", "spdf", *source]) == 0
    assert len(ran) == 1 and "partial" in capsys.readouterr().out
