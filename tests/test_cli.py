from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench.cli import main
from workbench.storage import VERDICTS, verdict

MODULE = """
import torch, workbench
def net():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(200, 16)
    return workbench.subject(module, data={"inputs": x, "labels": x[:, :4].argmax(1)})
"""


@pytest.fixture()
def module_file(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(MODULE)
    return f"{file}:net"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prune_and_quantize_run_on_every_architecture(architecture, checkpoints, cache, tmp_path, capsys):
    source = ["--subject", str(checkpoints[architecture]), "--data", "random", "--max-length", "16"]
    out = tmp_path / "pruned"
    assert main(["run", "prune", *source, "--method", "wanda", "--sparsity", "0.5", "--out", str(out)]) == 0
    pruned = workbench.subject(out)
    for layer in pruned.layers():
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert (
        main(
            [
                "run",
                "quantize",
                "--subject",
                str(out),
                "--format",
                "int4",
                "--rounding",
                "gptq",
                "--group-size",
                "16",
                "--out",
                str(tmp_path / "both"),
            ]
        )
        == 0
    )
    both = workbench.subject(tmp_path / "both")
    for before, after in zip(pruned.layers(), both.layers(), strict=True):
        assert torch.equal(before.weight == 0, (after.weight == 0) & (before.weight == 0)), (
            "a pruned weight came back"
        )
    assert "loss" in capsys.readouterr().out


def test_a_plain_module_is_pruned_from_the_command_line(module_file, cache, capsys):
    assert main(["run", "prune", "--subject", module_file, "--method", "magnitude", "--sparsity", "0.5"]) == 0
    assert "sparsity 50 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "prune", "--subject", "no-such-model"], ["subject", "no-such-model", "known", "built-in"]),
        (["run", "prun", "--subject", "digits-vit"], ["instrument", "did you mean prune"]),
        (
            ["run", "prune", "--subject", "digits-vit", "--sparsty", "0.5"],
            ["sparsty", "did you mean --sparsity"],
        ),
        (["run", "prune", "--subject", "digits-vit", "--sparsity", "1.2"], ["sparsity", "1.2"]),
        (["run", "quantize", "--subject", "digits-vit", "--format.bits", "0"], ["format.bits", "0"]),
        (
            ["run", "prune", "--subject", "FOLDER", "--data", "random", "--layers", "*nothing*"],
            ["layers", "*nothing*"],
        ),
        (
            [
                "run",
                "prune",
                "--subject",
                "FOLDER",
                "--data",
                "TABLE",
                "--text-column",
                "text",
                "--label-column",
                "label",
            ],
            ["label-column", "text, other"],
        ),
        (["run", "prune", "--subject", "CUT", "--data", "random"], ["model.safetensors", "not a complete"]),
        (["run", "prune", "--subject", "PICKLE", "--data", "random"], ["pickle", "pytorch_model.bin"]),
        (["run"], ["instrument", "missing"]),
        (["run", "prune"], ["subject: is missing", "--subject"]),
        (["run", "magnitude"], ["subject: is missing"]),
        (
            ["run", "train", "--subject", "digits-vit", "--schedule", "power"],
            ["schedule.batch: is missing, and has no default"],
        ),
        (
            [
                "run",
                "train",
                "--subject",
                "digits-vit",
                "--schedule",
                "step",
                "--schedule.milestones",
                "0.9,0.1,7",
            ],
            ["schedule.milestones", "no rising shares"],
        ),
        (["paint"], ["command", "paint"]),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments, words, checkpoints, tmp_path, cache, capsys):
    pd.DataFrame({"text": ["a"] * 20, "other": [1] * 20}).to_csv(tmp_path / "t.csv", index=False)
    for name in ("cut", "pickle"):
        (tmp_path / name).mkdir()
        for file in checkpoints["bert"].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    places = {
        "FOLDER": checkpoints["bert"],
        "CUT": tmp_path / "cut",
        "PICKLE": tmp_path / "pickle",
        "TABLE": tmp_path / "t.csv",
    }
    assert main([str(places.get(a, a)) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0] or word == "known", lines[0]


@pytest.mark.parametrize("instrument", ["trace", "quantize"])
def test_a_result_does_not_replace_the_subject_it_is_of(instrument, tmp_path, monkeypatch, cache, capsys):
    """Kind 1: `--out` with the subject's own folder, which an earlier save had written, left no model there
    (a measurement), or another one.
    """
    folder = tmp_path / "kept"
    workbench.subject("digits-vit").save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.chdir(folder)
    for out in (str(folder), ".", "../kept"):
        assert main(["run", instrument, "--subject", str(folder), "--out", out]) == 2
        assert "is the folder of the subject" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_a_result_replaces_is_said_before_it_is_computed(cache, tmp_path, capsys):
    folder = tmp_path / "kept"
    trace = ["run", "trace", "--subject", "digits-softmax", "--out", str(folder)]
    assert main(trace) == 0 and "will replace" not in capsys.readouterr().err
    assert main([*trace, "--seed", "1", "--dry-run"]) == 0
    assert "holds a result of trace, which this run's result will replace" in capsys.readouterr().err


STEEP = """
import torch, workbench
from workbench.subjects import Subject
from workbench.subjects.tasks import CustomLoss
def steep():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 0.5)
    data = {"inputs": torch.ones(512, 1)}
    loss = CustomLoss(lambda output, batch: output.square().exp().mean())
    return Subject("steep", module, loss, {"train": data})
"""


def test_what_diverges_or_has_no_noise_is_told_in_words(cache, tmp_path, capsys, recwarn):
    """Fault 45: numbers that are none stand beside the word that says why, and no NaN is a fact."""
    (tmp_path / "steep.py").write_text(STEEP)
    source = ["--subject", f"{tmp_path / 'steep.py'}:steep"]
    options = ["--learning-rate", "100", "--optimizer", "sgd", "--schedule", "constant", "--steps", "20"]
    assert main(["run", "train", *source, *options]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "steps 2" in first and "diverged True" in first and "nan" not in first.lower()
    assert main(["run", "gradient-noise", *source]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "noise scale 0 (0 to inf)" in first and "nan" not in first.lower()
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_a_study_whose_every_run_fails_is_an_error(cache, tmp_path, capsys):
    """Fault 52, the whole command: a result on nothing is an error, in the words of what failed."""
    (tmp_path / "failing.py").write_text(FAILING)
    source = ["--subject", f"{tmp_path / 'failing.py'}:failing", "--examples", "64"]
    grid = ["--learning-rate-points", "3", "--batch-sizes", "8", "--start", "weights", "--workers", "1"]
    assert main(["run", "learning-rate-batch-size", *source, *grid]) != 0
    told = capsys.readouterr()
    assert "no trial finished" in told.err and "out of luck" in told.err


FAILING = """
import torch
from workbench.subjects import Subject
from workbench.subjects.tasks import CustomLoss
def refuse(output, batch):
    raise RuntimeError("out of luck")
def failing():
    splits = {name: {"inputs": torch.ones(64, 1)} for name in ("train", "validation")}
    return Subject("failing", torch.nn.Linear(1, 1), CustomLoss(refuse), splits)
"""


def test_help_lists_the_fields(capsys):
    assert main(["run", "quantize", "--help"]) == 0
    text = capsys.readouterr().out
    assert "bits" in text and "--subject" in text and "--seed" in text


def test_help_on_an_entry_is_that_of_the_instrument_it_is_chosen_in(capsys):
    assert main(["run", "adagrad", "--help"]) == 0
    text = capsys.readouterr().out
    assert "workbench run train" in text and "--optimizer" in text


def test_what_is_given_beside_a_method_stands_in_its_first_line(cache, capsys):
    """Kind: a line that says what runs, and is not what runs."""
    assert (
        main(["run", "wanda", "--subject", "digits-vit", "--method", "magnitude", "--sparsity", "0.3"]) == 0
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "wanda = prune --method wanda, with --method magnitude --sparsity 0.3"


def test_list_names_instruments_subjects_and_methods(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("spectrum", "prune", "quantize", "latency", "digits-softmax", "obert", "gptq"):
        assert word in text


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (None, "not measured"),
        ({"holds": True}, "holds"),
        ({"holds": False}, "does not hold"),
        ({"holds": None}, "cannot be shown here"),
        ({}, "cannot be shown here"),
        ({"holds": False, "gate": {"passed": False}}, "cannot be shown here"),
        ({"holds": True, "gate": {"passed": True}}, "holds"),
    ],
)
def test_a_verdict_is_one_of_four(record, found, tmp_path, monkeypatch, capsys):
    """What was found of a claim is said in the same words everywhere."""
    monkeypatch.setenv("WORKBENCH_EVIDENCE", str(tmp_path))
    card = workbench.method("wanda")
    if record is not None:
        (tmp_path / card.family).mkdir()
        (tmp_path / card.family / "wanda.json").write_text(json.dumps(record))
        assert card.verdict() == found
    assert verdict(record) == found and found in VERDICTS
    assert main(["list", "methods"]) == 0
    *lines, counts, equal = capsys.readouterr().out.splitlines()[1:]
    assert re.fullmatch(r"\d+ found equal to their equations or to others' code, \d+ of them to .*", equal)
    assert record is None or any(line.split()[0] == "wanda" and f" {found} " in line for line in lines)
    told = dict(part.rsplit(" ", 1) for part in counts.partition(": ")[2].split(", "))
    assert tuple(told) == VERDICTS and sum(int(n) for n in told.values()) == len(lines)


def test_the_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "list", "subjects"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "bytelm" in done.stdout


def test_the_readme_lists_every_instrument_and_subject():
    from tests.conftest import ROOT
    from workbench.names import catalog
    from workbench.subjects.registry import BUILTINS

    text = (ROOT / "README.md").read_text()
    ours = [name for name, cls in catalog().items() if cls.__module__.startswith("workbench.")]
    assert [name for name in [*ours, *BUILTINS] if f"`{name}`" not in text] == []


def test_lists_are_written_with_or_without_brackets():
    from workbench.values import read as value_of

    assert value_of("8, 32", tuple[int, ...]) == value_of("[8, 32]", tuple[int, ...]) == [8, 32]
    assert value_of("*layers.0.*,head", list[str]) == ["*layers.0.*", "head"]
    assert value_of("1e-3,0.1", tuple[float, ...]) == [0.001, 0.1]


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "methods"], ["run", "quantize", "--help"], ["show", "wanda"]]
)
def test_a_reader_that_leaves_early_is_no_error(arguments):
    """Kind (fault 23): whoever reads the output may stop at any line (`workbench list | head`); the last two
    are examples that were not listed.
    """
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "workbench.cli", *arguments], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_that_falls_into_a_finalizer_is_heard(monkeypatch, capfd):
    """Kind: Python drops what is raised where it cleans up, the user's Ctrl-C too."""

    def computes(arguments):
        class Held:
            def __del__(self):
                raise KeyboardInterrupt

        Held()
        time.sleep(5)  # where it is heard
        return 0

    monkeypatch.setattr("workbench.commands.listing.list_", computes)
    assert main(["list"]) == 130
    told = capfd.readouterr().err
    assert told == "workbench: interrupted\n"
