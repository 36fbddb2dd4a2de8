"""Error anatomy: where a quantized model's error is made, what is inherited, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor

from workbench.axis import parameter
from workbench.curvature.estimators.quadratic import mean_loss, predicted_change
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.activations.activations import ActivationQuant, input_ranges
from workbench.quantization.activations.sequential import collecting
from workbench.quantization.allocation.layer_sensitivity import alone, measured_alone
from workbench.quantization.noise import decibel, kurtosis
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.packing import quantizer_of
from workbench.quantization.quantize import Quantize
from workbench.quantization.quantized_layer import mask_of
from workbench.results import Result, choices
from workbench.statistics.inputs import kept_positions
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

BINS = 201
SILENT = 200.0  # decibel; no noise at all


#: What a line or a bar of the figures shows, in words.
WORDS = {
    "weight_sqnr": "the weights",
    "activation_sqnr": "the inputs, as they reach the layer",
    "activation_rounding_sqnr": "the inputs, their own rounding alone",
    "output_sqnr": "the outputs: made here",
    "inherited_sqnr": "the outputs: inherited",
    "total_sqnr": "the outputs: together",
    "predicted_change": "predicted",
    "measured_change": "measured",
    "weight_kurtosis": "the weights",
    "input_kurtosis": "the inputs",
    "outlier_features": "outlier inputs",
    "not_nearest": "away from the nearest value",
}
VIEWS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # view -> title, unit, columns
    "noise": (
        "Signal to quantization noise",
        "dB",
        (
            "weight_sqnr",
            "activation_sqnr",
            "activation_rounding_sqnr",
            "output_sqnr",
            "inherited_sqnr",
            "total_sqnr",
        ),
    ),
    "loss": (
        "Loss change of each layer alone",
        "loss change (nats)",
        ("predicted_change", "measured_change"),
    ),
    "kurtosis": ("Heavy tails", "kurtosis (3 is Gaussian)", ("weight_kurtosis", "input_kurtosis")),
    "outliers": (
        "Inputs whose largest value is over 6 times the median input's",
        "input features",
        ("outlier_features",),
    ),
    "away from nearest": (
        "Weights that were not rounded to their nearest value",
        "share of weights",
        ("not_nearest",),
    ),
}


class ErrorAnatomyResult(Result):
    """Noise of weights, inputs and outputs by layer, the inherited part,
    and the weights' histograms with the grid on them.
    """

    def figure(self, view: str = "noise", layer: str = "", **more: Any) -> go.Figure:
        """view : one of VIEWS, or "weights and grid" of one `layer` (default: the first)."""
        from workbench.figures import by_layer

        table = self.table
        names = table["layer"].to_list()
        if view == "weights and grid":
            return self._weights(layer or str(names[0]))
        title, unit, columns = VIEWS[view]
        shown = {WORDS[c]: table[c].to_numpy(dtype=float) for c in columns if c in table}
        if view == "noise":  # where there is no noise at all there is nothing to draw
            shown = {word: np.where(values < SILENT, values, np.nan) for word, values in shown.items()}
        if view == "outliers" and not any(values.any() for values in shown.values()):
            title += ": none"
        if view == "loss" and "predicted_change" in self.facts:
            facts = self.facts
            title += (
                f"; all together: predicted {facts['predicted_change']:.3g}, "
                f"measured {facts['measured_change']:.3g} nats"
            )
        return by_layer(title, names, shown, unit, log=True if view == "kurtosis" else None)

    def _weights(self, layer: str) -> go.Figure:
        from workbench.quantization.studies.matrix_histogram import histogram_figure

        index = int(np.flatnonzero(self.table["layer"].to_numpy() == layer)[0])
        grid = self.arrays["grid"][np.isfinite(self.arrays["grid"])]
        return histogram_figure(
            self.arrays["centres"],
            self.arrays["histograms"][index],
            grid,
            f"Weights of {layer} in steps of their grid",
        )

    def view_model(self) -> type[BaseModel] | None:
        views = tuple(
            view for view, (_, _, columns) in VIEWS.items() if any(c in self.table for c in columns)
        )
        return choices(
            "ErrorAnatomyView",
            view=(*views, "weights and grid"),
            layer=tuple(str(n) for n in self.table["layer"]),
        )


class ErrorAnatomy(Quantize):
    """Where quantization error is made: by layer the noise of weights and outputs,
    the part inherited from earlier layers, tails, and the loss.
    """

    changes_model: ClassVar[bool] = False
    summary_line: ClassVar[str] = ""

    calibration_examples: int = parameter(64, "calibration examples", ge=1, unit="examples", group="Data")
    predict_examples: int = parameter(
        16, "calibration examples of the loss changes (0: none)", ge=0, unit="examples", group="Data"
    )
    test_examples: int = parameter(
        0,
        "test examples of the whole quantized model at most (0: no test)",
        ge=0,
        unit="examples",
        group="Data",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return ErrorAnatomyResult

    def quantizer(self) -> Quantize:
        return Quantize(**(self.model_dump() | {"predict_examples": 0}))

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        ranges = input_ranges(on, layers, examples=self.calibration_examples, progress=progress)
        quantized = self.quantizer()._run(on.copy(), progress)
        twin = quantized.subject
        assert twin is not None
        after = {layer.name: layer for layer in twin.layers(self.layers)}
        noise = output_noise(on, twin, layers, min(self.calibration_examples, 32), progress)
        rows, histograms = [], []
        element = self.format_for(layers[0].name).element
        reach = 1.25 * max(-element.lowest, element.highest)
        for layer in progress.track(layers, "weights"):
            weight, rounded = layer.weight.detach().float(), after[layer.name].weight.detach().float()
            grid = quantizer_of(after[layer.name]).grid
            histograms.append(torch.histc(in_units(weight, grid), BINS, -reach, reach) / weight.numel())
            found = noise[layer.name]
            own = (
                {"activation_rounding_sqnr": decibel(found.inputs, found.rounding)}
                if self.activations != "none"
                else {}
            )
            rows.append(
                {
                    "layer": layer.name,
                    "weights": weight.numel(),
                    "weight_sqnr": decibel(weight.square().sum(), (rounded - weight).square().sum()),
                    "activation_sqnr": decibel(found.inputs, found.arriving),
                    **own,
                    "output_sqnr": decibel(found.outputs, found.made),
                    "inherited_sqnr": decibel(found.outputs, found.inherited),
                    "total_sqnr": decibel(found.outputs, found.total),
                    "not_nearest": away_from_nearest(weight, rounded, grid, mask_of(layer)),
                    "weight_kurtosis": kurtosis(weight),
                    "input_kurtosis": float(ranges[layer.name].kurtosis.mean()),
                    "outlier_features": int(ranges[layer.name].outliers().sum()),
                }
            )
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {
            "worst_layer": str(table.set_index("layer")["total_sqnr"].idxmin()),
            "lowest_sqnr": float(table["total_sqnr"].min()),
        }
        if self.predict_examples:
            facts |= self._changes(on, twin, layers[: len(rows)], after, table, progress)
        facts |= {
            k: v
            for k, v in quantized.facts.items()
            if self.test_examples and k in ("loss", "dense_loss", "accuracy", "perplexity")
        }
        half = reach / BINS  # centres of the histogram's bins
        arrays = {
            "histograms": torch.stack(histograms).cpu().numpy(),
            "centres": np.linspace(-reach + half, reach - half, BINS),
            "grid": element.values().numpy() if element.bits <= 8 else np.zeros(0),
        }
        return self.result(table, facts, arrays=arrays)

    def _changes(
        self,
        on: Subject,
        twin: Subject,
        layers: Sequence[Layer],
        after: dict[str, Layer],
        table: pd.DataFrame,
        progress: Progress,
    ) -> dict[str, Any]:
        """Predicted and measured, each layer's weights alone and all together, on the same batches.
        Rounded inputs are in what is measured together.
        """
        deltas = {layer.name: after[layer.name].weight.detach() - layer.weight.detach() for layer in layers}
        single = alone(
            on, layers, {k: [v] for k, v in deltas.items()}, examples=self.predict_examples, progress=progress
        )
        before = mean_loss(on, "calibration", self.predict_examples, 8)
        table["predicted_change"] = [sum(single[layer.name][0]) for layer in layers]
        table["measured_change"] = [
            measured_alone(on, layer, [deltas[layer.name]], before, "calibration", self.predict_examples)[0]
            for layer in layers
        ]
        together = predicted_change(on, deltas, examples=self.predict_examples, progress=progress)
        return {
            "sum_of_predicted": float(table["predicted_change"].sum()),
            "sum_of_measured": float(table["measured_change"].sum()),
            "predicted_change": float(together.total),
            "measured_change": mean_loss(twin, "calibration", self.predict_examples, 8) - before,
        }


def in_units(weight: Tensor, grid: Grid) -> Tensor:
    """The weight in units of its scale (zero point added), in the grid's coordinates."""
    scale, zero = grid.columns(weight.shape[-1])
    moved = weight if grid.transform is None else grid.transform.weight(weight)
    return (moved / scale) if zero is None else moved / scale + zero


def away_from_nearest(weight: Tensor, rounded: Tensor, grid: Grid, mask: Tensor | None) -> float:
    """Share of the kept weights that are not at their nearest value."""
    far = (grid.round(weight) - rounded).abs() > 1e-6 * weight.abs().amax().clamp_min(1e-12)
    return float(far.float().mean() if mask is None else far[mask].float().mean())


@dataclass
class Noise:
    """Energies at one layer, summed over calibration tokens.
    `outputs` and what follows: x W^T of the dense input x and weight W.
    """

    inputs: float = 0.0
    # what the quantized model multiplies with instead of the dense input, rounded where inputs are rounded
    arriving: float = 0.0
    rounding: float = 0.0  # the layer's own rounding of the dense input alone
    outputs: float = 0.0
    made: float = 0.0  # dense input, quantized weight
    inherited: float = 0.0  # the quantized model's input, dense weight
    total: float = 0.0

    def add(self, x: Tensor, y: Tensor, rounded: Tensor, weight: Tensor, quantized: Tensor) -> None:
        exact = x @ weight.T
        parts = {
            "inputs": x,
            "arriving": y - x,
            "rounding": rounded - x,
            "outputs": exact,
            "made": x @ quantized.T - exact,
            "inherited": y @ weight.T - exact,
            "total": y @ quantized.T - exact,
        }
        for name, part in parts.items():
            setattr(self, name, getattr(self, name) + float(part.square().sum()))


@torch.no_grad()
def output_noise(
    dense: Subject,
    quantized: Subject,
    layers: Sequence[Layer],
    examples: int,
    progress: Progress,
    batch_size: int = 8,
) -> dict[str, Noise]:
    """name -> the noise at a layer's inputs and outputs.

    A stack of experts is compared on tokens routed to it in both models, and left out (zeros)
    when the numbers differ.
    """
    twins = {layer.name: layer for layer in quantized.layers("*")}
    names = [layer.name for layer in layers]
    if missing := [name for name in names if name not in twins]:
        raise BadInput(f"layers: the quantized subject has no layer {missing[0]}")
    found = {name: Noise() for name in names}
    weights = {
        layer.name: (layer.weight.detach().float(), twins[layer.name].weight.detach().float())
        for layer in layers
    }
    roundings = {
        name: next((c.round for c in twins[name].changes if type(c) is ActivationQuant), None)
        for name in names
    }
    for batch in progress.track(
        dense.batches("calibration", batch_size, examples),
        "errors at the outputs",
        -(-examples // batch_size),
    ):
        with collecting(dense, layers) as (capture, first):
            capture.keep = kept_positions(dense, batch)
            dense.task.output(dense.model, batch)
        with collecting(quantized, [twins[name] for name in names]) as (capture, second):
            capture.keep = kept_positions(quantized, batch)
            quantized.task.output(quantized.model, batch)
        for (name, expert), rows in first.items():
            x, other = torch.cat(rows).float(), second.get((name, expert))
            y = None if other is None else torch.cat(other).float()
            if y is None or y.shape != x.shape:
                continue
            round_inputs = roundings[name]
            w, q = (t if t.ndim == 2 else t[expert] for t in weights[name])
            found[name].add(x, y, x if round_inputs is None else round_inputs(x), w, q)
    return found
