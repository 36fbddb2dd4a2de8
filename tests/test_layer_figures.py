"""Layers are rows where they are few and a grid where they are many; every layer is where its name says."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.figures import by_layer, grid_of_layers, short_names

BERT = [
    f"bert.encoder.layer.{block}.{role}"
    for block in range(12)
    for role in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def test_common_parts_of_names_go_and_what_is_left_tells_them_apart() -> None:
    assert short_names(["a.b.0.q.weight", "a.b.1.q.weight"]) == ["0.q", "1.q"]
    assert short_names(["a.b", "a.b"]) == ["b", "b"]
    assert short_names(["only"]) == ["only"]
    assert short_names(["a.x", "a.x.y"]) == ["x", "x.y"]
    assert len(set(short_names(BERT))) == len(BERT)


def test_a_grid_has_a_cell_for_every_layer_of_every_stack() -> None:
    t5 = [f"{side}.block.{b}.layer.0.{m}" for side in ("encoder", "decoder") for b in (0, 1) for m in "qk"]
    names = [*t5, "lm_head"]
    rows, columns, where = grid_of_layers(names)
    assert columns == ["0", "1", "outside"]
    assert rows == [
        "encoder layer.0.q",
        "encoder layer.0.k",
        "decoder layer.0.q",
        "decoder layer.0.k",
        "lm_head",
    ]
    assert len(set(where.values())) == len(names)
    assert where["decoder.block.1.layer.0.k"] == (3, 1)


def test_few_layers_are_rows_and_many_are_cells_that_hold_their_values() -> None:
    values = np.arange(1.0, 73.0)
    few = by_layer("Error", BERT[:24], {"error": values[:24]}, "nats")
    assert few.data[0].type == "bar" and few.data[0].orientation == "h" and few.layout.xaxis.range is None
    whole = by_layer("Share", BERT[:9], {"share": np.full(9, 0.5)}, "share", between=(0, 1))
    assert whole.layout.xaxis.range == (0, 1)
    many = by_layer("Error", BERT, {"error": values, "other": values[::-1]}, "nats")
    assert [trace.type for trace in many.data] == ["heatmap", "heatmap"]
    for trace, given in zip(many.data, (values, values[::-1]), strict=True):
        for name, value in zip(BERT, given, strict=True):
            row, column = grid_of_layers(BERT).where[name]
            assert trace.meta["layers"][row][column] == name
            assert 10 ** np.asarray(trace.z)[row, column] == pytest.approx(value)
            assert f"{value:.4g}" in trace.meta["clicked"][row][column]
    assert many.layout.coloraxis.colorbar.title.text == "nats"
    assert "largest 72 (bert.encoder.layer.11.output.dense)" in many.layout.meta["alt"]


def test_a_thousand_layers_fit_a_screen() -> None:
    names = [f"m.layers.{block}.r{role}" for block in range(100) for role in range(10)]
    fig = by_layer("Error", names, {"error": np.ones(1000)}, "nats")
    assert np.asarray(fig.data[0].z).shape == (10, 100)
    assert fig.layout.height < 600


def test_far_values_are_logarithmic_and_signs_keep_their_side() -> None:
    spread = 10.0 ** np.linspace(-4, 0, 72)
    fig = by_layer("Error", BERT, {"error": spread}, "nats")
    np.testing.assert_allclose(sorted(np.asarray(fig.data[0].z).ravel()), np.log10(spread), atol=1e-12)
    marks = dict(
        zip(fig.layout.coloraxis.colorbar.ticktext, fig.layout.coloraxis.colorbar.tickvals, strict=True)
    )
    assert marks["0.01"] == pytest.approx(-2)
    signed = by_layer("Change", BERT, {"change": np.concatenate([-spread[::2], spread[1::2]])}, "nats")
    drawn, axis = np.asarray(signed.data[0].z), signed.layout.coloraxis
    assert axis.cmin == -axis.cmax and (drawn < 0).sum() == 36
    near = by_layer("Share", BERT, {"share": np.full(72, 0.5)}, "share", between=(0, 1))
    assert (near.layout.coloraxis.cmin, near.layout.coloraxis.cmax) == (0, 1)
    with_zero = by_layer("Error", BERT, {"error": np.where(spread < 0.1, 0.0, spread)}, "nats", log=True)
    assert np.isnan(np.asarray(with_zero.data[0].z)).sum() == (spread < 0.1).sum()


def test_the_largest_come_first_and_the_title_says_how_many() -> None:
    values = np.random.default_rng(0).permutation(72).astype(float)
    fig = by_layer("Error", BERT, {"error": values}, "nats", largest=True)
    assert "24 largest of 72" in fig.layout.title.text
    np.testing.assert_array_equal(fig.data[0].x, np.sort(values)[::-1][:24])
    assert (
        by_layer("Error", [], {"error": []}, "nats", largest=True)
        .layout.meta["alt"]
        .endswith("No layer has a value")
    )
