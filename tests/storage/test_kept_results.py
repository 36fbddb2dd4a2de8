"""The cache: a slot that is damaged, gone or cannot be written costs the computation and no more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import workbench
from workbench.cli import main
from workbench.errors import BadInput, Notice
from workbench.instruments import SubjectInstrument
from workbench.results import Result
from workbench.storage import kept_results


class Counted(SubjectInstrument):
    """A number, and how often it was computed."""

    def _run(self, on, progress):
        with open(os.environ["COUNTED"], "a") as file:  # a variable would be in the key
            file.write("x")
        return self.result(pd.DataFrame({"x": [1.0, 2.0]}), {"sum": 3.0})


def computed() -> int:
    return len(Path(os.environ["COUNTED"]).read_text())


@pytest.fixture()
def net(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    x = torch.randn(40, 6)
    return workbench.subject(torch.nn.Linear(6, 3), data={"inputs": x, "labels": x[:, :3].argmax(1)})


def slot() -> Path:
    return kept_results.entries()[0].folder


@pytest.mark.parametrize("damage", ["bytes", "missing", "json", "empty", "file"])
def test_a_damaged_slot_is_computed_again_and_said(net, damage: str) -> None:
    """Fault 38: a damaged slot blocked its request for ever."""
    Counted().run(net)
    before, place = computed(), slot()
    if damage == "bytes":
        raw = bytearray((place / "table.parquet").read_bytes())
        raw[len(raw) // 2] ^= 1
        (place / "table.parquet").write_bytes(raw)
    elif damage == "missing":
        (place / "table.parquet").unlink()
    elif damage == "json":
        (place / "result.json").write_text("{")
    elif damage == "empty":
        for file in place.iterdir():
            file.unlink()
    else:
        shutil.rmtree(place)
        place.write_text("a file")
    if damage == "file":
        Counted().run(net)
    else:
        with pytest.warns(Notice, match="computed again"):
            assert Counted().run(net).facts == {"sum": 3.0}
    assert computed() == before + 1
    assert Counted().run(net).facts == {"sum": 3.0} and computed() == before + 1


def test_a_cache_that_cannot_be_written_loses_nothing(net, tmp_path) -> None:
    """Fault 38: the finished computation was thrown away with a traceback."""
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "results").write_text("a file where a folder has to be")
    with pytest.warns(Notice, match="not kept"):
        assert Counted().run(net).facts == {"sum": 3.0}


def test_results_lists_what_there_is_and_clears_it(net, capsys) -> None:
    Counted().run(net)
    Counted(seed=1).run(net)
    (slot() / "table.parquet").unlink()
    (kept_results.cache_folder() / "results" / ".workbench-draft-999999999-x").mkdir()
    assert main(["results"]) == 0
    text = capsys.readouterr().out
    assert "counted" in text and "damaged: table.parquet is missing" in text and "1 results" in text
    assert [e.state for e in kept_results.entries()].count("stale") == 1
    assert main(["results", "--clear", "stale"]) == 0 and main(["results", "--clear", "damaged"]) == 0
    assert [e.state for e in kept_results.entries()] == ["whole"]
    assert main(["results", "--clear", "everything"]) == 2
    assert main(["results", "--clear"]) == 0 and kept_results.entries() == []


def test_saved_results_of_strangers_are_checked(net, tmp_path) -> None:
    """Fault 45: names of tables led out of the folder, any JSON was believed."""
    folder = Counted().run(net).save(tmp_path / "r")
    (folder / ".workbench-files.json").unlink()
    good = (folder / "result.json").read_text()
    for old, new in [
        ('"tables": []', '"tables": ["/../../x"]'),
        ('"tables": []', '"tables": 3'),
        ('"facts": {', '"facts": 1, "more": {'),
        ('"partial": false', '"partial": null'),
        ('"counted"', '"os.system"'),
        (
            "{",
            "[",
        ),
    ]:
        assert old in good
        (folder / "result.json").write_text(good.replace(old, new, 1))
        with pytest.raises(BadInput) as caught:
            Result.load(folder)
        assert "\n" not in str(caught.value)


def test_results_are_found_opened_compared_and_deleted(net, tmp_path, capsys) -> None:
    keys = [Counted(seed=seed).run(net).provenance["key"] for seed in (0, 1)]
    assert main(["results", "--instrument", "counted", "--since", "2000-01-01"]) == 0
    text = capsys.readouterr().out
    assert all(key[:8] in text for key in keys) and "sum 3" in text and "2 results" in text
    assert main(["results", "--instrument", "prune"]) == 0
    assert "0 results" in capsys.readouterr().out and main(["results", "--since", "2999"]) == 0
    page = tmp_path / "page.html"
    assert main(["results", "open", keys[0][:8], "--out", str(page)]) == 0
    assert "<h1>counted on " in page.read_text() and "data-figure" in page.read_text()
    capsys.readouterr()
    assert main(["results", "compare", *keys, "--out", str(tmp_path / "both.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("seed")] == [["0", "1"]]
    assert not any(line.startswith("device") for line in lines)  # the same in both
    assert main(["results", "delete", keys[0]]) == 0
    assert [entry.key for entry in kept_results.entries()] == [keys[1]]
    for wrong in (["open"], ["open", "nothing"], ["throw", keys[1]], ["list", "counted"]):
        capsys.readouterr()
        assert main(["results", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert kept_results.called("counted").key == keys[1]
