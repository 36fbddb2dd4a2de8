"""What the damaged inputs and the killed processes found, each by its kind."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch

from workbench import BadInput, reports
from workbench.cli import main
from workbench.errors import LONGEST, Notice
from workbench.families import load_plugins, module_name
from workbench.pruning.saliency.expert_routing import ExpertPatterns
from workbench.quantization.allocation.allocate import layer_times
from workbench.storage import evidence_record
from workbench.storage.together import PARENT
from workbench.storage.writing import SCRATCH, scratch
from workbench.subjects import rows
from workbench.subjects.loaders import check_alike, from_file
from workbench.training.resume import check_course, unlike
from workbench.training.sweep.sweeps import Sweep
from workbench.values import read


def refused(call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(BadInput) as caught:
        call(*given, **named)
    return str(caught.value)


@pytest.mark.parametrize("text", ["9" * 5000 + "x", "a" * 20_000, "1\n2\r\n3\u2028x"])
def test_an_error_is_one_line_of_bounded_length_whatever_it_quotes(text: str) -> None:
    """Kind: a message that repeats what somebody gave repeats its line breaks and all of its characters."""
    for told in (refused(read, text, int, "steps"), str(BadInput(f"field: {text}; the fix"))):
        assert len(told.splitlines()) == 1 and len(told) <= LONGEST
    assert str(BadInput(f"field: {text}; the fix")).endswith("; the fix")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("raise SystemExit(3)", "SystemExit: 3 (line 2)"),
        ("import sys; sys.exit('bye')", "SystemExit: bye (line 2)"),
        ("class A(Exception):\n    def __str__(self): raise self\nraise A", "A: a A without words (line 4)"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_what_own_files_raise_is_one_line_that_names_the_line(raised: str, told: str, tmp_path: Path) -> None:
    """Kind: a user's own file that fails, or ends the process, fails as itself and not as a request."""
    file = tmp_path / "own.py"
    file.write_text(f"# first\n{raised}\n")
    assert told in refused(load_plugins, [file]) and module_name(file) not in sys.modules
    assert told in refused(from_file, file, "subject")


LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "prune", "--subject", f"{LONG}/x"],
        ["run", "prune", "--subject", f"{LONG}.gguf"],
        ["run", "prune", "--subject", f"{LONG}.py:f"],
        ["run", "scaling-fit", "--runs", f"{LONG}.csv"],
        ["report", f"{LONG}.ipynb"],
        ["report", LONG],
        ["report", "kernels", "--out", LONG],
        ["run", "critical-batch", "--out", LONG, "--workers=--"],
        ["report", "compress", "--parameters", LONG],
        ["report", "compress", "--data", LONG, "--steps", "x"],
        ["list", "--plugins", f"{LONG}.py"],
    ],
)
def test_a_name_that_no_file_can_have_names_no_file(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: asking whether a file is there raises for a name that is longer than any file's."""
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("workbench: ")


@pytest.mark.parametrize("arguments", [["x"], [], ["list", "--x"], ["bench", "--target", "9"]])
def test_every_command_refuses_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: a command with a parser of its own prints that parser's usage and ends the process."""
    assert main(["kernels", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("workbench: ") and len(told.splitlines()) == 1


@pytest.mark.parametrize("content", ["[1]", '{"holds": "yes"}', "{", "\xff", "[" * 100_000])
def test_a_damaged_record_of_evidence_counts_for_nothing_and_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: one file of the user's own that cannot be read takes every list of methods with it."""
    monkeypatch.setenv("WORKBENCH_EVIDENCE", str(tmp_path))
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "wanda.json").write_bytes(content.encode("latin-1"))
    with pytest.warns(Notice, match=r"wanda\.json"):
        record = evidence_record("pruning", "wanda")
    assert record is not None and "holds" in record  # the project's own


@pytest.mark.parametrize("change", ["tags", "source", "type"])
def test_a_notebook_that_its_format_does_not_allow_is_no_report(change: str, tmp_path: Path) -> None:
    """Kind: a library that only warns of what it does not allow hands on what is not there."""
    content = json.loads(reports.find("compress").read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    if change == "tags":
        cell["metadata"]["tags"] = 0.5
    elif change == "source":
        del cell["source"]
    else:
        cell["cell_type"] = ["code"]
    file = tmp_path / "own.ipynb"
    file.write_text(json.dumps(content))
    assert "is not a notebook" in refused(reports.parameters_of, file)
    nbformat.read(reports.find("compress"), 4)


def test_files_of_experts_scores_are_checked(tmp_path: Path) -> None:
    """Kind: a loader without a word on what it cannot read."""
    file = ExpertPatterns({"code": torch.rand(2, 4)}).save(tmp_path / "a.safetensors")
    assert ExpertPatterns.load(file).scores.keys() == {"code"}
    content = file.read_bytes()
    for damaged in (content[:30], content.replace(b"[\\", b"7 "), content.replace(b"tasks", b"tusks"), b""):
        file.write_bytes(damaged)
        assert "holds no scores of experts" in refused(ExpertPatterns.load, file)


@pytest.mark.parametrize("row", ["*,2," + "9" * 5000, ",2,1.5", "*,x,1.5", "*,2,1e400"])
def test_measured_times_that_are_no_numbers_are_named(row: str, tmp_path: Path) -> None:
    """Kind: cells of a table are numbers, texts or nothing, as the library guesses by the others."""
    layers: Any = [type("Layer", (), {"name": "a"})]
    file = tmp_path / "times.csv"
    file.write_text(f"layer,width,milliseconds\n{row}\n")
    assert refused(layer_times, str(file), layers, [2]).startswith("times: ")
    file.write_text("layer,width,milliseconds\n *,2,1.5\n")
    assert layer_times(str(file), layers, [2]).tolist() == [[1.5]]


def test_a_table_without_rows_is_refused_as_one() -> None:
    """Kind: an empty column has no type, so what is done to its cells has another."""
    for kind in ("str", "object", "float"):
        empty = pd.DataFrame({"text": pd.Series([], dtype=kind), "label": pd.Series([], dtype=kind)})
        assert "0 rows are too few" in refused(rows.check_columns, empty, "regression", "text", "label", None)


def test_every_split_of_a_saved_subject_is_checked() -> None:
    """Kind: the first of several like things is checked, the others fail where they are used."""
    first = {"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
    check_alike({"train": first, "test": {k: v[:2] if v.ndim == 1 else v[:2, :5] for k, v in first.items()}})
    for wrong in (
        {"labels": first["labels"]},
        first | {"labels": torch.zeros(3, dtype=torch.long)},
        first | {"labels": torch.zeros(4)},
        {name: column[:0] for name, column in first.items()},
    ):
        assert "the split 'test'" in refused(check_alike, {"train": first, "test": wrong})


def square(params: dict[str, Any], trial: Any) -> dict[str, float]:
    return {"value": (params["x"] - 3.0) ** 2}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two trials, in one file."""
    folder = tmp_path_factory.mktemp("ledger")
    Sweep("study", {"x": [1, 2]}, square, storage=f"sqlite:///{folder / 'live.sqlite'}").run(workers=1)
    connection = sqlite3.connect(folder / "live.sqlite")
    connection.execute("update workbench_trials set state = 'waiting', owner = '' where number = 1")
    connection.commit()
    connection.execute(f"vacuum into '{folder / 'whole.sqlite'}'")
    connection.close()
    return folder / "whole.sqlite"


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("update workbench_trials set params = '[1'", "its params is"),
        ("update workbench_trials set attempts = 'x'", "its attempts is"),
        ("update workbench_trials set beat = null", "its beat is"),
        ("update workbench_trials set result = 'None' where number = 1", "its result is"),  # a waiting one's
        ("update workbench_trials set state = 'odd'", "its state is"),
        ("""update workbench_trials set params = '{"y": 1}'""", "it has the fields y, not x"),
        ("delete from workbench_studies", "not the sweep"),
        ("alter table workbench_trials drop column beat", "no such column"),
        ("update workbench_studies set spec = 7", "a different sweep"),
        ("delete from studies", "storage: "),
        ("alter table trials rename column number to other; delete from workbench_studies", "storage: "),
    ],
)
def test_a_damaged_ledger_is_refused_at_once(statement: str, told: str, ledger: Path, tmp_path: Path) -> None:
    """Kind: a database that somebody else has written to is waited for, or believed."""
    file = Path(shutil.copy(ledger, tmp_path / "damaged.sqlite"))
    connection = sqlite3.connect(file)
    connection.executescript(statement)
    connection.commit()
    connection.close()
    began = time.monotonic()
    said = refused(Sweep("study", {"x": [1, 2]}, square, storage=f"sqlite:///{file}").run, workers=1)
    assert told in said and time.monotonic() - began < 30


def test_a_file_that_is_no_database_any_more_is_refused_at_once(ledger: Path, tmp_path: Path) -> None:
    """The same, for the bytes of the file."""
    for place in (18, 0, 100, 4096):
        content = bytearray(ledger.read_bytes())
        content[place : place + 8] = b"\x7f" * 8
        file = tmp_path / f"{place}.sqlite"
        file.write_bytes(content)
        began = time.monotonic()
        assert refused(Sweep("study", {"x": [1, 2]}, square, storage=f"sqlite:///{file}").run, workers=1)
        assert time.monotonic() - began < 30


def test_a_stored_state_has_the_form_of_the_fresh_one() -> None:
    """Kind: what a checkpoint holds is put in place before anybody has looked whether it can be that."""
    fresh = {"lr": 0.1, "betas": (0.9, 0.99), "on": True, "best": None, "draw": torch.zeros(3)}
    assert unlike(fresh | {"best": 2.0, "lr": 1, "betas": [0.5, 0.5]}, fresh, "state") is None
    for name, wrong in {"lr": "x", "betas": 0.9, "on": 1, "draw": torch.zeros(4)}.items():
        assert unlike(fresh | {name: wrong}, fresh, "state") == f"state.{name}"
    assert unlike({}, fresh, "state") == "state.lr"


@pytest.mark.parametrize("kept", [[], [2], [1], [1, 3], [2, 3], [1, 2, 3]])
def test_a_history_that_lacks_steps_is_not_gone_on_with(kept: list[int]) -> None:
    """Kind: what is missing looks like what has not been there yet; a run that goes on from such a history
    ends with a curve that lacks its beginning.
    """
    state = {"step": 3, "position": 24, "items": 24, "batch_size": 8, "stop": False, "seconds": 1.0}
    rows = [{"step": step, "loss": 1.0, "gradient_norm": 1.0} for step in kept]
    run: Any = types.SimpleNamespace(steps=4)
    for skipped, whole in ((0, [1, 2, 3]), (1, [2, 3]), (3, [])):
        if kept == whole:
            check_course(state | {"skipped": skipped}, rows, run)
        else:
            with pytest.raises(ValueError, match="its history has"):
                check_course(state | {"skipped": skipped}, rows, run)


@pytest.mark.skipif(os.name != "posix", reason="processes end together on POSIX systems")
def test_temporary_folders_of_killed_processes_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: a private folder among the system's temporary files outlives a process that was killed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    script = (
        "import time\nfrom workbench.storage.writing import scratch\n"
        "with scratch() as place:\n    (place / 'a').write_text('x')\n"
        "    print(flush=True)\n    time.sleep(60)\n"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        with scratch():
            assert len(list(tmp_path.glob(SCRATCH + "*"))) == 2  # a living one's stays
        process.kill()
        process.wait()
        assert len(list(tmp_path.glob(SCRATCH + "*"))) == 1
        with scratch() as place:
            assert list(tmp_path.glob(SCRATCH + "*")) == [place]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="processes end together on POSIX systems")
def test_the_process_that_opens_a_saved_subject_again_ends_with_its_parent(tmp_path: Path) -> None:
    """Kind: a child that was started for one answer lives on when nobody waits for it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = subprocess.run(
            [sys.executable, "-m", "workbench.storage.reopened", "saved", str(tmp_path), "test", "1"],
            env=os.environ | {PARENT: str(gone.pid)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1 and "no config.json" not in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
def test_workers_that_have_nothing_to_do_end_with_their_parent(tmp_path: Path) -> None:
    """Kind: a child that was started for one answer lives on when nobody waits for it."""
    code = (
        "import joblib, os, sys, time\n"
        "from workbench.storage.together import pool\n"
        "with pool('loky', 2):\n"
        "    found = joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(8))\n"
        "print(*sorted(set(found)), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert workers and parent.pid not in workers
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    parent.stdout.close()
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
