"""The spectrum panel: the density live, layers to click, another subject laid over,
and the batch size on a slider.

    from widgets.spectrum import SpectrumPanel
    SpectrumPanel(dense, others={"pruned": pruned, "4 bits": quantized})

Clicking a layer in the heat map measures that layer's own spectrum; *All layers* comes back. *Lay over*
measures another subject with the same settings. What is asked while a run is going on comes next. The batch
slider marks where random matrix theory puts the largest eigenvalue and the noise.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from widgets.compare import overlay
from widgets.jobs import guarded
from widgets.panels import Panel
from widgets.plot import PlotView
from workbench.curvature import Spectrum
from workbench.curvature.studies.drawings import layers_figure, with_room_for_labels
from workbench.errors import BadInput
from workbench.figures import color
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class SpectrumPanel(Panel):
    """`Panel(Spectrum, on)` with a heat map of layers and an overlay of other subjects.

    others : name -> Subject that can be laid over the spectrum (a pruned, quantized or recovered one).
        Further arguments as for `Panel`. `.overlaid` holds the spectra measured of them with the settings
        of the last run.
    """

    children: Any

    def __init__(
        self,
        on: Any,
        others: Mapping[str, Subject] | None = None,
        *,
        instrument: type[Instrument] | Instrument = Spectrum,
        **options: Any,
    ) -> None:
        self.others = dict(others or {})
        self.overlaid: dict[str, Result] = {}
        self._target: str | None = None
        self._map: Result | None = None  # the last result over more than one layer, which the heat map shows
        self.layers_plot = PlotView(alt="mean eigenvalue of every layer; click one for its spectrum")
        self.layers_plot.add_class("wb-layers")
        self.whole = ipywidgets.Button(
            description="All layers",
            disabled=True,
            tooltip="Back to the spectrum of all layers of the heat map together",
        )
        style = {"description_width": "initial"}
        self.other = ipywidgets.Dropdown(
            description="Lay over", options=["nothing", *self.others], value="nothing", style=style
        )
        self.other.add_class("wb-field-other")
        self.layer_note = ipywidgets.HTML()
        super().__init__(instrument, on, **options)
        self.whole.on_click(guarded(self.job.note, lambda _: self.measure_all()))
        self.other.observe(
            guarded(self.job.note, lambda _: None if self._quiet else self.lay_over(self.other.value)),
            "value",
        )
        self.layers_plot.observe(guarded(self.job.note, self._clicked), "clicked")
        row = ipywidgets.HBox(
            [self.whole, self.other, self.layer_note],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        row.add_class("wb-section")
        row.layout.display = "none" if os.environ.get("WORKBENCH_HEADLESS") else ""
        place = list(self.children).index(self.comparison)
        self.children = (*self.children[:place], self.layers_plot, row, *self.children[place:])
        self.add_class("wb-panel-spectrum")

    # ---- layers --------------------------------------------------------------------------------------------
    def measure_layer(self, name: str) -> None:
        """Measure the spectrum of one layer (or of layers by glob) with the other settings as they are."""

        def begin() -> None:
            self.controls.values = {"layers": name}
            self._target = None
            self.job.start()

        self._ask(begin, f"spectrum of {name}")

    def measure_all(self) -> None:
        """Back to the layers that the heat map shows."""
        self.measure_layer("all" if self._map is None else self._map.instrument.model_dump()["layers"])

    def _ask(self, begin: Callable[[], None], what: str) -> None:
        if self.job.after(begin):
            self.layer_note.value = f'<span role="status">next, after this run: {html.escape(what)}</span>'

    def _clicked(self, change: Mapping[str, Any]) -> None:
        point = change["new"]
        if point is None or self._map is None:
            return
        self.layers_plot.clicked = None  # type: ignore[assignment]  # or a second click on the same cell would be no change
        if point.get("layer"):
            self.measure_layer(point["layer"])

    # ---- other subjects ------------------------------------------------------------------------------------
    def lay_over(self, name: str) -> None:
        """Draw the spectrum of another subject over this one; measured first when it has not been."""
        if name == "nothing" or name in self.overlaid:
            self._draw()
            return

        def begin() -> None:
            if self.result is None:
                self._show_other("nothing")
                raise BadInput("lay over: there is no spectrum to lay it over yet; press Run first")
            self._target = name
            self.job.start()

        self._ask(begin, f"{name}, laid over")

    def _show_other(self, name: str) -> None:
        self._quiet = True
        self.other.value = name
        self._quiet = False

    def _work(self, progress: Progress) -> Result:
        if self._target is None:
            return super()._work(progress)
        assert self.result is not None
        try:
            return self.result.instrument.run(self.others[self._target], progress=progress)
        except Exception:
            self._target = None
            self._show_other("nothing")
            raise

    def _preview(self, result: Result) -> None:
        if self._target is None:
            super()._preview(result)

    def _finished(self, result: Result) -> None:
        name, self._target = self._target, None
        if name is not None:
            self.overlaid[name] = result
            self._show_other(name)
            self._draw()
            return
        self.overlaid = {}
        self._show_other("nothing")
        layers = result.tables.get("layers")
        if layers is not None and len(layers) > 1:
            self._map = result
            drawn = layers_figure(layers)
            self.layers_plot.figure = drawn.update_layout(
                title_text="Curvature by layer: click a cell for its own spectrum"
            )
        self.whole.disabled = result is self._map
        super()._finished(result)

    def _draw(self) -> None:
        with self.plot.hold_sync():  # one picture, not one without and then one with the other subject
            super()._draw()
            found = self.overlaid.get(self.other.value)
            self.layer_note.value = ""
            if found is None or self.result is None:
                return
            self.plot.figure = self._over(found.figure(**self._valid_view(found)))
            if "top_eigenvalue" in found.facts and "top_eigenvalue" in self.result.facts:
                ratio = found.facts["top_eigenvalue"] / self.result.facts["top_eigenvalue"]
                text = (
                    f"top eigenvalue of {self.other.value}: {found.facts['top_eigenvalue']:.4g}, "
                    f"{ratio:.3g} times this one's"
                )
                self.layer_note.value = f'<span role="status">{html.escape(text)}</span>'

    def _over(self, other: go.Figure) -> go.Figure:
        """The drawn spectrum with another over it, told apart by colour on light and dark pages,
        and labels thinned for both.
        """
        merged = overlay(self.plot.figure, other, self.other.value)
        for trace in merged.data[len(self.plot.figure.data) :]:
            trace.opacity = 1.0
            if trace.fillcolor:
                trace.fillcolor = "rgba(204,121,167,0.18)"
            else:
                trace.update(line_color=color(3), marker_color=color(3))
        return with_room_for_labels(merged)
