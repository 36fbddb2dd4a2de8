"""What a run will hold is said, and refused, before a weight is read."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import workbench
from workbench.cli import main
from workbench.curvature.studies.spectrum import Spectrum
from workbench.errors import BadInput, Notice
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.storage.forecast import Forecast, bytes_of, main_memory
from workbench.subjects.subject import Subject

WALKS = [
    Quantize(rounding="gptq", predict_examples=0, test_examples=0, calibration_examples=32),
    Quantize(rounding="gptq", predict_examples=2, test_examples=4, calibration_examples=32),
    Prune(method="wanda", predict_examples=0, calibration_examples=32),
    Prune(method="sparsegpt", predict_examples=0, calibration_examples=32),
]
IDS = ["gptq", "gptq with its prediction", "wanda", "sparsegpt"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("800mb", 8 * 10**8), (1234, 1234), ("7", 7), (".5k", 500)],
)
def test_bytes_are_read_with_their_units(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["2 apples", "-1", "0", "0.0001", "", "GB", "1e9GB", "nan", True])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(BadInput, match="memory: .* such as 800MB"):
        bytes_of(text)


@pytest.fixture
def llama(checkpoints):
    return workbench.subject(checkpoints["llama"], data="random", max_length=12)


@pytest.mark.parametrize("made", WALKS, ids=IDS)
def test_too_little_is_refused_before_anything_is_read_with_what_works(made, llama, monkeypatch):
    """Kind: a run that cannot fit reads the model, computes, and ends for want of memory. The limit that the
    message names is enough.
    """

    def read(*_, **__):
        raise AssertionError("something was read")

    with monkeypatch.context() as closed:
        for name in ("fingerprint", "check_finite", "prepared", "evaluate"):
            closed.setattr(Subject, name, property(read) if name == "fingerprint" else read)
        with pytest.raises(BadInput, match=r"^memory: 1 kB is too little: .* holds .*\(weights") as told:
            made.run(llama, Progress(), cache=False, memory="1KB")
    least = re.search(r"give --memory (\w+) or more", str(told.value))
    assert least is not None
    result = made.run(llama, Progress(), cache=False, memory=least[1])
    assert result.provenance["memory"] == bytes_of(least[1])


def test_the_limit_is_kept_and_changes_nothing(llama):
    """Neither the key nor a bit."""
    made = WALKS[3]
    free = made.run(llama, Progress(), cache=False)
    held = made.run(llama, Progress(), cache=False, memory="3GB")
    assert held.provenance["memory"] == 3 * 10**9 and held.provenance["key"] == free.provenance["key"]
    assert held.facts == free.facts and held.table.equals(free.table)
    for ours, theirs in zip(held.subject.layers(), free.subject.layers(), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_more_than_is_free_is_refused_where_nobody_gives_a_limit(llama, monkeypatch):
    monkeypatch.setattr("workbench.instruments.free_bytes", lambda device: 100_000)
    with pytest.raises(BadInput, match="memory: 80 kB, 80% of what is free, is too little"):
        WALKS[0].run(llama, Progress(), cache=False)


def test_fewer_examples_are_offered_where_they_are_enough(llama):
    found = WALKS[0].foretold_memory(llama.with_split("calibration", llama.split("train")))
    assert list(found.smaller) == ["--calibration-examples 16"]
    less = found.smaller["--calibration-examples 16"]
    assert less < found.total
    with pytest.raises(BadInput, match="or --calibration-examples 16, which holds"):
        found.check("quantize", less, given=True)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "vit", "mixtral"])
def test_every_architecture_has_a_forecast(architecture, checkpoints):
    on = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    size = sum(p.numel() * p.element_size() for p in on.model.parameters())
    for made in WALKS:
        assert made.foretold_memory(on).total > size / 4


def test_an_instrument_that_does_not_know_says_so(llama):
    with pytest.warns(Notice, match="memory: spectrum does not say what it will hold"):
        Spectrum(steps=2, probes=1, examples=4).run(llama, Progress(), cache=False, memory="4GB")


def test_less_than_the_weights_is_refused_by_every_instrument() -> None:
    """Kind: a limit that nothing holds to."""
    with pytest.raises(BadInput, match="less than the subject's weights"):
        Prune(sparsity=0.5).run(workbench.subject("digits-softmax"), memory="1KB", cache=False)


def test_a_dry_run_only_tells(checkpoints, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    given = ["--subject", str(checkpoints["llama"]), "--data", "random", "--max-length", "12", "--dry-run"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["run", "wanda", *given, "--predict-examples", "0"]) == 0
        told = capsys.readouterr().out
        assert re.search(
            r"^prune holds about \d+ \w+ at most \(weights .*\), and takes about \d+ s$", told, re.M
        )
        assert main(["run", "spectrum", *given]) == 0
        assert "spectrum: what it holds" in capsys.readouterr().out
        assert main(["run", "wanda", *given, "--memory", "1KB"]) == 2
        assert "is too little" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_field_of_that_name_stays_the_instruments(capsys):
    """`learning-rate-range` smooths its losses by an average with a memory."""
    assert main(["run", "learning-rate-range", "--help"]) == 0
    assert capsys.readouterr().out.count("--memory") == 1
    assert main(["run", "learning-rate-range", "--subject", "digits-softmax", "--memory", "2GB"]) == 2
    assert "memory: '2GB' is not a number" in capsys.readouterr().err


def test_what_is_free_is_the_smaller_of_the_machine_and_the_group(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1000 kB\n")
    assert main_memory(tmp_path, tmp_path) == 1000 << 10
    (tmp_path / "self/cgroup").write_text("0::/box\n")
    (tmp_path / "box").mkdir()
    (tmp_path / "box/memory.max").write_text("500000\n")
    (tmp_path / "box/memory.current").write_text("300000\n")
    (tmp_path / "box/memory.stat").write_text("anon 5\ninactive_file 50000\n")
    assert main_memory(tmp_path, tmp_path) == 250_000
    (tmp_path / "box/memory.max").write_text("max\n")
    assert main_memory(tmp_path, tmp_path) == 1000 << 10
    assert main_memory(tmp_path / "none", tmp_path) is None


def test_a_forecast_in_words():
    assert Forecast({"weights": 2 * 10**9, "workspace": 0}, seconds=200).words() == (
        "holds about 2.00 GB at most (weights 2.00 GB), and takes about 3 min"
    )
    assert Forecast({"weights": 10**6}, exact=False).words() == "holds 1 MB or more (weights 1 MB)"
