"""Kind: a training checkpoint never vanishes, is never half written, and is used only when it is what was
written; a disk that does not take one ends no training.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from tests.unfinished.stopping import Stopped
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.training import Train, checkpoint
from workbench.unfinished import Journal, left_behind
from workbench.unfinished.journal import locked

STATE = {
    "weights": torch.arange(6.0).reshape(2, 3).T,
    "step": 3,
    "groups": [{"lr": 0.1, "betas": (0.9, 1.0)}],
}
ROWS = [{"step": 1.0, "loss": 0.5}]


def same(found: dict[str, Any]) -> bool:
    return found["step"] == 3 and torch.equal(found["weights"], STATE["weights"]) and "groups" in found


class Killed(BaseException):
    """A process that ends without doing anything more."""


@pytest.mark.parametrize("call", ["replace", "fsync", "save_file"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_at_any_call_the_old_or_the_new_one_is_whole(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 37: with a kill between two renames nothing was left, and an exception there deleted both."""
    checkpoint.save(tmp_path / "kept", STATE, ROWS)
    owner = checkpoint if call == "save_file" else os
    original, calls = getattr(owner, call), [0]

    def dying(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(owner, call, dying)
    try:
        checkpoint.save(tmp_path / "kept", STATE | {"step": 4}, ROWS)
        assert calls[0] < number
    except Killed:
        pass
    monkeypatch.undo()
    found, rows = checkpoint.load(tmp_path / "kept")
    assert found["step"] in (3, 4) and rows == ROWS
    checkpoint.save(tmp_path / "kept", STATE | {"step": 5}, ROWS)
    assert checkpoint.load(tmp_path / "kept")[0]["step"] == 5
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_flipped_bits_are_refused_with_one_line(tmp_path: Path) -> None:
    """Fault 43: a flipped bit was accepted. Wherever it is, in either file, the checkpoint is refused."""
    draw = random.Random(0)
    for name in ("state.json", "state.safetensors"):
        for _ in range(25):
            shutil.rmtree(tmp_path / "kept", ignore_errors=True)
            checkpoint.save(tmp_path / "kept", STATE, ROWS)
            content = bytearray((tmp_path / "kept" / name).read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (tmp_path / "kept" / name).write_bytes(content)
            with pytest.raises(BadInput, match="^checkpoint: .* cannot be read") as told:
                checkpoint.load(tmp_path / "kept")
            assert "\n" not in str(told.value) and len(str(told.value)) < 600


def mutated(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Content cut, doubled, overwritten, with another file's bytes in it, or something else altogether."""
    at, length = draw.randrange(len(content)), draw.randrange(1, 64)
    return draw.choice(
        [
            content[:at],
            content[:at] + content[at + length :],
            content[:at] + draw.randbytes(length) + content[at + length :],
            content[:at] + other[:length] + content[at:],
            content[:at] * 2,
            b"",
            b"\xff\xfe" + content,
            b"[" * 5000,
            b"null",
            b'{"checksum": 1, "content": {}}',
            other,
        ]
    )


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.long)])
def test_mutated_checkpoints_are_one_line(count: int, tmp_path: Path) -> None:
    """Fault 45: 365 of 800 mutated training checkpoints were tracebacks. Also files with right checksums
    whose content is no state, which is what a checkpoint of something else is.
    """
    checkpoint.save(tmp_path / "good", STATE, ROWS)
    good = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    draw, folder = random.Random(1), tmp_path / "bad"
    refused = 0
    for index in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name, other = draw.sample(sorted(good), 2)
        changed = dict(good)
        if index % 3:
            changed[name] = mutated(draw, good[name], good[other])
        else:
            content = json.loads(good["state.json"])["content"]
            part = draw.choice(sorted(content))
            content[part] = draw.choice(
                [None, 1, "x", [], {}, {"dict": 1}, [[]], "tensor:9tensor:x", {"a": {}}]
            )
            text = json.dumps(content)
            changed["state.json"] = (checkpoint.HEAD % checkpoint.of_text(text) + text + "}").encode()
        for file, value in changed.items():
            (folder / file).write_bytes(value)
        try:
            found, _ = checkpoint.load(folder)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert index % 3 == 0 or changed == good or same(found)
    assert refused > count / 2


@pytest.fixture()
def on(checkpoints: dict[str, Path]) -> Any:
    return workbench.subject(checkpoints["vit"], data="random")


def test_a_damaged_checkpoint_is_named_and_left_until_it_is_to_begin_fresh(on: Any) -> None:
    run = Train(steps=6, batch_size=8)
    run.run(on, progress=Stopped("train", 3))
    (left,) = left_behind()
    (note,) = left.folder.rglob("state.json")
    note.write_text(note.read_text().replace("loss", "lost", 1))
    for _ in range(2):
        with pytest.raises(BadInput, match="checkpoint: .*--fresh"):
            run.run(on, progress=Progress())
    assert len(run.run(on, progress=Progress(), fresh=True).table) == 6 and left_behind() == []


def test_a_checkpoint_of_another_model_is_refused(on: Any, tmp_path: Path) -> None:
    """Right checksums, wrong weights: no traceback of torch's."""
    from workbench.training import fit

    fit(on.copy(), steps=2, checkpoint_folder=tmp_path / "kept", checkpoint_every=1)
    other = on.with_model(torch.nn.Linear(4, 3))
    with pytest.raises(BadInput, match="checkpoint: .*cannot be read"):
        fit(other, steps=2, checkpoint_folder=tmp_path / "kept", checkpoint_every=1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "denied")])
def test_a_disk_that_takes_no_checkpoint_ends_no_training(
    error: OSError, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example of the kind that was not listed: the training goes on, and that is said once."""

    def full(*_: Any) -> None:
        raise error

    run = Train(steps=4, batch_size=8)
    whole = run.run(on, cache=False, progress=Progress())
    monkeypatch.setattr(checkpoint, "save_file", full)
    seen = Stopped("never", 1)
    result = run.run(on, progress=seen)
    assert result.facts["test_loss"] == whole.facts["test_loss"]
    assert len(seen.said) == 1 and "no checkpoint is kept" in seen.said[0]


def test_one_process_at_a_time_has_a_run_s_checkpoints(on: Any) -> None:
    """An example of the kind that was not listed: the same command twice at once. The second keeps nothing
    and does not go on from what the first is writing.
    """
    run = Train(steps=6, batch_size=8)
    run.run(on, progress=Stopped("train", 3))
    (left,) = left_behind()
    held = locked(left.folder / "lock")
    assert held is not None and not left.remove()
    seen = Stopped("never", 1)
    assert len(run.run(on, progress=seen, cache=False).table) == 6
    assert seen.said == [
        "no checkpoint is kept (another process is at this very run); the run goes on without"
    ]
    held.close()
    going_on = Stopped("never", 1)
    run.run(on, progress=going_on)
    assert "step 3 of 6" in going_on.said[0] and left_behind() == []


def test_what_was_left_long_ago_goes_with_the_next_checkpoint(on: Any, every_step: Path) -> None:
    Train(steps=6, batch_size=8).run(on, progress=Stopped("train", 3))
    (left,) = left_behind()
    assert left.about["instrument"] == "train" and left.size > 0 and left.days < 1
    long_ago = time.time() - 40 * 86400
    for file in left.folder.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    damaged = every_step / "unfinished" / "damaged"
    damaged.mkdir()
    seen = Stopped("train", 2)
    Train(steps=5, batch_size=8).run(on, progress=seen)
    assert len(left_behind()) == 1 and left_behind()[0].about["fields"]["steps"] == 5
    assert "removed the checkpoints of 2 runs" in seen.said[0]


def test_files_of_a_process_that_was_killed_while_it_wrote_go(tmp_path: Path) -> None:
    part = tmp_path / "run" / "training-1" / "state.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    made = Journal(tmp_path / "run", {}, Progress())
    assert not part.exists()
    made.clear()
    made.close()
    assert not (tmp_path / "run").exists()
