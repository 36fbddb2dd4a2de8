"""A walk in files that is interrupted goes on behind the blocks that were done, with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import workbench
from tests.statistics.test_in_files import ARCHITECTURES, RUNS, same
from workbench.progress import Progress
from workbench.statistics import Walk
from workbench.storage.resident import library, of_files, on_disk
from workbench.unfinished.journal import left_behind

pytestmark = pytest.mark.skipif(library() is None, reason="Linux tells what is resident")


class Killed(BaseException):
    """What nobody catches."""


class Until(Progress):
    """Ends the process, so to speak, when so many blocks are done."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks, self.said = blocks, list[str]()

    def show(self, label: str, done: int, total: int | None) -> None:
        if label == "block after block" and done == self.blocks:
            raise Killed

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the statistics of each block were collected."""
    found: Counter[str] = Counter()
    collect = Walk.moments

    def counted(walk: Walk, block: str, *rest: Any) -> Any:
        found[block] += 1
        return collect(walk, block, *rest)

    monkeypatch.setattr(Walk, "moments", counted)
    return found


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_goes_on_behind_any_block(
    architecture: str, name: str, checkpoints: Any, cache: Path, tmp_path: Path, visited: Counter[str]
) -> None:
    """Kind: what a run has computed is lost with it, or computed again."""
    on = workbench.subject(checkpoints[architecture], data="random", max_length=16)
    whole = RUNS[name].run(on, Progress(), cache=False)
    blocks = list(visited)
    assert len(blocks) > 1
    for done in range(len(blocks) + 1):
        visited.clear()
        with on_disk(tmp_path):
            if done < len(blocks):
                with pytest.raises(Killed):
                    RUNS[name].run(on, Until(done), cache=False)
                assert [block for block in blocks if visited[block]] == blocks[:done]
            again = Until(-1)
            result = RUNS[name].run(on, again, cache=False)
        assert visited == dict.fromkeys(blocks, 1)
        assert same(result.subject.model, whole.subject.model) and result.facts == whole.facts
        assert result.table.equals(whole.table)
        assert all(table.equals(whole.tables[key]) for key, table in result.tables.items())
        assert of_files(layer.original for layer in result.subject.layers())
        told = f"{done} of {len(blocks)} blocks are done, by a run that was interrupted"
        assert (told in again.said) == (0 < done < len(blocks))
        assert not left_behind()


@pytest.mark.parametrize(
    "damage", ["byte of a weight", "shorter", "gone", "note", "answers", "other weights"]
)
def test_what_is_not_whole_is_computed_again(
    damage: str, checkpoints: Any, cache: Path, tmp_path: Path, visited: Counter[str]
) -> None:
    """Kind: what a file does not prove is believed."""
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    whole = RUNS["gptq"].run(on, Progress(), cache=False)
    visited.clear()
    with on_disk(tmp_path):
        with pytest.raises(Killed):
            RUNS["gptq"].run(on, Until(1), cache=False)
        (walk,) = (cache / "unfinished").glob("*/walk-1")
        (note,) = walk.glob("*.json")
        told = json.loads(note.read_text().partition("\n")[2])
        weight = walk / told["tensors"][told["weights"][0]]["file"]
        answer = walk / next(leaf["file"] for leaf in told["leaves"] if isinstance(leaf, dict))
        if damage == "byte of a weight":
            weight.write_bytes(weight.read_bytes()[:-1] + b"\x01")
        elif damage == "shorter":
            weight.write_bytes(weight.read_bytes()[:-1])
        elif damage == "gone":
            weight.unlink()
        elif damage == "note":
            note.write_text(note.read_text().replace("float32", "float64", 1))
        elif damage == "answers":
            answer.write_bytes(bytes(len(answer.read_bytes())))
        else:
            os.replace(answer, weight)
        result = RUNS["gptq"].run(on, Progress(), cache=False)
    assert visited[next(iter(visited))] == 2  # the block that was done, again
    assert same(result.subject.model, whole.subject.model) and not left_behind()


def test_only_the_same_run_goes_on_from_there(checkpoints: Any, cache: Path, tmp_path: Path) -> None:
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    with on_disk(tmp_path):
        with pytest.raises(Killed):
            RUNS["gptq"].run(on, Until(1), cache=False)
        other = RUNS["gptq"].with_fields(format="int3")
        there = other.run(on, told := Until(-1), cache=False)
        assert not told.said and same(
            there.subject.model, other.run(on, Progress(), cache=False).subject.model
        )
        RUNS["gptq"].run(on, told, cache=False, fresh=True)
    assert not told.said


@pytest.mark.parametrize("run", [["quantize", "--rounding", "gptq"], ["prune", "--method", "sparsegpt"]])
def test_killed_and_typed_again(run: list[str], checkpoints: Any, cache: Path, tmp_path: Path) -> None:
    """A process of its own, killed at random moments of its walk, typed again until it ends."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoints["llama"], num_hidden_layers=12)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    made = workbench.subject(tmp_path / "deep", data="random", max_length=32)
    instrument, *fields = run
    settings = {"predict_examples": 0, "calibration_examples": 32, fields[0][2:]: fields[1]}
    most = workbench.catalog()[instrument](**settings).foretold_memory(made).total - 1
    command = [sys.executable, "-m", "workbench.cli", "run", *run, "--subject", str(tmp_path / "deep")]
    command += ["--data", "random", "--max-length", "32", "--memory", str(most), "--no-cache"]
    command += ["--predict-examples", "0", "--calibration-examples", "32", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    kills, began = 0, time.monotonic()
    while True:
        going = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        notes = len(list((cache / "unfinished").glob("*/walk-1/*.json")))
        while going.poll() is None and len(list((cache / "unfinished").glob("*/walk-1/*.json"))) <= notes + 2:
            time.sleep(0.01)
        if going.poll() is not None:
            break
        going.send_signal(signal.SIGKILL)
        going.wait()
        kills += 1
        assert time.monotonic() - began < 300
    assert going.returncode == 0 and kills >= 3
    one, two = (workbench.subject(tmp_path / name).model for name in ("whole", "killed"))
    assert same(one, two) and not left_behind()
