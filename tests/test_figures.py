"""Thinning keeps every peak; lines, bands and default figures are what their arguments say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench import figures


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(0, 500), elements=st.floats(-1e6, 1e6) | st.just(np.nan)),
    st.integers(4, 60),
)
def test_thinning_keeps_ends_extremes_and_order(y: np.ndarray, points: int) -> None:
    x = np.arange(len(y))
    thin_x, thin_y = figures.thin(x, y, points)
    assert len(thin_x) == len(thin_y) <= max(points, 0 if len(y) > points else len(y))
    assert np.all(np.diff(thin_x) > 0)
    np.testing.assert_array_equal(thin_y, y[thin_x])  # points of the curve, none invented
    if len(y):
        assert thin_x[0] == 0 and thin_x[-1] == len(y) - 1
    finite = y[np.isfinite(y)]
    if len(finite):
        assert np.nanmax(thin_y) == finite.max() and np.nanmin(thin_y) == finite.min()


def test_thinning_keeps_the_extremes_of_every_run() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    thin_x, thin_y = figures.thin(np.arange(len(y)), y, 202)
    for run in np.array_split(y, 100):
        assert run.max() in thin_y and run.min() in thin_y
    assert len(thin_x) <= 202


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="equally long"):
        figures.thin([1, 2], [1])
    with pytest.raises(ValueError, match="at least 4"):
        figures.thin([1], [1], 3)
    with pytest.raises(ValueError, match="exactly one"):
        figures.rule(figures.figure("t"), "both", x=1, y=1)


def test_a_rule_and_its_label_stand_at_the_same_place() -> None:
    """Plotly takes the place of a line as the value on every axis,
    that of a label as the logarithm on a logarithmic one.
    """
    fig = figures.figure("t", xaxis_type="log")
    figures.rule(fig, "fifty", x=50.0)
    figures.rule(fig, "two", y=2.0)
    assert [(s.x0, s.y0) for s in fig.layout.shapes] == [(50.0, 0), (0, 2.0)]
    first, second = fig.layout.annotations
    assert (
        first.x == pytest.approx(1.69897)
        and second.y == 2.0
        and (first.text, second.text) == ("fifty", "two")
    )


def test_lines_differ_in_colour_dash_and_marker_and_bands_belong_to_them() -> None:
    fig = figures.figure("Title", x="sparsity", y="loss (nats)", xaxis_type="log")
    for index, name in enumerate("abcdefghijklm"):
        figures.line(fig, [1, 2, 3], [index, 1, 2], name, band=([0, 0, 0], [3, 3, 3]) if index == 0 else None)
    curves = [t for t in fig.data if t.showlegend]
    assert [t.name for t in curves] == list("abcdefghijklm")
    assert (
        len({(t.line.color, t.line.dash) for t in curves})
        == 13
        == len({(t.line.color, t.marker.symbol) for t in curves})
    )
    band = fig.data[0]
    assert (
        band.fill == "toself"
        and band.legendgroup == "a"
        and list(band.y) == [0, 0, 0, 3, 3, 3]
        and list(band.x) == [1, 2, 3, 3, 2, 1]
    )
    assert (
        fig.layout.title.text == "Title"
        and fig.layout.yaxis.title.text == "loss (nats)"
        and fig.layout.xaxis.type == "log"
    )


def test_long_curves_are_sent_thin_and_the_template_is_slim() -> None:
    fig = figures.figure("t")
    figures.line(fig, np.arange(10**5), np.arange(10**5), "long")
    assert len(fig.data[0].x) <= figures.MAX_POINTS and fig.data[0].mode == "lines"
    assert len(pio.to_json(figures.figure("t"))) < 3000


def test_the_default_figure_of_a_table() -> None:
    bars = figures.table_figure(
        pd.DataFrame({"layer": ["a", "b"], "error": [1.0, 2.0], "kept": [True, False]}), "T"
    )
    assert (
        [t.type for t in bars.data] == ["bar"]
        and list(bars.data[0].y) == ["a", "b"]
        and list(bars.data[0].x) == [1.0, 2.0]
    )
    curve = figures.table_figure(pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0]}), "T")
    assert (
        [t.type for t in curve.data] == ["scatter"]
        and curve.layout.xaxis.title.text == "step"
        and curve.layout.yaxis.title.text == "loss"
    )
    assert len(figures.table_figure(pd.DataFrame({"word": ["x"]}), "T").data) == 0


def test_no_figure_of_a_notebook_offers_to_be_sent_away() -> None:
    bundle = pio.renderers["plotly_mimetype"].to_mimebundle(figures.figure("T").to_dict())
    (shown,) = bundle.values()
    assert shown["config"]["modeBarButtonsToRemove"] == ["sendChartToCloud"]


def test_known_methods_keep_their_look_in_every_figure() -> None:
    assert figures.looks(["GPTQ", "magnitude"]) == {"GPTQ": 4, "magnitude": 0}
    assert figures.looks(["GPTQ", "my own"]) == {"GPTQ": None, "my own": None}
    assert len(set(figures.look.LOOKS.values())) == len(figures.look.LOOKS)
