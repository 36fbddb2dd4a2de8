"""Sweeps with trials that kill, clocks that are wrong, databases that are not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.training.sweep.objective import check_stands, prepared_folder
from workbench.training.sweep.sweeps import Sweep, Trial
from workbench.training.sweep.trial_ledger import ATTEMPTS, Ledger, owner_name, permanent

PROGRAM = """
import os, sys, time
from workbench.progress import Progress, interrupt_stops
from workbench.training.sweep.sweeps import Sweep

LOG = sys.argv[2]

def objective(params, trial):
    with open(LOG, "a") as file:
        file.write(f"{trial.number}\\n")
    time.sleep(float(sys.argv[5]))
    if params["x"] in POISON:
        os.kill(os.getpid(), 9)
    return {"value": float(params["x"])}

POISON = [int(x) for x in sys.argv[3].split(",") if x]
if __name__ == "__main__":
    progress = Progress()
    with interrupt_stops(progress):
        Sweep("s", {"x": list(range(6))}, objective, storage=sys.argv[1]).run(
            workers=int(sys.argv[4]), progress=progress
        )
"""


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'sweep.sqlite'}"


def square(params: dict, trial: Trial) -> dict:
    return {"value": float(params["x"])}


def start(folder: Path, poison: str = "", workers: int = 1, pause: float = 0.0) -> subprocess.Popen:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(folder / "program.py"), sqlite(folder), str(folder / "log"), poison]
    return subprocess.Popen([*command, str(workers), str(pause)], stderr=subprocess.DEVNULL)


def table(folder: Path) -> pd.DataFrame:
    return Sweep("s", {"x": list(range(6))}, square, storage=sqlite(folder)).table()


def begun(folder: Path) -> Counter:
    return Counter((folder / "log").read_text().split()) if (folder / "log").exists() else Counter()


@pytest.mark.long
@pytest.mark.parametrize("poison", ["0", "2,5"])
def test_a_trial_that_kills_its_worker_fails_and_the_sweep_goes_on(tmp_path, poison):
    """Kind: a sweep that ends early says so. The trials beside the one that kills keep their results."""
    assert start(tmp_path, poison, workers=2).wait(400) == 0
    found = table(tmp_path)
    killers = [int(x) for x in poison.split(",")]
    assert [n for n, state in zip(found.trial, found.state, strict=True) if state == "failed"] == killers
    assert (found.state == "done").sum() == 6 - len(killers)
    assert found.error[killers].str.contains("died 3 times").all()
    assert all(begun(tmp_path)[str(n)] == ATTEMPTS for n in killers)


@pytest.mark.long
def test_a_trial_that_kills_a_sweep_of_one_process_fails_when_it_is_run_again(tmp_path):
    codes = [start(tmp_path, "1").wait(200) for _ in range(ATTEMPTS + 1)]
    assert codes == [-9] * ATTEMPTS + [0]
    assert table(tmp_path).state.tolist() == ["done", "failed", "done", "done", "done", "done"]


def test_only_the_trial_that_kills_is_blamed(tmp_path):
    """Two trials are in flight when the pool dies: each is tried alone, after everything else for others."""
    ledger = Sweep("s", {"x": list(range(3))}, square, storage=sqlite(tmp_path)).open()
    first, second = owner_name("pool"), owner_name("pool") + ""
    assert [ledger.claim(first).number, ledger.claim(second).number] == [0, 1]
    assert ledger.release("pool") == [0, 1]
    assert ledger.claim(owner_name("other")).number == 2
    assert ledger.claim(first, only=1).attempt == 2
    assert ledger.finish(1, first, "done", {"value": 1.0}, 0.0)
    for attempt in range(2, ATTEMPTS + 1):
        assert ledger.claim(first, only=0).attempt == attempt
        assert ledger.release("pool") == [0]
    assert ledger.claim(first, only=0) is None
    assert [row.state for row in ledger.rows()] == ["failed", "done", "running"]


def test_stopping_is_no_attempt(tmp_path):
    """However often somebody presses Stop during a trial, it is not taken for one that kills."""
    progress = Progress()

    def objective(params: dict, trial: Trial) -> dict:
        progress.stop.set()
        assert trial.progress.stopped
        return {"value": 0.0}

    sweep = Sweep("s", {"x": [1]}, objective, storage=sqlite(tmp_path))
    for _ in range(ATTEMPTS + 1):
        progress.stop.clear()
        assert sweep.run(workers=1, progress=progress).attempts.tolist() == [0]
    assert Sweep("s", {"x": [1]}, square, storage=sqlite(tmp_path)).run(workers=1).state.tolist() == ["done"]


@pytest.mark.parametrize("ahead", [120.0, -120.0])
def test_a_wrong_clock_takes_nobodys_trial(tmp_path, monkeypatch, ahead):
    """Kind: a lease is judged by one clock, the server's."""
    ledger = Sweep("s", {"x": [1]}, square, storage=sqlite(tmp_path)).open()
    elsewhere = "other-machine|1|driver"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - ahead)
    assert ledger.claim(elsewhere) is not None
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    assert ledger.claim(owner_name("here")) is None
    assert ledger.beat(0, elsewhere) and abs(ledger.rows()[0].beat - real()) < 5


def test_an_abandoned_trial_of_another_machine_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.training.sweep.trial_ledger.STALE", 0.2)
    ledger = Sweep("s", {"x": [1]}, square, storage=sqlite(tmp_path)).open()
    for attempt in range(ATTEMPTS):
        claim = ledger.claim(f"other-machine|{attempt}|driver")
        assert claim is not None and claim.attempt == attempt + 1
        time.sleep(0.3)
    assert ledger.claim(owner_name("here")) is None
    assert ledger.rows()[0].state == "failed"


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////nowhere/at/all/sweep.sqlite",
        "sqlite:///{folder}",
        "sqlite:///{folder}/text.sqlite",
        "nothing://x",
        "just some words",
        "",
        "postgresql+nodriver://x/y",
        "mssql+pyodbc://x/y",
    ],
)
def test_storage_that_cannot_work_is_one_line_at_once(tmp_path, url):
    """Kind: an error that waiting does not mend is not waited for."""
    (tmp_path / "text.sqlite").write_text("this is no database, only a text that is long enough\n" * 40)
    began = time.monotonic()
    with pytest.raises(BadInput, match="^storage: ") as said:
        Ledger(url.format(folder=tmp_path), "s")
    assert time.monotonic() - began < 5 and "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("said", "lasting"),
    [
        ('FATAL:  password authentication failed for user "me"', True),
        ('FATAL:  database "sweeps" does not exist', True),
        ('FATAL:  role "me" does not exist', True),
        ("attempt to write a readonly database", True),
        ("database or disk is full", True),
        ("connection refused", False),
        ("database is locked", False),
        ('relation "workbench_trials" does not exist', False),  # its tables are about to be made
        ("terminating connection due to administrator command", False),
    ],
)
def test_what_waiting_mends(said, lasting):
    assert bool(permanent(RuntimeError(f"connection failed\n{said}\n"))) is lasting


def test_a_result_on_nothing_is_an_error():
    """Kind: a result that stands on nothing is an error, in the words of what failed."""
    failed = pd.DataFrame({"state": ["failed", "failed"], "error": ["MemoryError: 4 EB", None]})
    with pytest.raises(BadInput, match="grid: no trial finished .2 failed.; MemoryError: 4 EB"):
        check_stands(failed, "grid", stopped=False)
    with pytest.raises(BadInput, match="there is none"):
        check_stands(pd.DataFrame(), "grid", stopped=False)
    check_stands(failed, "grid", stopped=True)
    check_stands(failed.assign(state=["done", "failed"]), "grid", stopped=False)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ctrl_c_keeps_finished_trials_and_the_same_command_goes_on(tmp_path, workers):
    process = start(tmp_path, workers=workers, pause=0.4)
    until = time.monotonic() + 200
    while sum(begun(tmp_path).values()) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 0
    first = table(tmp_path)
    done = first[first.state == "done"].trial.tolist()
    assert 1 <= len(done) < 6 and set(first.state) <= {"done", "waiting"}
    assert start(tmp_path, workers=workers).wait(200) == 0
    assert table(tmp_path).state.tolist() == ["done"] * 6
    assert all(begun(tmp_path)[str(n)] == 1 for n in done)
    assert not [pid for pid in os.listdir("/proc") if pid == str(process.pid)]


def test_a_module_that_no_other_process_can_open_is_refused_before_its_trials():
    rows = {"inputs": torch.randn(20, 3), "labels": torch.arange(20) % 2}
    plain = workbench.subject(torch.nn.Linear(3, 2), data=rows)
    with pytest.raises(BadInput, match="workers: 2 processes cannot open .*use workers=1"):
        prepared_folder(plain, 2)
    assert prepared_folder(plain, 1) == plain.fingerprint
