"""The start page, the panels and the report of one instrument run headless, as every notebook must."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from workbench import reports
from workbench.export_html import PLOTLY_MIME

CASES = {
    "index": ({"subject": "digits-softmax"}, 0, ("compress", "spectrum", "workbench.pruning.Prune")),
    "instrument": (
        {
            "instrument": "prune",
            "subject": "digits-vit",
            "settings": {"method": "magnitude", "sparsity": 0.7},
            "view": {"show": "relative_error"},
        },
        1,
        ("magnitude", "fingerprint", "share to remove of what the pattern is about"),
    ),
    "panels": ({"subject": "digits-vit"}, 3, ("spectrum", "prune", "quantize")),
}


@pytest.mark.parametrize("name", CASES)
def test_notebook_runs_headless(name: str, tmp_path: Path) -> None:
    parameters, figures, words = CASES[name]
    done = reports.render(name, parameters, tmp_path)
    assert done.error is None
    outputs = [o for cell in nbformat.read(done.notebook, 4).cells for o in cell.get("outputs", [])]
    found = [o["data"][PLOTLY_MIME] for o in outputs if PLOTLY_MIME in o.get("data", {})]
    assert len(found) == figures and all(figure["data"] for figure in found)
    page = done.html.read_text()
    assert all(word in page for word in words) and page.count("data-figure=") == figures
    assert (
        done.html.stat().st_size < 3e6 and done.notebook.stat().st_size < 1e6
    )  # no widget state, no copy of plotly.js
