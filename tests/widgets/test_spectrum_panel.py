"""The spectrum panel without a browser: a run, a clicked layer, an overlaid subject, the batch slider."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ARCHITECTURES
from tests.curvature.small import mlp, stock
from tests.curvature.test_instruments import SMALL
from widgets.panels import Panel
from widgets.spectrum import SpectrumPanel
from workbench.results import Result
from workbench.subjects import Mask, Subject

PATIENCE = 120


def pruned(subject: Subject) -> Subject:
    made = subject.copy()
    for layer in made.layers("*"):
        layer.attach(Mask(layer.weight.abs() > layer.weight.abs().median()))
    return made


def test_run_click_overlay_and_batch(cache: Path) -> None:
    dense = mlp(torch.float32)
    panel = SpectrumPanel(dense, others={"pruned": pruned(dense)}, probes=2, steps=10, batch_size=6)
    panel.job.start()
    assert panel.job.wait(PATIENCE) and panel.result is not None
    assert panel.layers_plot.spec["data"] and panel.whole.disabled
    whole = panel.result

    before = len(panel.plot.spec["data"])
    assert panel.view_controls is not None
    panel.view_controls.values = {"batch": 4}
    panel._draw()
    names = [trace.get("name") or "" for trace in panel.plot.spec["data"]]
    assert len(names) == before + 2 and any("B=4" in name for name in names)

    panel.other.value = "pruned"
    assert panel.job.wait(PATIENCE)
    assert panel.overlaid["pruned"].provenance is not None
    assert panel.overlaid["pruned"].provenance["fingerprint"] != dense.fingerprint
    assert any((trace.get("name") or "").startswith("pruned: ") for trace in panel.plot.spec["data"])
    assert panel.result is whole
    panel.other.value = "nothing"
    assert not any((trace.get("name") or "").startswith("pruned: ") for trace in panel.plot.spec["data"])

    shown = panel.layers_plot.spec["data"][0]
    assert "0.weight" in shown["meta"]["layers"]
    panel.layers_plot.clicked = {"trace": 0, "point": 0, "x": None, "y": None, "layer": "0.weight"}
    assert panel.job.wait(PATIENCE)
    assert (
        panel.result.instrument.model_dump()["layers"] == "0.weight"
        and panel.result.facts["parameters"] == 20
    )
    assert panel.layers_plot.clicked is None  # a second click on the same cell is a click again
    assert not panel.whole.disabled and panel.layers_plot.spec["data"][0]["meta"] == shown["meta"]
    panel.measure_all()
    assert (
        panel.job.wait(PATIENCE)
        and panel.result.facts["parameters"] == whole.facts["parameters"]
        and panel.whole.disabled
    )


def test_what_is_asked_during_a_run_comes_next(cache: Path) -> None:
    dense = mlp(torch.float32)
    panel = SpectrumPanel(dense, others={"pruned": pruned(dense)}, probes=2, steps=10, batch_size=6)
    assert panel.job.wait(PATIENCE)
    panel.other.value = "pruned"
    assert "press Run first" in panel.job.note.value and panel.other.value == "nothing"

    seen: list[str] = []

    def ask_once(result: Result) -> None:
        if not seen:
            panel.measure_layer("0.weight")
            panel.other.value = "pruned"  # the last thing asked wins
            seen.append(panel.layer_note.value)

    panel.job._preview = ask_once
    panel.job.start()
    assert panel.job.wait(PATIENCE) and "next, after this run: pruned" in seen[0]
    assert set(panel.overlaid) == {"pruned"} and panel.other.value == "pruned"
    assert panel.result is not None and panel.result.instrument.model_dump()["layers"] == "all"

    def ask_and_stop(result: Result) -> None:
        panel.measure_layer("0.weight")
        panel.job.stop()  # Stop forgets what was to come

    panel.job._preview = ask_and_stop
    panel.controls.values = {"seed": 1}
    panel.job.start()
    assert (
        panel.job.wait(PATIENCE)
        and panel.result.partial
        and panel.result.instrument.model_dump()["layers"] == "all"
        and not panel.job.running
    )


def test_a_preview_refines_the_density(cache: Path) -> None:
    panel = SpectrumPanel(mlp(torch.float32), probes=2, steps=10)
    seen: list[tuple[bool, int]] = []
    draw = panel._preview

    def look(result: Result) -> None:
        draw(result)
        seen.append((result.partial, panel.plot.revision))

    panel.job._preview = look
    panel.job.start()
    assert panel.job.wait(PATIENCE)
    assert seen and all(partial for partial, _ in seen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_panels_of_the_four_instruments_on_every_stock_class(architecture: str, cache: Path) -> None:
    subject = stock(architecture)
    for instrument in SMALL.values():
        panel = Panel(instrument, subject)
        panel.job.start()
        assert panel.job.wait(PATIENCE) and panel.result is not None and not panel.result.partial, (
            panel.job.note.value
        )
        assert panel.plot.spec["data"]
