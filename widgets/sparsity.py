"""The sparsity panel: masks of any layer at any sparsity, re-thresholded while the slider moves.

    import widgets.sparsity
    widgets.sparsity.SparsityPanel("digits-vit")

Run computes the saliencies of the chosen methods once; after that the slider only moves thresholds over their
ranks. Measure puts the masks on a copy of the model and evaluates it beside the prediction.
"""

from __future__ import annotations

import html
from typing import Any, ClassVar

import ipywidgets
import numpy as np

from widgets.bitmap import BOTH_COLOR, Bitmap
from widgets.jobs import Job, Note, guarded
from widgets.panels import Panel
from widgets.plot import PlotView
from widgets.whole import Whole
from workbench.errors import BadInput
from workbench.figures import color
from workbench.progress import Progress
from workbench.pruning.studies.saliency_map import SaliencyMap, SaliencyMapResult
from workbench.results import Result
from workbench.subjects import Subject, subject

VIEWS = (
    ("density of each layer", "density"),
    ("density of each head", "heads"),
    ("predicted loss", "predicted"),
    ("overlap of methods", "overlap"),
)


class SparsityPanel(Whole, ipywidgets.VBox):
    """Look at masks before making them.

    on : a Subject or anything `workbench.subject` opens.
        `.result` is the computed saliency map, `.measured` the list of measurements.
    """

    caption: ClassVar[str] = "Masks at any sparsity"

    @classmethod
    def beside(cls, panel: Panel) -> SparsityPanel:
        """For a panel's subject and settings."""
        return cls(panel.opened(), **panel.controls.given)

    def __init__(self, on: Any, methods: str = "magnitude,wanda,obd,obert", **fields: Any) -> None:
        self.on: Subject = on if isinstance(on, Subject) else subject(on)
        self.result: SaliencyMapResult | None = None
        self.measured: list[dict[str, Any]] = []
        self._fields = fields
        names = [layer.name for layer in self.on.layers(fields.get("layers", "blocks"))]
        wide: dict[str, Any] = {
            "style": {"description_width": "7rem"},
            "layout": ipywidgets.Layout(width="auto", min_width="0"),
        }
        self.methods = ipywidgets.Text(value=methods, description="methods", continuous_update=False, **wide)
        self.method = ipywidgets.Dropdown(options=[], description="mask of", **wide)
        self.overlay = ipywidgets.Dropdown(options=[("nothing", "")], description="overlay", **wide)
        self.layer = ipywidgets.Dropdown(options=names, description="layer", **wide)
        self.view = ipywidgets.Dropdown(options=VIEWS, description="view", **wide)
        self.sparsity = ipywidgets.FloatSlider(
            value=0.7, min=0.0, max=0.99, step=0.01, description="sparsity", readout_format=".0%", **wide
        )
        for name in ("methods", "method", "overlay", "layer", "view", "sparsity"):
            getattr(self, name).add_class(f"wb-field-{name}")
        self.note, self.facts = Note(), ipywidgets.HTML()
        self.note.layout.flex = "0 0 auto"  # under the other, not beside it
        self.facts.add_class("wb-sparsity-facts")
        self.bitmap = Bitmap(np.zeros((1, 1), dtype=bool), "no mask yet")
        self.plot = PlotView()
        self.job = Job(self._compute, self._computed)
        self.job.note.say("press Run to compute the saliencies")
        self.measure = Job(self._measure, self._measured)
        self.measure.note.say("evaluates the mask's model beside the prediction")
        self.measure.run.description = "Measure"
        for control in (self.sparsity, self.layer, self.method, self.overlay):
            control.observe(guarded(self.note, lambda _: self.threshold()), "value")
        self.view.observe(guarded(self.note, lambda _: self.draw()), "value")
        controls = ipywidgets.Box(
            [self.methods, self.sparsity, self.method, self.overlay, self.layer, self.view]
        )
        controls.add_class("wb-controls")
        title = ipywidgets.HTML(
            f"<h3>Sparsity of {html.escape(self.on.name)}</h3><p>{len(names)} layers; "
            "move the slider to re-threshold</p>"
        )
        title.add_class("wb-title")
        super().__init__(
            [title, controls, self.job, self.measure, self.note, self.facts, self.bitmap, self.plot]
        )
        self.add_class("wb-panel")
        self.add_class("wb-panel-sparsity")

    @property
    def instrument(self) -> SaliencyMap:
        """The settings shown; `BadInput` when they name no method."""
        return SaliencyMap(methods=self.methods.value, **self._fields)

    def _compute(self, progress: Progress) -> Result:
        return self.instrument.run(self.on, progress)

    def _computed(self, result: Result) -> None:
        assert isinstance(result, SaliencyMapResult)
        self.result = None  # the menus below are being filled
        self.method.options = result.methods
        self.method.value = result.methods[0] if result.methods else None
        self.overlay.options = [("nothing", ""), *((m, m) for m in result.methods)]
        self.result = result
        self.threshold()

    def _measure(self, progress: Progress) -> dict[str, Any]:
        if self.result is None:
            raise BadInput("measure: there is no mask yet; press Run first")
        method, sparsity = self.method.value, self.sparsity.value
        split = "validation" if "validation" in self.on.splits else "test"
        found = self.result.measure(self.on, method, sparsity, split, 256, progress)
        dense = self.on.evaluate(split, limit=256, progress=progress)
        return {
            "method": method,
            "sparsity": sparsity,
            "predicted": self.result.predicted(method, sparsity),
            "measured": found["loss"] - dense["loss"],
        } | found

    def _measured(self, value: Any) -> None:
        self.measured.append(value)
        self.threshold()

    def threshold(self) -> None:
        """Show the mask and the numbers at the slider's sparsity; nothing is computed anew."""
        result = self.result
        if result is None or not self.method.value:
            return
        method, other, layer, sparsity = (
            self.method.value,
            self.overlay.value,
            self.layer.value,
            self.sparsity.value,
        )
        mask = result.mask(method, layer, sparsity)
        mask = mask.reshape(-1, mask.shape[-1])
        if other and other != method:
            second = result.mask(other, layer, sparsity).reshape(mask.shape)
            agreement = float((mask & second).sum() / max((mask | second).sum(), 1))
            label = f"{layer}: kept by {method} and {other} at {sparsity:.0%}, Jaccard {agreement:.2f}"
            one, two = (
                color(result.methods.index(name)) for name in (method, other)
            )  # the colours the figure below gives them
            self.bitmap.show(
                mask + 2 * second,
                label,
                classes={f"only {method}": one, f"only {other}": two, "both": BOTH_COLOR},
            )
        else:
            self.bitmap.show(mask, f"{layer}: kept by {method} at {sparsity:.0%}")
        rows = [
            ("kept in this layer", f"{mask.mean():.1%}"),
            (
                "loss change by the diagonal Fisher alone",
                f"{result.predicted(method, sparsity):+.4g} nats (holds for small changes; press Measure)",
            ),
        ]
        rows += [
            (
                f"measured: {m['method']} at {m['sparsity']:.0%}",
                f"{m['measured']:+.4g} (diagonal Fisher {m['predicted']:+.4g})",
            )
            for m in self.measured[-3:]
        ]
        self.facts.value = (
            '<dl class="wb-facts">'
            + "".join(f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in rows)
            + "</dl>"
        )
        self.draw()

    def draw(self) -> None:
        """Draw the chosen view at the slider's sparsity."""
        if self.result is not None:
            self.plot.figure = self.result.figure(show=self.view.value, sparsity=self.sparsity.value)
