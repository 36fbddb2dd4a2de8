"""`workbench report scaling --runs FILE`: one command, one offline page with fit, intervals,
held-out error and plan.
"""

import nbformat
import numpy as np
import pandas as pd

from workbench.cli import main
from workbench.scaling import law


def test_report_from_a_foreign_table(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 5), np.logspace(9, 11, 5)))
    loss = law("chinchilla").predict(
        dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37), {"params": n, "tokens": d}
    )
    file = tmp_path / "mine.csv"
    pd.DataFrame(
        {"size": n, "D": d, "final": loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(25))}
    ).to_csv(file, index=False)
    command = [
        "report",
        "scaling",
        "--runs",
        str(file),
        "--columns",
        "params=size, loss=final",
        "--resamples",
        "50",
        "--flops",
        "1e22",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    page = (tmp_path / "out" / "scaling.html").read_text()
    assert "<script src=" not in page and "https://cdn" not in page
    notebook = nbformat.read(tmp_path / "out" / "scaling.ipynb", 4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    text = " ".join(str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    for wanted in (
        "runs 25",
        "converged",
        "extrapolation_error",
        "scaling-plan: loss",
        "law chinchilla, budget 1e+22 FLOPs",
        "band_error",
    ):
        assert wanted in text, wanted
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs) >= 8


def test_wrong_requests_stop_before_the_notebook_runs(tmp_path, capsys):
    assert main(["report", "scaling", "--resample", "50"]) == 2
    assert "resamples" in capsys.readouterr().err
    assert main(["report", "scaling", "--resamples", "many"]) == 2
