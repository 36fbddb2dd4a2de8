"""Kind: a process may end at any moment, by a signal or without a word; the next call of the same command
completes, and nothing computed is lost beyond the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--batch-size", "8", "--micro-batch", "4"],
    "train-quantized": [
        "train-quantized",
        "--batch-size",
        "8",
        "--switch-at",
        "0.5",
        "--test-examples",
        "16",
    ],
    "prune": [
        *("prune", "--method", "magnitude", "--recovery", "finetune", "--recovery.batch-size", "8"),
        *("--schedule", "cubic", "--schedule.events", "4"),
    ],
    "train-sparse": ["train-sparse", "--method", "ast", "--batch-size", "8"],
}


def command(name: str, steps: int, subject: Path, out: Path) -> list[str]:
    told = "--recovery.steps" if name == "prune" else "--steps"
    arguments = [*COMMANDS[name], told, str(steps), "--subject", str(subject), "--data", "random"]
    return [sys.executable, "-m", "workbench.cli", "run", *arguments, "--out", str(out)]


def started(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    surroundings = os.environ | {
        "WORKBENCH_CACHE": str(cache),
        "WORKBENCH_CHECKPOINT_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.Popen(
        arguments,
        env=surroundings,
        cwd=cache.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kept_step(cache: Path) -> int:
    """The furthest step of any checkpoint in the cache."""
    steps = [0]
    for note in (cache / "unfinished").rglob("state.json"):
        try:
            content = json.loads(note.read_text())["content"]
            steps.append(len(content["history"]))
        except (OSError, ValueError):
            continue
    return max(steps)


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen[str], cache: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while kept_step(cache) < step and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def assert_same_files(first: Path, second: Path) -> None:
    """Weights and tables of two saved results, bit for bit."""
    for name in ("model.safetensors", "changes.safetensors"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            one, two = load_file(first / name), load_file(second / name)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    tables = [pd.read_parquet(folder / "table.parquet") for folder in (first, second)]
    tables = [table.drop(columns=[c for c in table if c == "seconds"]) for table in tables]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_done(number: int, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Fault 42: SIGTERM kept nothing. The partial result is named so and saved, the exit code says which
    signal, and the same command goes on.
    """
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = command("train", 100_000, checkpoints["vit"], out)
    process = started(arguments, cache)
    wait_for_step(process, cache, 3)
    process.send_signal(number)
    code, said, errors = ended(process)
    assert code == 128 + number, errors
    assert "train (partial: stopped early)" in said and "the same command goes on from here" in said
    assert json.loads((out / "result.json").read_text())["partial"] is True and "Traceback" not in errors
    step = kept_step(cache)
    assert step >= 3
    if number == signal.SIGTERM:
        return
    process = started([*arguments[:-1], str(tmp_path / "more")], cache)
    wait_for_step(process, cache, step + 1)
    process.send_signal(number)
    _, _, errors = ended(process)
    assert f"goes on at step {step} of 100000" in errors and kept_step(cache) > step


def killed_at(
    name: str, moments: list[float], steps: int, tmp_path: Path, subject: Path, draw: random.Random
) -> None:
    """Kill the command as often as there are moments, each at a share of the way from the step it began at;
    then let it end, and compare with a run that nobody disturbed.
    """
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    code, _, errors = ended(started(command(name, steps, subject, whole), tmp_path / "other"))
    assert code == 0, errors
    out, before = tmp_path / "out", 0
    for moment in moments:
        process = started(command(name, steps, subject, out), cache)
        wait_for_step(process, cache, min(before + 1 + round(moment * 8), steps - 1))
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        _, _, errors = ended(process)
        assert "Traceback" not in errors
        if process.returncode == 0:  # it was faster
            return assert_same_files(whole, out)
        now = kept_step(cache)
        assert now >= before
        before = now
    code, said, errors = ended(started(command(name, steps, subject, out), cache))
    assert code == 0 and "partial" not in said, errors
    if before:
        assert f"goes on at step {before} of" in errors
    assert_same_files(whole, out)
    assert list((cache / "unfinished").glob("*")) == []
    assert [file for file in cache.rglob("*") if file.suffix == ".part"] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "other", "out", "whole"]


def test_killed_then_stopped_then_done(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Fault 42: SIGTERM kept nothing. One run is killed without a word, the next is asked to end: its partial
    result is named so, and the checkpoint is further on.
    """
    cache, out, steps = tmp_path / "cache", tmp_path / "out", 2000
    arguments = command("prune", steps, checkpoints["vit"], out)
    process = started(arguments, cache)
    wait_for_step(process, cache, 3)
    process.send_signal(signal.SIGKILL)
    ended(process)
    killed = kept_step(cache)
    process = started(arguments, cache)
    wait_for_step(process, cache, killed + 3)
    process.send_signal(signal.SIGTERM)
    code, said, errors = ended(process)
    stopped = kept_step(cache)
    assert code == 128 + signal.SIGTERM and "Traceback" not in errors and stopped > killed >= 3
    assert f"goes on at step {killed} of {steps}" in errors
    assert "prune (partial: stopped early)" in said and "the same command goes on from here" in said
    assert json.loads((out / "result.json").read_text())["partial"] is True
    assert not list(cache.rglob("*.part"))


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments(name: str, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    draw = random.Random(name)
    killed_at(name, [draw.random() for _ in range(10)], 300, tmp_path, checkpoints["vit"], draw)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Somebody whose computation does not look at Stop asks twice, with whatever signal."""
    script = (
        "import time, signal, os\n"
        "from workbench.progress import Progress, interrupt_stops\n"
        "p = Progress()\n"
        "try:\n"
        "    with interrupt_stops(p):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        assert p.stop.is_set() and p.signal == signal.SIGTERM\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(5); print('no')\n"
        "except KeyboardInterrupt:\n"
        "    print('ended')\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    done: Any = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ended\n", done.stderr
