"""Kind (fault 46): what a panel made is gone when it is closed, or when another takes its place; the list of
all widgets is as long as before.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ipywidgets.widgets import widget

import widgets
import workbench
from tests.widgets.test_panels import Bench, Wave, run
from widgets.plot import PlotlyLibrary, PlotView
from widgets.quantization import FormatPanel
from widgets.scaling import ScalingPanel
from widgets.sparsity import SparsityPanel
from widgets.training import SchedulePanel
from workbench.pruning import Prune


@pytest.fixture(scope="module", autouse=True)
def library() -> PlotlyLibrary:
    """plotly.js, which all plots share, stays."""
    return PlotlyLibrary.shared()


def table() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    size, tokens = np.geomspace(1e6, 1e9, 20), draw.permutation(np.geomspace(1e8, 1e11, 20))
    loss = 1.7 + 400 / size**0.34 + 410 / tokens**0.28
    return pd.DataFrame({"params": size, "tokens": tokens, "loss": loss})


MADE: dict[str, Callable[[], Any]] = {
    "general": lambda: widgets.panel(Prune, "digits-softmax"),
    "bench": lambda: widgets.Bench("digits-softmax", "prune"),
    "spectrum": lambda: widgets.panel(workbench.curvature.Spectrum, "digits-softmax"),
    "sparsity": lambda: SparsityPanel("digits-softmax"),
    "formats": lambda: FormatPanel(workbench.subject("digits-vit")),
    "schedules": lambda: SchedulePanel(),
    "scaling": lambda: ScalingPanel(table()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_closed_panel_leaves_no_widget(name: str) -> None:
    before = set(widget._instances)
    made = MADE[name]()
    assert len(set(widget._instances) - before) > 20
    made.close()
    assert set(widget._instances) <= before


def test_a_closed_panel_and_a_plot_that_stands_alone_are_let_go() -> None:
    """2,100 objects were kept; also by anywidget's watch over the file that a class of widgets reads."""
    before = set(widget._instances)
    panel, plot = widgets.panel(Wave, Bench()), PlotView()
    kept = [weakref.ref(widget._instances[name]) for name in set(widget._instances) - before]
    panel.close()
    plot.close()
    del panel, plot
    gc.collect()
    assert len(kept) > 40 and not [made for made in kept if made() is not None]


def ran() -> widgets.Panel:
    panel = widgets.panel(Wave, Bench(), steps=4)
    run(panel)
    panel.controls.values = {"frequency": 7}
    run(panel)
    return panel


def test_what_was_run_compared_and_chosen_goes_too() -> None:
    """An example that was not listed: controls of the view, and options of entries that are shown no more."""
    before = set(widget._instances)
    panel = ran()
    panel.close()
    assert set(widget._instances) <= before
    panel = widgets.panel(Prune, "digits-softmax")
    for method in ("obs", "fisher"):
        panel.controls.values = {"saliency": method, "pattern": "2:4"}
    panel.close()
    assert set(widget._instances) <= before


def test_what_is_replaced_goes() -> None:
    """An example that was not listed: a bench that opens one panel after the other; a view opened twice."""
    bench = widgets.Bench("digits-softmax", "prune")
    bench.opener.click()
    counts = []
    for _ in range(2):
        bench.opener.click()
        counts.append(len(widget._instances))
    assert counts[0] == counts[1] and bench.panel is not None and bench.panel.comm is not None
    panel = widgets.panel(workbench.training.Train, "digits-softmax")
    closed = len(widget._instances)
    assert panel.special is not None
    button = panel.special.children[0].children[0]
    button.value = True
    assert len(widget._instances) > closed
    button.value = False
    assert len(widget._instances) == closed
    bench.close()
    panel.close()


def test_closing_ends_what_runs_and_shows_nothing_of_it() -> None:
    """An example that was not listed: a run that ends after its panel was closed made new controls."""
    before = set(widget._instances)
    on = Bench()
    on.go_on.clear()
    panel = widgets.panel(Wave, on, steps=1000)
    panel.job.run.click()
    assert on.reached.wait(20)
    panel.close()
    on.go_on.set()
    assert panel.job.wait(20) and panel.result is None
    assert set(widget._instances) <= before
