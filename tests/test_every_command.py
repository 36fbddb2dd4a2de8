"""Kind (fault 40): every instrument is called from the command line, through `main(argv)`: its help tells
every field, and a small run ends with a result or with one line, never with a traceback.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

import workbench
from workbench.cli import main

MODULE = """
import torch, workbench
from torch import nn

def make():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    sizes = {"train": 640, "calibration": 64, "validation": 32, "test": 32}
    data = {
        split: {"inputs": torch.randn(size, 8), "labels": torch.randint(4, (size,))}
        for split, size in sizes.items()
    }
    return workbench.subject(module, data=data)
"""
#: What makes a run small, where an instrument has the field.
SMALL = {
    "steps": 4,
    "trials": 2,
    "examples": 64,
    "repeats": 2,
    "warmup": 0,
    "resamples": 20,
    "workers": 1,
    "seeds": 1,
    "gradients": 32,
    "checks": "false",
}
#: Runs of more than two seconds.
LONG = {
    "allocate",
    "batch-size-theory",
    "damp-doctor",
    "fisher-sweep",
    "optimizer-comparison",
    "ptq-or-qat",
    "self-tuning",
    "subtune",
    "top-eigenvalues",
}
#: The package's own; other tests register theirs.
INSTRUMENTS = sorted(n for n, cls in workbench.catalog().items() if cls.__module__.startswith("workbench."))


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(MODULE)
    draw = np.random.default_rng(0)
    size = np.geomspace(1e6, 1e9, 30)
    tokens = draw.permutation(np.geomspace(1e8, 1e11, 30))
    loss = 1.7 + 400 / size**0.34 + 410 / tokens**0.28 + draw.normal(0, 0.005, 30)
    table = pd.DataFrame({"params": size, "tokens": tokens, "loss": loss, "flops": 6 * size * tokens})
    table.to_csv(tmp_path / "runs.csv", index=False)
    return {"subject": f"{tmp_path / 'net.py'}:make", "runs": str(tmp_path / "runs.csv")}


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_help_tells_every_field(name, capsys):
    assert main(["run", name, "--help"]) == 0
    told = capsys.readouterr().out
    for field in workbench.catalog()[name].parameters():
        assert f"--{field.replace('_', '-')}" in told, field
    for written in ("Ge(", "Lt(", "annotation=", "PydanticUndefined", "Literal[", "<class"):
        assert written not in told, "fault 34: how pydantic writes a bound is not how people do"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in INSTRUMENTS]
)
def test_a_small_run_ends_in_a_result_or_in_one_line(name, given, capsys):
    cls = workbench.catalog()[name]
    more = [
        part
        for field, value in SMALL.items()
        if field in cls.model_fields
        for part in (f"--{field.replace('_', '-')}", str(value))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["run", name, f"--{cls.on}", given[cls.on], *more])
    seen = capsys.readouterr()
    lines = [line for line in seen.err.splitlines() if line.startswith("workbench: ")]
    assert (code == 0 and seen.out.startswith(name)) or (code == 2 and lines), seen.err
    assert "Traceback" not in seen.err


def test_no_field_hides_an_option_of_the_command():
    """Two more of the kind: what a command takes beside the fields is never a field's name."""
    reserved = {"subject", "runs", "out", "no_cache", "plugins", "help", "dry_run", "fresh", "export"}
    for name, cls in workbench.catalog().items():
        assert not reserved & set(cls.model_fields), name
