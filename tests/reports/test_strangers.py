"""A stranger's notebook runs nothing before it is run; a report replaces nobody's file, and its kernel ends
with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.notebook import write
from workbench import BadInput, reports
from workbench.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "annotation",
    [
        "[c for c in ().__class__.__base__.__subclasses__()][0]",
        "(lambda: open('ran', 'w'))() or int",
        "list[open('ran', 'w')]",
        "str.__class__",
        "list[str, int]",
        "int if open('ran', 'w') else int",
        "'int'",
        "dict",
        "|".join(["int"] * 4000),
    ],
)
def test_annotations_are_read_never_evaluated(tmp_path: Path, annotation: str, capsys, monkeypatch) -> None:
    """Fault 35: code ran from a stranger's notebook with `--help` alone."""
    monkeypatch.chdir(tmp_path)
    book = write(tmp_path / "nb.ipynb", "1", parameters=f"n: {annotation} = {{}}")
    if annotation == "dict":
        assert reports.parameters_of(book)["n"].annotation is dict
        return
    assert main(["report", str(book), "--help"]) == 2
    with pytest.raises(BadInput) as caught:
        reports.check(book, {"n": 1})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert [p.name for p in tmp_path.iterdir()] == ["nb.ipynb"]


def test_what_is_no_notebook_is_one_line(tmp_path: Path) -> None:
    cells = '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'
    for text in ("", "{", "[]", "7", "{}", cells):
        (tmp_path / "nb.ipynb").write_text(text)
        with pytest.raises(BadInput) as caught:
            reports.parameters_of(tmp_path / "nb.ipynb")
        assert "\n" not in str(caught.value)


def test_a_report_replaces_neither_its_notebook_nor_anybodys_page(tmp_path: Path, monkeypatch) -> None:
    """Fault 1: `--out .` replaced the source; a folder's own page of that name was lost. Braces: fault 24."""
    monkeypatch.chdir(tmp_path)
    book = write(tmp_path / "study.ipynb", "print(n)", parameters="n: int = 1")
    before = book.read_bytes()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(BadInput, match="would replace the notebook"):
            reports.render("study.ipynb", {}, ".", **options)
    out = tmp_path / "rep{x} {n}"
    out.mkdir()
    (out / "study.html").write_text("mine")
    with pytest.raises(BadInput, match=r"study\.html.*--overwrite"):
        reports.render(book, {}, out)
    assert book.read_bytes() == before and (out / "study.html").read_text() == "mine"
    done = reports.render(book, {"n": 7}, out, overwrite=True, show=lambda *_: None)
    assert done.error is None and "<pre" in done.html.read_text()
    done.html.write_text("edited")
    with pytest.raises(BadInput, match=r"study\.html"):
        reports.render(book, {}, out)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_report_takes_its_kernel_and_workers_with_it(tmp_path: Path, sign: signal.Signals) -> None:
    """Faults 33 and 42: workers of a killed report stayed for minutes; Ctrl-C printed a traceback."""
    pids = tmp_path / "pids"
    book = write(
        tmp_path / "slow.ipynb",
        "import os, subprocess, sys, time\n"
        "p = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}} ')\n"
        "time.sleep(200)",
        parameters="n: int = 1",
    )
    command = [sys.executable, "-m", "workbench.cli", "report", str(book), "--out", str(tmp_path / "o")]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if pids.exists() and len(pids.read_text().split()) == 2:
            break
        time.sleep(0.1)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    started = [int(pid) for pid in pids.read_text().split()]
    for _ in range(100):
        if not any(alive(pid) for pid in started):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in started)
    if sign == signal.SIGINT:
        assert "interrupted" in said.splitlines()[-1] and "Traceback" not in said
        assert (tmp_path / "o" / "slow.html").exists()


def alive(pid: int) -> bool:
    """Running, and not only waiting for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
