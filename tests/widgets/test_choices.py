"""Controls of fields on an axis: the list, the options of the chosen entry, what a method fills in,
and panels and reports with a user's own entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import pytest
import yaml

import widgets
import workbench
from widgets.compare import differences
from widgets.settings.choices import FILLED, ChoiceControl
from widgets.settings.controls import Controls, help_html
from workbench import overview
from workbench.axis import AXES, Axis, Choice, Options, parameter
from workbench.errors import BadInput
from workbench.families import PLUGINS
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result

SCORING = Axis("test-panel-scoring", "what a removal costs")


def ratio(text: str) -> Mapping[str, Any] | None:
    kept, sign, of = text.partition(":")
    return {"name": "n:m", "kept": int(kept), "of": int(of)} if sign and (kept + of).isdigit() else None


PATTERN = Axis("test-panel-pattern", "which weights go together", shorthand=ratio)


class Damped(Options):
    damp: float = parameter(0.01, "share of the mean diagonal", gt=0, le=10, scale="log")
    block: int = parameter(50, "weights in a block", ge=1)


class Ratio(Options):
    kept: int = parameter(2, "weights kept of each group", ge=1, le=8)
    of: int = parameter(4, "weights in a group", ge=2, le=16)


@SCORING.add("size", formula="|w|", source="Han et al. 2015")
def size(weight: float, options: Options) -> float:
    return abs(weight)


@SCORING.add("fisher", formula="w^2 < damp", source="Kurtic et al. 2022", needs="gradients", options=Damped)
def fisher(weight: float, options: Damped) -> float:
    return weight**2 / options.damp


PATTERN.add("any", formula="", source="")(None)
PATTERN.add(
    "n:m", formula="n of m", source="Mishra et al. 2021", options=Ratio, spelled=lambda o: f"{o.kept}:{o.of}"
)(None)


class Scored(Instrument):
    """A weight's score."""

    cached = False
    method: str = parameter("plain", "what fills the rest")
    weight: float = parameter(2.0, "the weight", ge=0, le=4)
    scoring: Choice = SCORING.choice(None, "the score")
    pattern: Choice = PATTERN.choice("any")

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "scoring": "size" if given.get("method", "plain") == "plain" else {"name": "fisher", "damp": 0.5}
        }

    def _run(self, on: Any, progress: Progress) -> Result:
        score = self.scoring(self.weight)
        return self.result(pd.DataFrame({"score": [score]}), {"score": score})


class Bench:
    name, fingerprint, history = "bench", "0", ()


@pytest.fixture(autouse=True)
def leave_no_axis() -> Iterator[None]:
    before = dict(AXES), dict(SCORING.entries)
    yield
    AXES.clear()
    AXES.update(before[0])
    SCORING._entries.clear()
    SCORING._entries.update(before[1])


def scoring(controls: Controls) -> Any:
    return controls.controls["scoring"].widget


def test_options_follow_the_choice_and_are_kept() -> None:
    controls = Controls(Scored)
    widget, heard = scoring(controls), []
    controls.watch(lambda: heard.append(controls.given))
    assert widget.name.options == (FILLED, "size", "fisher") and widget.options is None
    widget.name.value = "fisher"
    assert heard == [{"scoring": {"name": "fisher", "damp": 0.01, "block": 50}}]
    damp = widget.options.controls["damp"].widget
    assert isinstance(damp, ipywidgets.FloatLogSlider) and "wb-field-scoring-damp" in damp._dom_classes
    widget.options.values = {"damp": 0.1}
    widget.name.value = "size"
    assert widget.options is None and controls.values["scoring"] == "size"
    widget.name.value = "fisher"
    assert controls.values["scoring"]["damp"] == pytest.approx(0.1) and len(heard) == 4
    controls.enable(False)
    assert widget.name.disabled and damp.disabled


def test_a_choice_is_written_in_every_form() -> None:
    controls = Controls(Scored, {"scoring": {"name": "fisher", "damp": 0.2}, "pattern": "1:8"})
    made = Scored(**controls.values)
    assert made.scoring.options == Damped(damp=0.2) and made.pattern == "1:8"
    assert controls.values["pattern"] == "1:8"
    assert controls.controls["pattern"].widget.options.values == {"kept": 1, "of": 8}
    controls.controls["pattern"].widget.options.values = {"of": 4}
    assert controls.values["pattern"] == "1:4"
    controls.values = {"scoring": made.with_fields(scoring="size").scoring}
    assert controls.values["scoring"] == "size"
    scoring(controls).value = "fisher"  # as one sets any other control
    assert controls.values["scoring"] == {"name": "fisher", "damp": 0.01, "block": 50}
    for wrong, words in (
        ("fishr", "scoring: 'fishr' is unknown; did you mean fisher"),
        ({"name": "size", "damp": 1}, "it is an option of fisher"),
        ({"name": "fisher", "damp": -1}, "scoring.damp: -1"),
    ):
        with pytest.raises(BadInput, match=words):
            controls.values = {"scoring": wrong}
    with pytest.raises(BadInput, match="pattern: '2-4' is unknown"):
        controls.values = {"pattern": "2-4"}


def test_a_wrong_option_is_named_while_it_is_typed() -> None:
    panel = widgets.panel(Scored, Bench(), scoring="fisher")
    scoring(panel.controls).options.controls["damp"].widget.value = 0.5
    assert "ready" in panel.job.note.value
    scoring(panel.controls).options.values = {"damp": 20.0}
    assert "scoring.damp: 20" in panel.job.note.value and "<details>" not in panel.job.note.value


def test_what_nobody_chose_is_left_to_the_method() -> None:
    panel = widgets.panel(Scored, Bench())
    widget = scoring(panel.controls)
    assert widget.gives.value == "gives size" and panel.instrument.scoring == "size"
    panel.controls.controls["method"].widget.value = "other"
    assert widget.gives.value == "gives fisher" and panel.instrument.scoring.options.damp == 0.5
    widget.name.value = "size"
    assert widget.gives.value == "" and panel.instrument.scoring == "size"
    widget.name.value = FILLED
    assert panel.instrument.scoring == "fisher" and "scoring" not in panel.controls.given


def test_parameters_hold_every_option_and_open_the_same_panel(tmp_path: Path) -> None:
    panel = widgets.panel(Scored, "bench", scoring={"name": "fisher", "damp": 0.2}, pattern="2:4")
    wanted = panel.parameters
    assert wanted["settings"]["scoring"] == {"name": "fisher", "damp": 0.2, "block": 50}
    file = tmp_path / "sent.yaml"
    file.write_text(yaml.safe_dump(wanted))
    again = widgets.panel.from_parameters(file)
    assert again.parameters == wanted and scoring(again.controls).name.value == "fisher"
    follows = widgets.panel.from_parameters(widgets.panel(Scored, "bench", method="other").parameters)
    assert scoring(follows.controls).name.value == FILLED and follows.instrument.scoring.options.damp == 0.5


def test_runs_are_told_apart_by_choices_and_their_options() -> None:
    panel = widgets.panel(Scored, Bench(), scoring="fisher")
    for given in ({}, {"scoring": {"name": "fisher", "damp": 0.5}}, {"scoring": "size"}):
        panel.controls.values = given
        panel.job.run.click()
        assert panel.job.wait(60)
    assert [label for label, _ in panel.comparison.pick.options[1:]] == [
        "run 2 (scoring fisher)",
        "run 1 (scoring fisher)",
    ]
    table = differences(panel.results[1], panel.results[0], "run 1")
    assert "scoring.damp" in table and "0.01" in table and "scoring.block" not in table


def test_help_and_reports_state_formula_source_and_options() -> None:
    text = help_html(Scored.parameters())
    assert "w^2 &lt; damp (Kurtic et al. 2022); needs gradients; damp: share of the mean diagonal" in text
    assert "2 choices" in text
    settings = overview.settings(Scored(method="other"), Bench())
    assert settings.loc["scoring.damp", "value"] == "0.5"
    assert settings.loc["scoring", "meaning"] == "the score: w^2 < damp (Kurtic et al. 2022)"


def test_an_entry_registered_later_is_there() -> None:
    before = Controls(Scored)

    @SCORING.add("mine", formula="w + 1", source="here")
    def mine(weight: float, options: Options) -> float:
        return weight + 1

    assert "mine" in scoring(Controls(Scored)).name.options
    before.values = {"scoring": "mine"}
    assert Scored(**before.values).scoring(2.0) == 3.0
    mine.__module__ = "__main__"  # as in a notebook
    panel = widgets.panel(Scored, "bench", scoring="mine")
    with pytest.raises(BadInput, match="registered in this notebook"):
        panel.send_to_report()


PLUGIN = """
import pandas as pd
from workbench.axis import AXES, Axis, Choice, Options, parameter
from workbench.instruments import Instrument

HOME = Axis("test-sent-scoring", "what a removal costs")

class Shift(Options):
    by: float = parameter(1.0, "added", ge=0, le=9)

@HOME.add("shift", formula="w + b", source="a user 2026", options=Shift)
def shift(weight, options):
    return weight + options.by

class SentScore(Instrument):
    "A score, sent to a report."
    cached = False
    scoring: Choice = HOME.choice("shift")

    def _run(self, on, progress):
        score = self.scoring(40.0)
        return self.result(pd.DataFrame({"score": [score]}), {"score": score})
"""


def test_a_report_knows_the_users_own_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from workbench.names import find

    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    monkeypatch.setenv(PLUGINS, str(plugin) + os.pathsep)
    chosen = {"name": "shift", "by": 2.5}
    panel = widgets.panel(find("sent-score"), "digits-softmax", reports=tmp_path / "out", scoring=chosen)
    report = panel.send_to_report()
    assert report.wait(240) and report.state == "done", report.error
    page = report.html.read_text()
    assert "42.5" in page and "scoring.by" in page and "a user 2026" in page
    kind = find("sent-score")
    assert widgets.panel.from_parameters(report.parameters).instrument == kind(scoring=chosen)


@pytest.mark.parametrize("name", list(workbench.catalog()))
def test_every_entry_of_every_instrument_can_be_chosen(name: str) -> None:
    controls = Controls(workbench.catalog()[name])
    for field, item in controls.controls.items():
        if isinstance(item.widget, ChoiceControl):
            for entry in item.widget.axis.entries.values():
                item.widget.name.value = entry.name
                if any(info.is_required() for info in entry.options.model_fields.values()):
                    continue
                read = item.read()
                item.write(read)
                assert item.read() == read and item.widget.axis.chosen(read, field).entry is entry
