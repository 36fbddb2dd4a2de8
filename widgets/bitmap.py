"""`Bitmap`: a matrix of 10^5 to 10^7 cells as a picture, one pixel a cell, to zoom and read out.

    Bitmap(layer.weight != 0, "sparsity pattern of blocks.0.mlp.fc1")
    Bitmap(error, "absolute error", unit="1e-3")
    Bitmap(codes, "two masks", classes={"only one": "#0072B2", "only the other": "#D55E00", "both":
    BOTH_COLOR})

The cells cross to the page as one byte each: 0 is "no value" (or False), 1 to 255 run linearly from `low` to
`high`, so a value read out is exact to 1/508 of that range. Wheel, + and - zoom; dragging moves, shift
and dragging zooms into a box; arrow keys move a cursor whose cell is read out;
0 or a double click shows everything.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from numpy.typing import ArrayLike, NDArray
from plotly.colors import sample_colorscale

from workbench.errors import BadInput

_HERE = Path(__file__).parent
MASK_COLOR = (0, 114, 178, 255)  # Okabe-Ito blue: reads on a light and on a dark page
BOTH_COLOR = "#8a8a8a"  # of what two classes share: grey, on either page
STATIC_PIXELS = 1000  # the static twin's longer side


@functools.cache
def palette(kind: str) -> bytes:
    """256 RGBA entries: "mask" (a set cell in blue, an empty one transparent) or "magnitude"
    (transparent, then cividis).
    """
    if kind == "mask":
        return bytes((0, 0, 0, 0)) + bytes(MASK_COLOR) * 255
    colors = sample_colorscale("Cividis", np.linspace(0, 1, 255), colortype="tuple")
    return bytes((0, 0, 0, 0)) + b"".join(
        bytes((*(round(255 * channel) for channel in color), 255)) for color in colors
    )


def encoded(
    matrix: ArrayLike, low: float | None = None, high: float | None = None
) -> tuple[NDArray[np.uint8], float, float]:
    """A matrix (rows, columns) as one byte a cell, and the values that bytes 1 and 255 stand for.

    Values that are not finite become 0, values outside [low, high] its ends. `low` and `high` default to
    the smallest and the largest finite value.
    """
    cells = np.asarray(matrix)
    if cells.ndim != 2 or cells.size == 0:
        raise BadInput(
            f"matrix: expected rows and columns, got shape {cells.shape}; "
            "reshape it, or pick one layer's weight"
        )
    if cells.dtype == np.bool_:
        return cells.astype(np.uint8), 0.0, 1.0
    values = cells.astype(np.float32)
    finite = np.isfinite(values)
    if low is None:
        low = float(values[finite].min()) if finite.any() else 0.0
    if high is None:
        high = float(values[finite].max()) if finite.any() else 1.0
    if not high > low:
        high = low + 1.0
    scaled = np.clip((values - low) / (high - low), 0, 1)
    codes = np.rint(np.where(finite, scaled, 0) * 254).astype(np.uint8) + np.uint8(1)
    return np.where(finite, codes, np.uint8(0)), low, high


def class_palette(colors: Sequence[str]) -> bytes:
    """256 RGBA entries: transparent, then the classes' hex colours."""
    found = b"".join(bytes((*(int(value[i : i + 2], 16) for i in (1, 3, 5)), 255)) for value in colors)
    return (bytes(4) + found).ljust(1024, bytes(1))


def class_codes(matrix: ArrayLike, count: int) -> NDArray[np.uint8]:
    """A matrix of class numbers 0 to `count` as bytes."""
    cells = np.asarray(matrix)
    if cells.ndim != 2 or cells.size == 0 or cells.min() < 0 or cells.max() > min(count, 255):
        raise BadInput(
            f"matrix: expected rows and columns of class numbers 0 to {min(count, 255)}, "
            f"got shape {cells.shape}"
        )
    return cells.astype(np.uint8)


class Bitmap(anywidget.AnyWidget):
    """A live view of one matrix; `show` puts another one in its place,
    keeping zoom when the shape is the same.

    label : says what is seen. unit : of the values. low, high : values of the palette's ends.
        height : pixels, at most.
    classes : names and hex colours; the matrix then holds whole numbers,
        0 for none of them and i for the i-th name.
    """

    _esm = (_HERE / "bitmap.js").read_text(encoding="utf-8")
    _css = (_HERE / "workbench.css").read_text(encoding="utf-8")
    cells = traitlets.Bytes(b"").tag(sync=True)
    palette = traitlets.Bytes(b"").tag(sync=True)
    rows = traitlets.Int(0).tag(sync=True)
    columns = traitlets.Int(0).tag(sync=True)
    kind = traitlets.Unicode("mask").tag(sync=True)
    low = traitlets.Float(0.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    unit = traitlets.Unicode("").tag(sync=True)
    height = traitlets.Int(360).tag(sync=True)

    def __init__(
        self,
        matrix: ArrayLike,
        label: str = "",
        unit: str = "",
        *,
        low: float | None = None,
        high: float | None = None,
        height: int = 360,
        classes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(label=label, unit=unit, height=height, **self._state(matrix, low, high, classes))

    @staticmethod
    def _state(
        matrix: ArrayLike, low: float | None, high: float | None, classes: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        if classes:
            codes, low, high, kind, colors = (
                class_codes(matrix, len(classes)),
                0.0,
                float(len(classes)),
                "classes",
                class_palette(list(classes.values())),
            )
        else:
            codes, low, high = encoded(matrix, low, high)
            kind = "mask" if np.asarray(matrix).dtype == np.bool_ else "magnitude"
            colors = palette(kind)
        return {
            "cells": codes.tobytes(),
            "rows": codes.shape[0],
            "columns": codes.shape[1],
            "kind": kind,
            "palette": colors,
            "low": low,
            "high": high,
            "names": list(classes or ()),
        }

    def show(
        self,
        matrix: ArrayLike,
        label: str | None = None,
        *,
        low: float | None = None,
        high: float | None = None,
        classes: Mapping[str, str] | None = None,
    ) -> None:
        """Show another matrix."""
        with self.hold_sync():
            for name, value in self._state(matrix, low, high, classes).items():
                setattr(self, name, value)
            if label is not None:
                self.label = label

    def png(self) -> bytes:
        """The picture as PNG, averaged down to at most `STATIC_PIXELS` on its longer side;
        small matrices are enlarged.
        """
        from PIL import Image

        codes = np.frombuffer(self.cells, np.uint8).reshape(self.rows, self.columns)
        colors = np.frombuffer(self.palette, np.uint8).reshape(256, 4)
        image = Image.fromarray(colors[codes], "RGBA")
        longer = max(image.size)
        if longer > STATIC_PIXELS:
            width, height = (max(1, round(side * STATIC_PIXELS / longer)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BOX)
        elif longer < STATIC_PIXELS // 2:
            factor = STATIC_PIXELS // 2 // longer
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return file.getvalue()

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle
        twin = {
            "image/png": base64.b64encode(self.png()).decode("ascii"),
            "text/plain": self.label or "matrix",
        }
        return {**data, **twin}, metadata
