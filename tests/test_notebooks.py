"""Every notebook is committed clean and runs headless on small settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest

from tests.conftest import new_cache
from workbench import reports

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def runs_table(folder: Path) -> str:
    """Runs on a known law with 1 % noise, with other column names."""
    noise = np.random.default_rng(0)
    rows = [
        {"N": n, "D": n * r, "val": (1.7 + 400 * n**-0.34 + 410 * (n * r) ** -0.28) * noise.normal(1, 0.01)}
        for n in (1e7, 3e7, 1e8, 3e8, 1e9)
        for r in (5, 10, 20, 40, 80)
    ]
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    return str(folder / "runs.csv")


SMALL: dict[str, Any] = {
    "compress": {
        "subject": "digits-vit",
        "sparsities": [0.5, 0.8],
        "bits": [3, 4],
        "group_size": 16,
        "combined": [[0.5, 4]],
        "probes": 2,
        "steps": 6,
        "gradients": 64,
        "calibration_examples": 64,
        "curvature_examples": 16,
    },
    "learning-rate-batch-size": {
        "subject": "digits-softmax",
        "examples": 256,
        "learning_rate_points": 3,
        "batch_sizes": [8, 32],
        "noise_groups": 6,
        "noise_size": 8,
        "target_batches": [8, 32, 128],
        "target_learning_rate_low": 0.01,
        "target_learning_rate_high": 0.16,
        "workers": 1,
    },
    "schedules": {
        "subject": "digits-softmax",
        "schedules": "cosine,rex",
        "examples": 256,
        "learning_rate_points": 1,
        "seeds": 2,
        "budgets": [1.0],
        "workers": 1,
    },
    "optimizers": {
        "subject": "digits-softmax",
        "optimizers": "adamw,lion",
        "examples": 256,
        "learning_rate_points": 2,
        "seeds": 2,
        "workers": 1,
    },
    "quantization": {
        "subject": "digits-vit",
        "layers": "*layers.0.*",
        "bits": [3, 4],
        "formats": ["int", "nf4"],
        "group_size": 16,
        "examples": 16,
        "curvature_examples": 4,
        "test_examples": 32,
    },
    "sparsity": {
        "layers": "*layers.0.*",
        "maps": "magnitude,wanda",
        "methods": ["magnitude", "wanda"],
        "sparsities": [0.5, 0.8],
        "seeds": [0, 1],
        "recovery_steps": 2,
        "calibration_examples": 16,
        "gradients": 16,
        "training_methods": ["static", "dsl"],
        "training_steps": 12,
    },
    "scaling": {"columns": "params=N,tokens=D,loss=val", "resamples": 20, "against": ["kaplan"]},
    "spectrum": {"layers": "*layers.0.*", "probes": 2, "steps": 4, "examples": 8},
}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebooks_are_committed_without_outputs(file):
    notebook = nbformat.read(file, 4)
    nbformat.validate(notebook)
    assert len({cell["id"] for cell in notebook.cells}) == len(notebook.cells)
    assert "widgets" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "def " not in cell.source, "notebooks hold no functions"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) <= 1


def figures_of(notebook: Path) -> list[dict[str, Any]]:
    outputs = [o for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" for o in c.outputs]
    return [
        o["data"]["application/vnd.plotly.v1+json"]
        for o in outputs
        if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]


@pytest.fixture(scope="module")
def killed_and_run_again(tmp_path_factory: pytest.TempPathFactory) -> reports.ReportPaths:
    """The compression report from the command line: killed with kernel and all once some of the work is done,
    then asked for again.
    """
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"WORKBENCH_CACHE": str(new_cache(folder / "cache"))}
    out, given = (
        folder / "out",
        [
            f"--{key.replace('_', '-')}={json.dumps(value) if not isinstance(value, str) else value}"
            for key, value in SMALL["compress"].items()
        ],
    )
    command = [sys.executable, "-m", "workbench.cli", "report", "compress", "--out", str(out), *given]
    first = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while (
        not list(folder.glob("cache/results/*")) and time.monotonic() < until
    ):  # some of the work is done, most is not
        time.sleep(0.05)
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "compress.html").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return reports.ReportPaths(
        out / "compress.ipynb", out / "compress.html", again.stderr if again.returncode else None
    )


@pytest.mark.parametrize("name", [f.stem for f in NOTEBOOKS if f.stem in SMALL and f.stem != "compress"])
def test_reports_run_headless_and_show_their_figures(name, tmp_path):
    given = SMALL[name] | ({"runs": runs_table(tmp_path)} if name == "scaling" else {})
    shows_its_figures(reports.render(name, given, tmp_path))


def shows_its_figures(done: reports.ReportPaths) -> None:
    assert done.error is None, done.error
    figures = figures_of(done.notebook)
    assert figures and all(f["data"] for f in figures)
    assert done.html.stat().st_size < 3e6 and "https://cdn" not in done.html.read_text()


def test_a_killed_report_leaves_nothing_that_stops_the_next(killed_and_run_again):
    shows_its_figures(killed_and_run_again)
    assert killed_and_run_again.html.stat().st_size > 1e5


def test_the_compression_report_says_what_it_must(killed_and_run_again):
    figures = figures_of(killed_and_run_again.notebook)
    titles = json.dumps([f["layout"]["title"] for f in figures])
    for words in ("pruning", "quantization", "Quality against size", "Loss change"):
        assert words in titles
    curves = {t["name"] for f in figures for t in f["data"] if "name" in t}
    assert {"magnitude", "Wanda", "oBERT", "round to nearest", "GPTQ", "oBERT, then GPTQ"} <= curves


def test_a_failing_cell_keeps_what_was_done_and_names_the_error(tmp_path):
    done = reports.render("compress", SMALL["compress"] | {"group_size": 0}, tmp_path)
    assert done.error is not None and "group_size" in done.error
    assert done.notebook.exists() and done.html.exists()
