"""`PlotView`: a Plotly figure shown live in a notebook.

    view = PlotView(result.figure())
    view.figure = result.figure(cut=0.1)      # redrawn in place, zoom kept

The whole figure is the widget's state, drawn with `Plotly.react`: the last one wins, so no update can be lost
or pile up. Arrays cross as binary buffers. plotly.js itself (4.8 MB) crosses gzipped and once for a page, in
a model all views share. Without a kernel, in a report or in another viewer,
the static twin in the mime bundle shows instead.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import ipywidgets
import numpy as np
import plotly
import plotly.graph_objects as go
import traitlets
from plotly.io import to_json
from plotly.offline import get_plotlyjs

import workbench.figures
from widgets.whole import Whole

PLOTLY_MIME = "application/vnd.plotly.v1+json"
_HERE = Path(__file__).parent
_SELECTION = Path(workbench.figures.__file__).with_name("selection.js")


@functools.cache
def _gzipped_plotly() -> bytes:
    return gzip.compress(get_plotlyjs().encode("utf-8"), 6, mtime=0)


class PlotlyLibrary(Whole, anywidget.AnyWidget):
    """plotly.js, gzipped, as a widget model: one for a kernel, referred to by every `PlotView`."""

    _esm = "export default {}"
    everybodys: ClassVar[bool] = True
    code = traitlets.Bytes(b"").tag(sync=True)
    _shared: ClassVar[PlotlyLibrary | None] = None

    @classmethod
    def shared(cls) -> PlotlyLibrary:
        if (
            cls._shared is None or cls._shared.comm is None
        ):  # closed with every other widget by Widget.close_all
            cls._shared = cls(code=_gzipped_plotly())
        return cls._shared


def packed(value: Any, _widget: Any = None) -> Any:
    """A figure's tree with its arrays as {"buffer", "dtype", "shape"},
    which ipywidgets sends as binary messages.

    JavaScript has no 64-bit integer arrays that Plotly takes, so those become float64 (exact up to 2**53).
    """
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "uif" or value.dtype == np.float16 or value.ndim > 2 or value.size == 0:
            return value.tolist()
        if value.dtype.itemsize == 8 and value.dtype.kind in "ui":
            value = value.astype(np.float64)
        value = np.ascontiguousarray(value)
        return {"buffer": memoryview(value).cast("B"), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "to_plotly_json"):
        return packed(value.to_plotly_json())
    return value


def _spec(figure: go.Figure | None) -> dict[str, Any]:
    if figure is None:
        return {"data": [], "layout": {}}
    # Not Figure.to_dict, which turns arrays into base64 text.
    return {
        "data": [trace.to_plotly_json() for trace in figure.data],
        "layout": figure.layout.to_plotly_json(),
    }


class PlotView(Whole, anywidget.AnyWidget):
    """A live view of one Plotly figure; assign `figure` to change it.

    figure : what is drawn. alt : text for screen readers (default: what the figure says of itself, else its
        title). clicked : the last point clicked, {"trace", "point", "x", "y", "layer"} or None. Set the
        figure in the constructor when there is one: the first state a page receives is then complete.
    """

    _esm = _SELECTION.read_text(encoding="utf-8") + (_HERE / "plot.js").read_text(encoding="utf-8")
    _css = (_HERE / "workbench.css").read_text(encoding="utf-8")
    spec = traitlets.Dict().tag(sync=True, to_json=packed)
    revision = traitlets.Int(0).tag(sync=True)
    alt = traitlets.Unicode("").tag(sync=True)
    clicked = traitlets.Dict(None, allow_none=True).tag(sync=True)
    library = traitlets.Instance(PlotlyLibrary).tag(sync=True, **ipywidgets.widget_serialization)
    library_version = traitlets.Unicode(plotly.__version__).tag(sync=True)

    @traitlets.default("library")
    def _default_library(self) -> PlotlyLibrary:
        return PlotlyLibrary.shared()

    def __init__(self, figure: go.Figure | None = None, alt: str = "", **traits: Any) -> None:
        super().__init__(spec=_spec(figure), alt=alt, **traits)
        self._told: Callable[[str], None] | None = None
        self.on_msg(self._pictured)

    def ask_picture(self, told: Callable[[str], None]) -> None:
        """`told(png)` with the figure as the page draws it next, in base64; never called without a page."""
        self._told = told
        self.send({"picture": True})

    def _pictured(self, _: Any, message: Any, buffers: Any) -> None:
        picture = str(message.get("picture", "")) if isinstance(message, dict) else ""
        told, self._told = self._told, None
        if told is not None and picture.startswith("data:image/png;base64,"):
            told(picture.partition(",")[2])

    @property
    def figure(self) -> go.Figure:
        return go.Figure(self.spec, skip_invalid=True)

    @figure.setter
    def figure(self, figure: go.Figure | None) -> None:
        with self.hold_sync():
            self.revision += 1
            self.spec = _spec(figure)

    def static_twin(self) -> dict[str, Any]:
        """The figure as a mime bundle for viewers without a kernel; empty while there is nothing to see."""
        if not self.spec["data"]:
            return {}
        return {PLOTLY_MIME: json.loads(to_json(self.figure, validate=False))}

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle
        return {**data, **self.static_twin()}, metadata
