"""The quantization panel: a number format drawn on a layer's real weights,
and a walk along an allocation's Pareto front.

    import widgets.quantization
    widgets.quantization.FormatPanel(workbench.subject("minilm-docstrings"))
    widgets.quantization.AllocationPanel(Allocate().run(subject))

Everything redraws while a slider moves: nothing is run on the model but one forward pass when the panel
opens.
"""

from __future__ import annotations

import html
import os
from typing import Any, ClassVar

import ipywidgets
import numpy as np

from widgets.jobs import Job, Note, guarded
from widgets.panels import Panel
from widgets.plot import PlotView
from widgets.whole import Whole
from workbench.errors import BadInput
from workbench.figures import by_layer, figure, line, rule
from workbench.progress import Progress
from workbench.quantization.allocation.allocate import Allocate
from workbench.quantization.allocation.allocation_scores import AllocationScores, ScoredResult
from workbench.quantization.allocation.budget import budget_in
from workbench.quantization.quantize import Quantize
from workbench.quantization.quantized_layer import moments_for
from workbench.quantization.studies.matrix_histogram import (
    Look,
    Matrix,
    look,
    look_figure,
    prepared,
    spread_figure,
)
from workbench.results import Result
from workbench.storage.forecast import duration
from workbench.subjects import Subject

FAMILIES = (
    "integer",
    "integer with zero point",
    "minifloat",
    "nf4",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nvfp4",
    "ternary",
    "binary",
)


def wide() -> dict[str, Any]:
    """Style of a control; each gets its own layout, because the panel hides those that do not matter."""
    return {"style": {"description_width": "8rem"}, "layout": ipywidgets.Layout(width="auto", min_width="0")}


def with_twin(bundle: Any, plot: PlotView, facts: str) -> Any:
    """The live view with what reports and other viewers show: the figure and the numbers."""
    twin = {"text/html": facts, **plot.static_twin()}
    if os.environ.get("WORKBENCH_HEADLESS"):
        return twin
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    return {**data, **twin}, metadata


class FormatPanel(Whole, ipywidgets.VBox):
    """Pick a format and watch its grid and its error on one layer.

    `.instrument` is what a report runs with these settings, `.found` the numbers shown.
    """

    caption: ClassVar[str] = "Number formats on real weights"

    @classmethod
    def beside(cls, panel: Panel) -> FormatPanel:
        """For the layers that a panel quantizes."""
        return cls(panel.opened(), panel.controls.values["layers"])

    def __init__(self, on: Subject, layers: str = "blocks", examples: int = 16) -> None:
        self.on, self.glob = on, layers
        chosen = [layer for layer in on.layers(layers) if len(layer.shape) == 2]
        if not chosen:
            raise BadInput(f"layers: {layers!r} holds stacks of experts only; the panel draws plain matrices")
        self._layers = {layer.name: layer for layer in chosen}
        self._moments = moments_for(on, chosen, examples, Progress())
        self._matrices: dict[tuple[str, bool], Matrix] = {}
        self.found: Look | None = None
        self._rows: list[tuple[str, str]] = []  # names and values of the numbers shown
        self.layer = ipywidgets.Dropdown(options=list(self._layers), description="layer", **wide())
        self.family = ipywidgets.Dropdown(options=FAMILIES, description="format", **wide())
        self.bits = ipywidgets.IntSlider(value=4, min=2, max=8, description="bits", **wide())
        self.exponent = ipywidgets.IntSlider(value=2, min=1, max=5, description="exponent bits", **wide())
        self.mantissa = ipywidgets.IntSlider(value=1, min=0, max=5, description="mantissa bits", **wide())
        self.granularity = ipywidgets.Dropdown(
            options=("group", "channel", "tensor"), description="scale for each", **wide()
        )
        self.group = ipywidgets.SelectionSlider(
            value=64, options=[2**k for k in range(3, 10)], description="group size", **wide()
        )
        self.rotate = ipywidgets.Checkbox(
            value=False, description="Hadamard rotation of the inputs", indent=False
        )
        self.note, self.facts, self.plot, self.spread = (
            Note("ready"),
            ipywidgets.HTML(),
            PlotView(),
            PlotView(),
        )
        self.note.layout.flex = "0 0 auto"  # under the controls, not beside them
        controls = (
            self.layer,
            self.family,
            self.bits,
            self.exponent,
            self.mantissa,
            self.granularity,
            self.group,
            self.rotate,
        )
        for control in controls:
            control.observe(guarded(self.note, lambda _: self.draw()), "value")
            control.add_class("wb-field-" + str(control.description).split()[0])
        box = ipywidgets.Box(list(controls))
        box.add_class("wb-controls")
        words = "The format's values under the real weights of one layer, and the error of rounding to them."
        title = ipywidgets.HTML(f"<h3>Number formats on {html.escape(on.name)}</h3><p>{words}</p>")
        title.add_class("wb-title")
        for control in (self.layer, self.rotate):
            control.observe(guarded(self.note, lambda _: self.draw_spread()), "value")
        views = ipywidgets.Box([self.plot, self.spread])
        views.add_class("wb-views")
        super().__init__([title, box, self.note, self.facts, views])
        self.add_class("wb-panel")
        self.add_class("wb-panel-quantization")
        guarded(self.note, self.draw)()
        guarded(self.note, self.draw_spread)()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        shown = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in self._rows)
        return with_twin(super()._repr_mimebundle_(**options), self.plot, f"<table>{shown}</table>")

    @property
    def format(self) -> str:
        """The format's name, as `Quantize` takes it (integers by their full name)."""
        family = self.family.value
        if family == "integer":
            return f"int{self.bits.value}"
        if family == "integer with zero point":
            return f"uint{self.bits.value}"
        return f"e{self.exponent.value}m{self.mantissa.value}" if family == "minifloat" else str(family)

    @property
    def fixed_block(self) -> bool:
        return str(self.family.value).startswith(("mx", "nv"))

    @property
    def instrument(self) -> Quantize:
        """The settings shown, for every layer of the panel's glob."""
        shared: dict[str, Any] = {
            "layers": self.glob,
            "granularity": "auto" if self.fixed_block else self.granularity.value,
            "group_size": int(self.group.value),
        }
        return Quantize(format=self.format, transform="hadamard" if self.rotate.value else "none", **shared)

    def draw(self) -> None:
        """Round the layer's weights with the settings shown and draw them."""
        integer, real = self.format.startswith(("int", "uint")), self.family.value == "minifloat"
        for control, shown in (
            (self.bits, integer),
            (self.exponent, real),
            (self.mantissa, real),
            (self.granularity, not self.fixed_block),
            (self.group, not self.fixed_block and self.granularity.value == "group"),
        ):
            control.layout.display = "" if shown else "none"
        name = str(self.layer.value)
        granularity = "auto" if self.fixed_block else str(self.granularity.value)
        self.found = look(
            self._matrix(name, bool(self.rotate.value)), self.format, granularity, int(self.group.value)
        )
        self._rows = [
            ("bits a weight", f"{self.found.bits:.3f}"),
            ("error of the weights", f"{self.found.weight_error:.3e}"),
            ("SQNR", f"{self.found.sqnr:.2f} dB"),
            ("error of the outputs", f"{self.found.output_error:.3e}"),
            ("largest / rms", f"{self.found.spread:.1f}"),
            ("kurtosis", f"{self.found.kurtosis:.1f}"),
        ]
        self.facts.value = (
            '<div class="wb-facts">'
            + "".join(f"<span><i>{a}</i> {b}</span>" for a, b in self._rows)
            + "</div>"
        )
        self.plot.figure = look_figure(self.found, f"{self.format} on {name}")
        self.note.say("ready")

    def draw_spread(self) -> None:
        """How even the layer's inputs and weights are, as they are and, when it is on, after the rotation."""
        name = str(self.layer.value)
        shown = {"as they are": self._matrix(name, False)} | (
            {"rotated": self._matrix(name, True)} if self.rotate.value else {}
        )
        self.spread.figure = spread_figure(shown)

    def _matrix(self, name: str, rotate: bool) -> Matrix:
        """A layer as it is rounded, kept: a slider then costs only the rounding."""
        if (name, rotate) not in self._matrices:
            gram = self._moments[name].gram
            assert gram is not None
            self._matrices[name, rotate] = prepared(
                self._layers[name].weight.detach().float(), gram[0], rotate
            )
        return self._matrices[name, rotate]


class AllocationPanel(Whole, ipywidgets.VBox):
    """Any budget of an allocation, answered from kept scores (a result of `Allocate` or `AllocationScores`):
    the slider is the codes' average width, the line a budget in words, the picture each layer's width.

    `.widths` is what `Quantize(layer_bits=...)` takes, `.measured` the result of Measure, which needs the
    subject: `on`.
    """

    caption: ClassVar[str] = "Any budget, and the widths it gives"

    @classmethod
    def beside(cls, panel: Panel) -> AllocationPanel:
        """For a panel's last result."""
        if panel.result is None:
            raise BadInput("allocation: there is no result yet; press Run first")
        return cls(panel.result, panel.opened())

    def __init__(self, result: Result, on: Subject | None = None) -> None:
        if not isinstance(result, ScoredResult):
            raise BadInput(
                f"result: the allocation panel shows a result of allocate, not of {result.instrument.name()}"
            )
        self.result, self.on = result, on
        self.measured: Result | None = None
        front = result.tables["front"]
        self._averages = front[result.widths_column].to_numpy()
        low, high = float(self._averages.min()), float(self._averages.max())
        start = float(result.facts.get("code_bits", (low + high) / 2))
        self.average = ipywidgets.FloatSlider(
            value=start, min=low, max=high, step=0.05, description="average bits", **wide()
        )
        self.average.add_class("wb-field-average")
        self.budget = ipywidgets.Text(
            placeholder="80MB, 4.5 bits, KL 0.05", description="or a budget", **wide()
        )
        self.budget.add_class("wb-field-budget")
        self.note, self.facts, self.plot, self.front = (
            Note("ready"),
            ipywidgets.HTML(),
            PlotView(),
            PlotView(),
        )
        self.note.layout.flex = "0 0 auto"
        title = ipywidgets.HTML(
            "<h3>Widths of the layers of "
            f"{html.escape(str(result.provenance.get('on', 'the subject')))}</h3>"
            "<p>The best allocation of each average width, or of a budget, as predicted.</p>"
        )
        title.add_class("wb-title")
        for control in (self.average, self.budget):
            control.observe(guarded(self.note, lambda _: self.draw()), "value")
        views = ipywidgets.Box([self.plot, self.front])
        views.add_class("wb-views")
        self.job = Job(self._measure, self._show_measured)
        self.job.run.description = "Measure"
        self.job.run.tooltip = "Quantize and measure, beside uniform, random and reversed widths of this size"
        self.cost, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        measure = ipywidgets.VBox([self.cost, self.job, self.table])
        measure.layout.display = "none" if on is None or not self.answers else ""
        super().__init__([title, self.average, self.budget, self.note, self.facts, views, measure])
        self.add_class("wb-panel")
        self.add_class("wb-panel-allocation")
        guarded(self.note, self.draw)()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return with_twin(super()._repr_mimebundle_(**options), self.plot, self.facts.value)

    @property
    def answers(self) -> bool:
        """Whether the result holds what budgets are answered from; one of an earlier version does not."""
        return "scored" in self.result.tables

    @property
    def asked(self) -> dict[str, Any]:
        """The budget shown, as `Allocate` takes it."""
        text = str(self.budget.value).strip()
        return budget_in(text) if text else {"budget": float(self.average.value)}

    @property
    def widths(self) -> dict[str, int]:
        if str(self.budget.value).strip():
            return self.result.allocation(**self.asked).widths
        return self.result.widths_for(float(self.average.value))

    def draw(self) -> None:
        front, column = self.result.tables["front"], self.result.widths_column
        if text := str(self.budget.value).strip():
            answer = self.result.allocation(**budget_in(text))
            widths, here, words = answer.widths, answer.code_bits, answer.words()
        else:
            widths = self.widths
            point = front.iloc[int(np.flatnonzero(self._averages <= self.average.value + 1e-9)[-1])]
            here = float(point[column])
            proven = f"predicted loss change {point['cost']:.4g} nats (proven bound {point['bound']:.4g})"
            words = f"{here:.2f} bits on average, {proven}"
        self.plot.figure = by_layer(
            "Width of each layer",
            list(widths),
            {"bits": list(widths.values())},
            "bits",
            between=(0.0, float(max(self.result.instrument.model_dump()["widths"]))),
        )
        curve = figure(
            "Predicted cost of the best allocation",
            "average bits",
            "predicted loss change (nats)",
            yaxis_type="log",
        )
        line(curve, self._averages, front["cost"].to_numpy(), "optimum of the integer program")
        rule(curve, "here", x=here)
        self.front.figure = curve
        self.facts.value = f"<p>{html.escape(words)}</p>"
        if self.on is not None and self.answers:
            plan = self.instrument
            count = 3 + plan.draws
            seconds = duration(plan.seconds(self.on, self.result, count))
            self.cost.value = (
                f"<p>Measuring it and {count - 1} others of this size takes about {seconds}.</p>"
            )
        self.note.say("ready")

    @property
    def instrument(self) -> Allocate:
        """What measures the budget shown, on the scores of this result."""
        scored = self.result.instrument
        kept = {name: getattr(scored, name) for name in AllocationScores.model_fields}
        more = {n: getattr(scored, n) for n in ("draws", "test_examples") if hasattr(scored, n)}
        return Allocate(**(kept | more | self.asked | {"draws": more.get("draws") or 1}))

    def _measure(self, progress: Progress) -> Result:
        assert self.on is not None
        return self.instrument.run(self.on, progress)

    def _show_measured(self, result: Result) -> None:
        self.measured = result
        wanted = ("strategy", "average_bits", "bytes", "cost", "kl", "kl_low", "kl_high", "distance", "loss")
        shown = result.table[[name for name in wanted if name in result.table]]
        self.table.value = shown.to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}")
