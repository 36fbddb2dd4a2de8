"""The kernels notebook runs headless on small settings and shows prediction and measurement."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from workbench import reports
from workbench.kernels.bench import unpadded_on_cpu
from workbench.kernels.roofline import DEVICES, measured_table, resource_table


def test_the_notebook_runs_headless(tmp_path: Path) -> None:
    done = reports.render(
        "kernels",
        {"device": "A100-SXM4-80GB", "spreads": [0.0, 1.0], "batch": 4, "length": 16, "repeats": 1},
        tmp_path,
    )
    assert done.error is None
    outputs = [o for c in nbformat.read(done.notebook, 4).cells if c.cell_type == "code" for o in c.outputs]
    figures = [
        o["data"]["application/vnd.plotly.v1+json"]
        for o in outputs
        if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    titles = json.dumps([f["layout"]["title"] for f in figures])
    assert "Predicted roofline" in titles and "measured on this CPU" in titles


def test_unpadded_outputs_are_equal_in_the_measurement_too() -> None:
    table = unpadded_on_cpu((0.0, 1.0), batch=4, length=16, layers=1, repeats=1)
    assert (table["largest difference"] < 1e-5).all()
    assert table["padding fraction"].iloc[0] == 0
    assert table["ideal ratio"].iloc[1] > 1


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_every_compiled_kernel_has_an_occupancy(device) -> None:  # type: ignore[no-untyped-def]
    table = resource_table(device)
    assert len(table) > 80
    assert table["occupancy"].between(0.01, 1).all()


def test_measurements_name_their_device_and_date() -> None:
    table = measured_table()
    assert table["device"].notna().all() and table["date"].notna().all()
