"""The Python side of the views: what crosses to the page, and what stands in where there is no kernel."""

from __future__ import annotations

import io
import json

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from widgets.bitmap import Bitmap, encoded, palette
from widgets.plot import PLOTLY_MIME, PlotlyLibrary, PlotView, packed
from workbench.errors import BadInput
from workbench.figures import figure, line


def unpacked(value: object) -> object:
    """What plot.js makes of the packed tree."""
    if isinstance(value, list):
        return [unpacked(v) for v in value]
    if isinstance(value, dict):
        if "buffer" in value:
            return np.frombuffer(value["buffer"], value["dtype"]).reshape(value["shape"])
        return {k: unpacked(v) for k, v in value.items()}
    return value


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
        "int8",
        "uint8",
        "int32",
        "int64",
        "uint64",
        "float16",
        "bool",
        "U3",
        "object",
        "datetime64[s]",
    ],
)
@pytest.mark.parametrize("shape", [(0,), (6,), (2, 3), (1, 2, 3)])
def test_arrays_of_every_kind_arrive_with_their_values(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    arrived = unpacked(packed({"a": [array]}))["a"][0]  # type: ignore[index]
    np.testing.assert_array_equal(np.asarray(arrived, dtype=array.dtype).reshape(shape), array)
    strided = np.arange(12.0).reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(unpacked(packed(strided)), strided)  # type: ignore[arg-type]


def test_a_figure_survives_and_the_library_is_shared() -> None:
    fig = figure("Title", x="x")
    line(fig, np.arange(4), np.arange(4) ** 2, "squares", band=(np.zeros(4), np.ones(4)))
    view = PlotView(fig)
    assert view.figure == fig and view.library is PlotView().library is PlotlyLibrary.shared()
    bundle, _ = view._repr_mimebundle_()  # type: ignore[misc]
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert go.Figure(bundle[PLOTLY_MIME]) == go.Figure(json.loads(fig.to_json()))
    assert PLOTLY_MIME not in PlotView()._repr_mimebundle_()[0]  # type: ignore[index]  # nothing to see yet
    view.figure = figure("Other")
    assert view.revision == 1 and view.figure.layout.title.text == "Other"


def test_codes_are_linear_exact_to_half_a_step_and_zero_means_missing() -> None:
    values = np.random.default_rng(0).normal(size=(50, 60)).astype(np.float32)
    values[3, 4], values[5, 6] = np.nan, np.inf
    codes, low, high = encoded(values)
    finite = np.isfinite(values)
    assert (codes == 0).sum() == 2 and codes[3, 4] == codes[5, 6] == 0
    assert low == values[finite].min() and high == values[finite].max()
    decoded = low + (codes.astype(float) - 1) / 254 * (high - low)
    assert np.abs(decoded - values)[finite].max() <= (high - low) / 508 * (1 + 1e-4)
    clipped, _, _ = encoded(values, -1, 1)
    assert clipped[finite].min() == 1 and clipped[finite].max() == 255
    assert encoded(np.full((2, 2), 7.0))[0].tolist() == [[1, 1], [1, 1]]
    assert encoded(np.array([[True, False]]))[0].tolist() == [[1, 0]]


def test_bitmap_of_classes_has_their_names_and_colours() -> None:
    bitmap = Bitmap(
        np.array([[0, 1], [2, 3]]), "two masks", classes={"a": "#010203", "b": "#0a0b0c", "both": "#ffffff"}
    )
    assert (bitmap.kind, bitmap.names, bitmap.cells) == (
        "classes",
        ["a", "b", "both"],
        bytes((0, 1, 2, 3)),
    ) and len(bitmap.palette) == 1024
    assert bitmap.palette[:12] == bytes((0, 0, 0, 0, 1, 2, 3, 255, 10, 11, 12, 255))
    with pytest.raises(BadInput, match="class numbers"):
        bitmap.show(np.array([[4]]), classes={"a": "#010203"})


def test_bitmap_refuses_what_is_not_a_matrix() -> None:
    for wrong in (np.zeros(3), np.zeros((0, 3)), np.zeros((1, 2, 3))):
        with pytest.raises(BadInput, match="rows and columns"):
            Bitmap(wrong)


def test_the_static_picture_shows_the_cells() -> None:
    mask = np.zeros((20, 30), bool)
    mask[:, 15:] = True
    image = np.asarray(Image.open(io.BytesIO(Bitmap(mask, "half").png())))
    assert image.shape == (320, 480, 4)
    assert image[5, 5, 3] == 0 and image[5, 470].tolist() == [0, 114, 178, 255]
    large = np.asarray(
        Image.open(io.BytesIO(Bitmap(np.tile([[True, False]], (1500, 1500)), "stripes").png()))
    )
    assert large.shape == (500, 1000, 4) and set(np.unique(large[..., 3])) <= {
        84,
        85,
        86,
        128,
        127,
        170,
        169,
        171,
    }  # averaged, not sampled
    assert len(palette("mask")) == len(palette("magnitude")) == 1024


def test_showing_another_matrix_changes_one_state() -> None:
    view = Bitmap(np.zeros((2, 3)), "a")
    view.show(np.ones((4, 5), bool), "b")
    assert (view.rows, view.columns, view.kind, view.label, len(view.cells)) == (4, 5, "mask", "b", 20)
