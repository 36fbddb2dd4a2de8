"""Settings as a whole: groups, fields that do not act, presets, the way back, and copies of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import widgets
import workbench
from widgets.compare import on_shared_axes
from widgets.settings.controls import Controls
from widgets.settings.parameters import published
from widgets.toolbar import code_of, named
from workbench.cli import main
from workbench.commands.as_typed import command_of
from workbench.curvature import Sharpness
from workbench.figures import figure
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.storage.kept_results import chosen

PATIENCE = 300.0
QUICK: dict[str, Any] = {"calibration_examples": 8, "predict_examples": 4}


def test_a_few_settings_are_open_and_the_others_stand_in_groups() -> None:
    for name, cls in workbench.catalog().items():
        if not cls.__module__.startswith("workbench."):
            continue
        controls = Controls(cls)
        inside = [field for group in controls.groups for field in group.fields]
        assert 1 <= len(controls.fields) - len(inside) <= 7, name
        assert all(group.layout.display == "none" for group in controls.groups), name
        controls.close()


def test_a_group_opens_says_what_is_set_and_what_is_wrong_in_it() -> None:
    controls = Controls(Prune)
    data = next(group for group in controls.groups if group.name == "Data")
    assert data.head.description == "▸ Data (4)"
    data.head.click()
    assert data.layout.display == "" and data.head.description == "▾ Data (4)"
    controls.values = {"calibration_examples": 8}
    assert data.head.description == "▾ Data (4, 1 set)"
    data.head.click()
    controls.mark("calibration_examples")
    widget = controls.controls["calibration_examples"].widget
    assert "wb-wrong" in widget._dom_classes and data.layout.display == ""
    controls.mark()
    assert "wb-wrong" not in widget._dom_classes


def test_a_field_that_is_not_read_is_not_shown() -> None:
    controls = Controls(Sharpness)
    steps = controls.controls["bisect_steps"].widget
    acts = bool(controls.values["bisect"])
    assert (steps.layout.display == "") == acts
    controls.values = {"bisect": not acts}
    assert (steps.layout.display == "") != acts


def test_reset_presets_and_the_way_back(cache: Path) -> None:
    on = workbench.subject("digits-vit")
    panel = widgets.panel(Prune, on, **QUICK)
    assert panel.job.wait(PATIENCE)
    assert panel.result is None and "ready" in panel.job.note.value
    panel.job.start()
    assert panel.job.wait(PATIENCE) and panel.result is not None
    assert panel.tools.back.disabled
    panel.controls.values = {"sparsity": 0.8}
    assert "settings changed since" in panel.job.note.value and "wb-outdated" in panel.views._dom_classes
    panel.tools.back.click()
    assert panel.instrument == panel.result.instrument and "wb-outdated" not in panel.views._dom_classes
    panel.tools.preset.value = "wanda"
    assert panel.instrument == published(Prune)["wanda"] and str(panel.instrument.method) == "wanda"  # type: ignore[attr-defined]
    panel.tools.reset.click()
    assert panel.instrument == Prune() and panel.controls.given == {}

    # the same settings again: what is stored is shown at once
    again = widgets.panel(Prune, on, **QUICK)
    assert again.job.wait(PATIENCE) and again.result is not None
    assert "stored result of" in again.job.note.value and again.plot.spec["data"]
    # a contradiction is marked at its field before anything runs
    again.controls.values = {"layers": "no.such.layer"}
    assert "wb-wrong" in again.controls.controls["layers"].widget._dom_classes
    assert "no.such.layer" in again.job.note.value
    assert "0.5" not in again.controls.controls["layers"].widget.options
    assert any("q_proj" in name for name in again.controls.controls["layers"].widget.options)


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 1 / 3},
        {"method": "wanda", "pattern": "2:4"},
        {"saliency": {"name": "fisher", "damp": 0.02}, "layers": "*layers.0.*"},
    ],
    ids=["number", "pattern", "options"],
)
def test_copied_as_command_and_as_code_it_is_the_same_run(
    fields: dict[str, Any], cache: Path, capsys
) -> None:
    on = workbench.subject("digits-vit")
    instrument = Prune(**QUICK, **fields)
    instrument.run(on, Progress())
    words = shlex.split(command_of(instrument, named(on)))
    assert words[0] == "workbench" and main(words[1:]) == 0
    scope: dict[str, Any] = {}
    exec(code_of(instrument, on), scope)
    assert scope["result"].provenance["key"] == instrument.key(on)
    assert {entry.key for entry in chosen("prune")} == {instrument.key(on)}


def test_figures_beside_each_other_have_one_scale_and_one_height() -> None:
    first, second = figure("a", "x", "y", height=300), figure("b", "x", "y", height=500)
    first.add_bar(x=["p", "q"], y=[0.2, 0.9])
    second.add_bar(x=["p", "q"], y=[0.1, 0.65])
    on_shared_axes(first, second)
    assert first.layout.yaxis.range == second.layout.yaxis.range
    assert first.layout.yaxis.range[0] == 0 and first.layout.yaxis.range[1] > 0.9
    assert first.layout.height == second.layout.height == 500
    other = figure("c", "x", "another")
    other.add_bar(x=["p"], y=[7.0])
    on_shared_axes(first, other)
    assert other.layout.yaxis.range is None
