"""Panels without a browser: settings to result to figure, Stop, comparison, errors in words,
reports and back.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml
from pydantic import BaseModel, Field

import widgets
import workbench
from widgets.compare import can_overlay, differences, overlay
from widgets.plot import PLOTLY_MIME
from workbench import reports
from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.figures import figure, heat, line
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.results import Result


class WaveView(BaseModel):
    """View settings."""

    scale: float = Field(1.0, ge=0, le=10)
    kind: Literal["curve", "points"] = "curve"


class WaveResult(Result):
    """A curve whose height the viewer may change."""

    def view_model(self) -> type[BaseModel]:
        return WaveView

    def figure(self, **view: Any) -> go.Figure:
        chosen = WaveView(**view)
        fig = figure("Wave", x="t")
        line(
            fig,
            self.table["t"],
            chosen.scale * self.table["y"],
            "wave",
            mode="lines" if chosen.kind == "curve" else "markers",
        )
        return fig


class Wave(Instrument):
    """A sine of some frequency, one point a step.

    More about it.
    """

    cached = False
    frequency: int = parameter(2, "periods", ge=1, le=50)
    steps: int = parameter(20, "points", ge=1)
    fail: bool = parameter(False, "raise an error half-way")

    @classmethod
    def result_class(cls) -> type[Result]:
        return WaveResult

    def _run(self, on: Any, progress: Progress) -> Result:
        rows: list[dict[str, float]] = []
        for i in progress.track(range(self.steps), "points"):
            if self.fail:
                raise RuntimeError("the <b>sine</b> broke")
            rows.append({"t": i, "y": float(np.sin(self.frequency * i))})
            progress.preview(self.result(pd.DataFrame(rows), {"points": len(rows)}))
            if i == 3:
                on.reached.set()
                on.go_on.wait(20)
        return self.result(pd.DataFrame(rows), {"points": len(rows), "top": max(r["y"] for r in rows)})


class Bench:
    """What the instrument is pointed at: lets a test hold a run at its fourth step."""

    name, fingerprint = "bench", "0"

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()


def run(panel: widgets.Panel) -> None:
    panel.job.run.click()
    assert panel.job.wait(60)


def test_run_draws_the_result_and_view_settings_redraw_it_without_running() -> None:
    panel = widgets.panel(Wave, Bench(), frequency=3)
    assert panel.controls.values["frequency"] == 3 and panel.result is None and panel.view_controls is None
    run(panel)
    assert panel.result is not None and panel.result.facts["points"] == 20
    assert panel.job.note.value.startswith('<span role="status">done after')
    assert panel.view_controls is not None and panel.view == {"scale": 1.0, "kind": "curve"}
    before = panel.plot.figure.data[0].y
    panel.view_controls.controls["scale"].widget.value = 2.5
    np.testing.assert_allclose(panel.plot.figure.data[0].y, 2.5 * np.asarray(before))
    assert len(panel.results) == 1
    panel.controls.controls["frequency"].widget.value = 5
    run(panel)  # the view stays as chosen
    assert panel.view["scale"] == 2.5
    np.testing.assert_allclose(panel.plot.figure.data[0].y, 2.5 * np.sin(5 * np.arange(20)))


def test_stop_keeps_what_is_there() -> None:
    bench = Bench()
    bench.go_on.clear()
    panel = widgets.panel(Wave, bench, steps=1000)
    panel.job.run.click()
    assert (
        bench.reached.wait(20)
        and panel.job.running
        and panel.job.run.disabled
        and not panel.job.halt.disabled
    )
    assert len(panel.plot.figure.data[0].y) >= 1  # drawn while it runs
    panel.job.run.click()  # a second click starts nothing
    panel.job.halt.click()
    bench.go_on.set()
    assert panel.job.wait(20)
    assert panel.result is not None and panel.result.partial and panel.result.facts["points"] == 4
    assert "stopped, kept what was there" in panel.job.note.value and "partial" in panel.summary.value
    assert panel.job.halt.disabled and not panel.job.run.disabled


def test_errors_are_words_and_leave_the_panel_working() -> None:
    panel = widgets.panel(Wave, Bench(), fail=True)
    run(panel)
    shown, folded = panel.job.note.value.split("<details>")
    assert (
        "RuntimeError: the &lt;b&gt;sine&lt;/b&gt; broke" in shown
        and "Traceback" not in shown
        and "Traceback" in folded
    )
    panel.controls.controls["fail"].widget.value = False
    assert "ready" in panel.job.note.value
    run(panel)
    assert panel.result is not None


def test_contradictory_settings_are_named_while_they_are_typed(cache: Path) -> None:
    panel = widgets.panel(Prune, "digits-softmax")
    panel.controls.values = {"sparsity": 1.0}
    assert (
        "sparsity: 1.0 is not accepted, it should be less than 1" in panel.job.note.value
        and "<details>" not in panel.job.note.value
    )
    run(panel)
    assert "sparsity: 1.0" in panel.job.note.value and panel.result is None
    panel.controls.values = {"sparsity": 0.5}
    assert "ready" in panel.job.note.value
    with pytest.raises(BadInput, match="sparsity"):
        widgets.panel(Prune, "digits-softmax", sparsity=2)
    with pytest.raises(BadInput, match="unknown field"):
        widgets.panel(Prune, "digits-softmax", sparsty=0.5)
    lost = widgets.panel(Prune, "no-such-subject")
    run(lost)
    assert "no-such-subject" in lost.job.note.value and "<details>" not in lost.job.note.value


def test_comparison_over_it_and_side_by_side() -> None:
    panel = widgets.panel(Wave, Bench())
    run(panel)
    assert panel.comparison.layout.display == "none"
    panel.controls.values = {"frequency": 7}
    run(panel)
    offered = [label for label, _ in panel.comparison.pick.options]
    assert panel.comparison.layout.display == "" and offered == [
        "nothing",
        "run 1 (frequency 2)",
    ]
    panel.comparison.pick.value = 1
    assert [t.name for t in panel.plot.figure.data] == ["wave", "run 1: wave"]
    np.testing.assert_allclose(panel.plot.figure.data[1].y, np.sin(2 * np.arange(20)))
    assert "frequency" in panel.comparison.table.value and panel.beside.layout.display == "none"
    panel.comparison.how.value = "side by side"
    assert (
        len(panel.plot.figure.data) == 1
        and panel.beside.layout.display == ""
        and panel.beside.figure.layout.title.text == "run 1: Wave"
    )
    panel.comparison.pick.value = 0
    assert panel.beside.layout.display == "none" and panel.comparison.table.value == ""
    for _ in range(15):
        run(panel)
    assert (
        len(panel.results) == 12
        and panel.comparison.pick.options[1][0].startswith("run 16")
        and panel.comparison.pick.options[-1][1] == 6
    )


def test_overlays_and_differences() -> None:
    one, two = figure("a"), figure("b")
    line(one, [0, 1], [0, 1], "curve")
    two.add_bar(x=["p"], y=[1], name="bar")
    assert can_overlay(one, two) and [t.name for t in overlay(one, two, "run 1").data] == [
        "curve",
        "run 1: bar",
    ]
    heat(two, [[1, 2]])
    assert not can_overlay(one, two)
    table = pd.DataFrame({"x": [1]})
    first = Wave().result(table, {"loss": 2.0, "name": "n", "same": 1.0})
    second = Wave(frequency=9).result(table, {"loss": 1.5, "name": "<m>", "same": 1.0})
    text = differences(second, first, "<run 1>")
    assert "-0.5" in text and "frequency" in text and "&lt;run 1&gt;" in text and "same" not in text
    assert "Same settings" in differences(first, first, "run 1")


def test_static_twin_stands_in_for_the_live_panel() -> None:
    panel = widgets.panel(Wave, Bench())
    bundle, _ = panel._repr_mimebundle_()
    assert (
        "application/vnd.jupyter.widget-view+json" in bundle
        and PLOTLY_MIME not in bundle
        and "frequency" in bundle["text/html"]
    )
    run(panel)
    bundle, _ = panel._repr_mimebundle_()
    assert bundle[PLOTLY_MIME]["layout"]["title"]["text"] == "Wave" and "<table" in bundle["text/html"]


def test_headless_a_panel_runs_at_once_and_leaves_no_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    panel = widgets.panel(Wave, Bench())
    assert panel.result is not None
    bundle = panel._repr_mimebundle_()
    assert isinstance(bundle, dict) and set(bundle) == {"text/plain", "text/html", PLOTLY_MIME}
    with pytest.raises(RuntimeError):  # and an error fails the cell
        widgets.panel(Wave, Bench(), fail=True)


def test_parameters_restore_the_panel_exactly(tmp_path: Path, cache: Path) -> None:
    from workbench.quantization import Quantize

    panel = widgets.panel(
        Quantize,
        "digits-softmax",
        layer_bits={"*.q": 8, "null": 2},
        sequential_damp=1.23456789e-4,
        layers="*.q_proj, 'x'",
        format="uint3",
    )
    file = reports.write_parameters(tmp_path / "p.yaml", panel.parameters)
    restored = widgets.panel.from_parameters(file)
    assert (
        restored.instrument == panel.instrument
        and restored.parameters == panel.parameters
        and restored.kind is Quantize
    )
    assert widgets.panel.from_parameters(panel.parameters).instrument == panel.instrument
    with pytest.warns(FutureWarning):
        old = widgets.panel(Quantize, "digits-softmax", bits=3, damp=1.23456789e-4, symmetric=False)
    shown = old.instrument.model_dump()
    assert (shown["format"], shown["sequential_damp"]) == ("uint3", 1.23456789e-4)
    with_view = {**panel.parameters, "view": {"column": "sqnr"}}
    assert widgets.panel.from_parameters(with_view).view == {"column": "sqnr"}
    for wrong, words in [
        ({"instrument": "quantize"}, "subject"),
        ({**panel.parameters, "extra": 1}, "extra: unknown"),
        (tmp_path / "none.yaml", "not a file"),
    ]:
        with pytest.raises(BadInput, match=words):
            widgets.panel.from_parameters(wrong)


def test_sent_to_report_is_the_same_result(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subject that no name opens (pruned, then handed to a panel) reaches the report as it is."""
    monkeypatch.chdir(tmp_path)
    on = (
        Prune(method="magnitude", layers="*", predict_examples=0)
        .run(workbench.subject("digits-softmax", trained=True))
        .subject
    )
    panel = widgets.panel(Prune, on, method="random", layers="*", sparsity=0.8, predict_examples=0)
    run(panel)
    assert panel.result is not None
    panel.sender.click()
    assert panel.report is not None and panel.report.wait(120)
    assert (
        panel.report.error == ""
        and panel.report.html.is_file()
        and panel.report.html.name in panel.report_note.value
    )
    written = yaml.safe_load(panel.report.parameters.read_text())
    restored = widgets.panel.from_parameters(written)
    assert restored.instrument == panel.instrument and restored.on.fingerprint == on.fingerprint
    page = panel.report.html.read_text()
    assert f"{panel.result.facts['nonzero']:,}" in page and f"{panel.result.facts['loss']:.5g}" in page


def test_a_report_that_fails_says_why(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    panel = widgets.panel(Prune, "no-such-subject")
    panel.sender.click()
    assert panel.report is not None and panel.report.wait(120)
    assert "no-such-subject" in panel.report.error and "report failed" in panel.report_note.value


def test_the_bench_opens_any_instrument() -> None:
    bench = widgets.Bench("digits-softmax", "prune")
    bench.opener.click()
    assert bench.panel is not None and bench.panel.kind is Prune
    bench.subject.value = " "
    bench.opener.click()
    assert "subject: is empty" in bench.note.value


def test_runs_are_sent_with_their_table(cache: Path) -> None:
    from workbench.scaling.runs import Runs
    from workbench.scaling.scaling_fit import ScalingFit

    table = pd.DataFrame(
        [
            {"params": n, "tokens": n * r, "loss": 1.7 + 400 * n**-0.34 + 410 * (n * r) ** -0.28}
            for n in (1e7, 1e8, 1e9)
            for r in (5, 20)
        ]
    )
    runs = Runs.open(table)
    panel = widgets.panel(ScalingFit, runs)
    restored = widgets.panel.from_parameters(panel.parameters)
    assert restored.on.fingerprint == runs.fingerprint and restored.instrument == panel.instrument
    with pytest.raises(BadInput, match="has changed"):
        widgets.panel.from_parameters({**panel.parameters, "fingerprint": "other"})


def test_an_instruments_own_panel_stands_in_place_or_is_offered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from widgets.spectrum import SpectrumPanel
    from widgets.training import SchedulePanel
    from workbench.curvature import Spectrum
    from workbench.training import Train

    assert isinstance(widgets.panel(Spectrum(probes=2), "digits-softmax", steps=4), SpectrumPanel)
    bench = widgets.Bench("digits-softmax", "spectrum")
    bench.opener.click()
    assert isinstance(bench.panel, SpectrumPanel)
    panel = widgets.panel(Train, "digits-vit", schedule="rex")
    assert panel.special is not None
    button, place = panel.special.children[0].children[0], panel.special.children[1]
    button.value = True
    assert isinstance(place.children[0], SchedulePanel) and place.children[0].names.value[0] == "rex"
    button.value = False
    assert not place.children
    assert widgets.panel(Wave, Bench()).special is None
    monkeypatch.setitem(widgets.PANELS, "wave", SchedulePanel)
    assert widgets.panel(Wave, Bench()).special is not None


@pytest.mark.parametrize("name", list(widgets.PANELS))
def test_every_registration_names_an_instrument_and_a_panel(name: str) -> None:
    from widgets.opening import special

    found = special(name)
    assert name in workbench.catalog()
    assert issubclass(found, widgets.Panel) or (found.caption and callable(found.beside))
