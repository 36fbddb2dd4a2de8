"""The strict notebook runner: types, unknown names, failures, the interpreter,
and files that appear when complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tests.notebook import write
from workbench import BadInput, progress, reports
from workbench.cli import main

DECLARED = """\
subject: str = "digits # not a comment"  # what to measure
steps: int = 3  # how many
ratio: float = 0.5
flag: bool = False
layers: list[str] = []  # globs
limit: int | None = None  # none: all
shape = "wide"
"""


@pytest.fixture()
def book(tmp_path: Path) -> Path:
    return write(
        tmp_path / "small.ipynb",
        "#md # Small report\n\n## Values",
        "import json, os, sys; print(json.dumps([subject, steps, ratio, flag, layers, limit, shape, "
        "sys.executable,"
        " os.environ['WORKBENCH_HEADLESS'], os.getcwd()]))",
        parameters=DECLARED,
    )


def text_of(notebook: Path) -> str:
    return "".join(
        o.text
        for c in nbformat.read(notebook, 4).cells
        for o in c.get("outputs", [])
        if o.output_type == "stream"
    )


@pytest.mark.parametrize("text", ["0.*,1.*", pytest.param('["0.*", "1.*"]', marks=pytest.mark.long)])
def test_lists_of_a_report_are_written_with_or_without_brackets(
    book: Path, tmp_path: Path, text: str
) -> None:
    """Fault 32, through the command: two globs, not one text that is spelled out by its letters."""
    assert main(["report", str(book), "--layers", text, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(text_of(tmp_path / "out" / book.name))[4] == ["0.*", "1.*"]


def test_declarations_are_read_with_types_defaults_and_help(book: Path) -> None:
    known = reports.parameters_of(book)
    assert list(known) == ["subject", "steps", "ratio", "flag", "layers", "limit", "shape"]
    assert known["subject"].default == "digits # not a comment" and known["subject"].help == "what to measure"
    assert known["layers"].annotation == list[str] and known["shape"].annotation is str


def test_values_arrive_with_their_types_in_this_interpreter(book: Path, tmp_path: Path) -> None:
    given = {"subject": "007", "steps": 2, "ratio": 1, "flag": True, "layers": ["a.*", "b'\"c"], "limit": 5}
    seen: list[tuple[str, int, int]] = []
    done = reports.render(book, given, tmp_path / "out", show=lambda *state: seen.append(state))
    assert done.error is None and done.html == tmp_path / "out" / "small.html"
    values = json.loads(text_of(done.notebook))
    assert values[:7] == ["007", 2, 1.0, True, ["a.*", "b'\"c"], 5, "wide"]
    assert values[7] == sys.executable and values[8] == "1"
    assert values[9] == str(Path.cwd())  # relative paths mean what they mean to the caller
    assert seen[-1][0] == "done" and any(what == "Values" for what, _, _ in seen)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".workbench-files.json",
        "small.html",
        "small.ipynb",
    ]  # no drafts left
    page = done.html.read_text()
    assert "Small report" in page and "<dd>007</dd>" in page
    assert (
        "<th scope='row'>shape</th><td><code>&#x27;wide&#x27;</code></td>" in page
    )  # settings left at their default are stated too


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"step": 3}, ["step", "unknown", "did you mean steps?", "subject, steps"]),
        ({"steps": "3"}, ["steps", "'3'", "integer", "default 3"]),
        ({"steps": 2.5}, ["steps", "2.5", "integer"]),
        ({"flag": 1}, ["flag", "1", "boolean"]),
        ({"flag": "true"}, ["flag", "'true'", "boolean"]),
        ({"layers": "a"}, ["layers", "'a'", "list"]),
        ({"shape": 7}, ["shape", "7", "string"]),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(
    book: Path, tmp_path: Path, given: dict, words: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        reports.render(book, given, tmp_path / "out")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_reports_and_notebooks_without_parameters(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown"):
        reports.parameters_of("no-such-report")
    with pytest.raises(BadInput, match="not a file"):
        reports.parameters_of(tmp_path / "none.ipynb")
    with pytest.raises(BadInput, match="takes no parameters"):
        reports.parameters_of(write(tmp_path / "plain.ipynb", "1"))
    with pytest.raises(BadInput, match="not a list"):
        reports.parameters_of(write(tmp_path / "odd.ipynb", parameters="x = open('f')"))


def test_a_failing_cell_keeps_what_was_done_and_names_the_error(tmp_path: Path) -> None:
    book = write(
        tmp_path / "bad.ipynb",
        "#md # Bad\n\n## First",
        "print('before')",
        "#md ## Division",
        "1 / 0",
        "print('after')",
        parameters="n: int = 1",
    )
    done = reports.render(book, {"n": 2}, tmp_path / "out")
    assert done.error == "bad stopped in 'Division': ZeroDivisionError: division by zero"
    assert text_of(done.notebook).strip() == "before"
    html = done.html.read_text()
    assert "incomplete" in html and "ZeroDivisionError" in html and "before" in html
    assert "papermill-error" not in html and "papermill-error" not in done.notebook.read_text()


def test_a_dying_kernel_and_a_timeout_are_named(tmp_path: Path) -> None:
    killed = write(
        tmp_path / "dead.ipynb",
        "#md ## Kill",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        parameters="n: int = 1",
    )
    done = reports.render(killed, {}, tmp_path / "out")
    assert (
        done.error is not None
        and "kernel died" in done.error
        and done.html.exists()
        and done.notebook.exists()
    )
    slow = write(
        tmp_path / "slow.ipynb", "#md ## Sleep", "import time; time.sleep(60)", parameters="n: int = 1"
    )
    done = reports.render(slow, {}, tmp_path / "out", timeout=1)
    assert (
        done.error is not None and "longer than 1 s" in done.error and "incomplete" in done.html.read_text()
    )


def test_the_kernels_own_progress_reaches_the_caller(tmp_path: Path) -> None:
    book = write(
        tmp_path / "long.ipynb",
        "#md ## Lanczos",
        "import os, pathlib, time\nfile = pathlib.Path(os.environ['WORKBENCH_PROGRESS_FILE'])\n"
        "file.write_text('probe 3/8')\n"
        "while not pathlib.Path(seen).exists(): time.sleep(0.05)",
        parameters="seen: str = ''",
    )
    mark, states = tmp_path / "seen", []

    def show(what: str, done: int, total: int) -> None:
        states.append(what)
        if what == "Lanczos: probe 3/8":
            mark.touch()

    assert reports.render(book, {"seen": str(mark)}, tmp_path / "out", show=show, timeout=60).error is None
    assert "Lanczos: probe 3/8" in states


def test_without_a_terminal_a_line_comes_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: a long computation that says nothing looks like one that hangs."""
    clock = iter([0.0, 1.0, 9.0, 10.5, 12.0])
    monkeypatch.setattr(reports.time, "monotonic", lambda: next(clock))
    show = reports.TerminalBar("compress")
    for what in ("Runs", "Runs: run 1 of 7", "Runs: run 2 of 7", "Runs: run 3 of 7", "Curvature"):
        show(what, 4, 30)
    said = capsys.readouterr().err.splitlines()
    assert said == ["compress 4/30 Runs", "compress 4/30 Runs: run 3 of 7", "compress 4/30 Curvature"]


def test_a_headless_run_says_of_which_part_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clock = tmp_path / "progress", [100.0]
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    monkeypatch.setenv("WORKBENCH_PROGRESS_FILE", str(file))
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    whole = progress.TextProgress()
    inner = whole.within("run 2 of 7")
    for done, seconds in ((0, 0), (10, 30)):
        clock[0] += seconds
        inner.show("block after block", done, 30)
    assert file.read_text() == "run 2 of 7, block after block 10/30, about 60 s left\n"
    whole.stop.set()
    assert inner.stopped and not inner.watched


def test_without_a_terminal_a_run_says_every_ten_seconds_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.delenv("WORKBENCH_HEADLESS", raising=False)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    told = progress.TextProgress()
    for done in range(31):
        told.show("blocks", done, 30)
        clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "workbench: blocks 11 of 30, about 19 s left",
        "workbench: blocks 22 of 30, about 8 s left",
    ]


def test_parameter_files_round_trip(tmp_path: Path) -> None:
    values = {
        "subject": "yes",
        "settings": {
            "sparsity": 0.7,
            "layers": None,
            "ratio": 1e-4,
            "names": ["a", "007"],
            "flag": True,
            "text": "a: b # c",
        },
    }
    assert yaml.safe_load(reports.write_parameters(tmp_path / "p.yaml", values).read_text()) == values
