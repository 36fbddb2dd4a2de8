"""Error anatomy: where a quantized model's error is made, what is inherited, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor

from workbench.curvature.quadratic import mean_loss, predicted_change
from workbench.instruments import BadInput, Progress, Result, SubjectInstrument, parameter
from workbench.quantization.activations import input_ranges
from workbench.quantization.grid import Grid
from workbench.quantization.packing import quantizer_of
from workbench.quantization.prefix import collecting
from workbench.quantization.quantize import Quantize, choices, mask_of
from workbench.quantization.sensitivity import alone, measured_alone
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

BINS = 201


class ErrorAnatomyResult(Result):
    """Noise of weights and outputs by layer, the inherited part, and the weights' histograms with the grid on them."""

    def figure(self, view: str = "noise", layer: str = "", **more: Any) -> go.Figure:
        from workbench.figures import figure, line, points

        table = self.table
        names = table["layer"].to_numpy()
        if view == "weights and grid":
            assert self.arrays is not None
            chosen = layer or str(names[0])
            index = int(np.flatnonzero(names == chosen)[0])
            fig = figure(f"Weights of {chosen} in steps of their grid", "weight / scale", "share of weights")
            line(fig, self.arrays["centres"], self.arrays["histograms"][index], "weights", mode="lines")
            grid = self.arrays["grid"][np.isfinite(self.arrays["grid"])]
            points(fig, grid, np.zeros(len(grid)), "values of the format")
            return fig
        if view == "loss":
            fig = figure("Loss change of each layer alone", "layer", "loss change (nats)")
            for column in ("predicted_change", "measured_change"):
                if column in table:
                    line(fig, names, table[column].to_numpy(), column.replace("_", " "), mode="lines+markers")
            return fig
        if view == "outliers":
            fig = figure("Heavy tails", "layer", "kurtosis (3 is Gaussian)", yaxis_type="log")
            for column in ("weight_kurtosis", "input_kurtosis"):
                line(fig, names, table[column].to_numpy(), column.replace("_", " "), mode="lines+markers")
            return fig
        fig = figure("Signal to quantization noise", "layer", "dB")
        for column in ("weight_sqnr", "output_sqnr", "inherited_sqnr", "total_sqnr"):
            line(fig, names, table[column].to_numpy(), column.replace("_", " "), mode="lines+markers")
        return fig

    def view_model(self) -> type[BaseModel] | None:
        return choices("ErrorAnatomyView", view=("noise", "weights and grid", "loss", "outliers"), layer=tuple(str(n) for n in self.table["layer"]))


class ErrorAnatomy(SubjectInstrument):
    """Where quantization error is made: by layer the noise of weights and outputs, the part inherited from earlier layers, tails, and the loss."""

    layers: str = parameter("blocks", "layers, comma-separated globs")
    format: str = parameter("int", "number format, as in quantize")
    bits: int = parameter(4, "width of the integer format", ge=2, le=8, unit="bits")
    symmetric: bool = parameter(True, "integers symmetric about zero")
    granularity: Literal["auto", "tensor", "channel", "group"] = parameter("auto", "what shares a scale")
    group_size: int = parameter(64, "weights of a group", ge=1, le=4096, scale="log", unit="weights")
    range: Literal["auto", "minmax", "mse", "mean"] = parameter("auto", "how scales are found")
    rounding: Literal["nearest", "stochastic", "gptq", "adaround", "flexround", "signround", "adaquant", "hqq"] = parameter("nearest", "as in quantize")
    transform: Literal["none", "smooth", "awq", "teq", "hadamard"] = parameter("none", "equivalent transform of the inputs")
    examples: int = parameter(64, "calibration examples", ge=1, unit="examples")
    predict_examples: int = parameter(16, "calibration examples of the loss changes (0: none)", ge=0, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return ErrorAnatomyResult

    def quantizer(self) -> Quantize:
        shared = {k: getattr(self, k) for k in type(self).model_fields if k in Quantize.model_fields}
        return Quantize(**(shared | {"test_examples": 0}))

    def check(self, on: Subject) -> None:
        self.quantizer().check(on)

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        ranges = input_ranges(on, layers, examples=self.examples, progress=progress)
        quantized = self.quantizer().with_fields(predict_examples=0)._run(on.copy(), progress)
        twin = quantized.subject
        assert twin is not None
        after = {layer.name: layer for layer in twin.layers(self.layers)}
        noise = output_noise(on, twin, layers, min(self.examples, 32), progress)
        rows, histograms = [], []
        element = self.quantizer().format_for(layers[0].name).element
        reach = 1.25 * max(-element.lowest, element.highest)
        for layer in progress.track(layers, "weights"):
            weight, rounded = layer.weight.detach().float(), after[layer.name].weight.detach().float()
            grid = quantizer_of(after[layer.name]).grid
            histograms.append(torch.histc(in_units(weight, grid), BINS, -reach, reach) / weight.numel())
            made, inherited, total, signal = noise[layer.name]
            rows.append({"layer": layer.name, "weights": weight.numel(), "weight_sqnr": decibel(weight.square().sum(), (rounded - weight).square().sum()),
                         "output_sqnr": decibel(signal, made), "inherited_sqnr": decibel(signal, inherited), "total_sqnr": decibel(signal, total),
                         "not_nearest": away_from_nearest(weight, rounded, grid, mask_of(layer)), "weight_kurtosis": kurtosis(weight),
                         "input_kurtosis": float(ranges[layer.name].kurtosis.mean()),
                         "outlier_features": int(ranges[layer.name].outliers().sum())})  # fmt: skip
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {"worst_layer": str(table.loc[table["total_sqnr"].idxmin(), "layer"]), "lowest_sqnr": float(table["total_sqnr"].min())}
        if self.predict_examples:
            facts |= self._losses(on, layers[: len(rows)], after, table, progress)
        half = reach / BINS  # centres of the histogram's bins
        arrays = {"histograms": torch.stack(histograms).cpu().numpy(), "centres": np.linspace(-reach + half, reach - half, BINS),
                  "grid": element.values().numpy() if element.bits <= 8 else np.zeros(0)}  # fmt: skip
        return self.result(table, facts, arrays=arrays)

    def _losses(self, on: Subject, layers: Sequence[Layer], after: dict[str, Layer], table: pd.DataFrame, progress: Progress) -> dict[str, Any]:
        """Predicted and measured, each layer alone and all together, on the same batches."""
        deltas = {layer.name: after[layer.name].weight.detach() - layer.weight.detach() for layer in layers}
        single = alone(on, layers, {k: [v] for k, v in deltas.items()}, examples=self.predict_examples, progress=progress)
        before = mean_loss(on, "calibration", self.predict_examples, 8)
        table["predicted_change"] = [sum(single[layer.name][0]) for layer in layers]
        table["measured_change"] = [measured_alone(on, layer, [deltas[layer.name]], before, "calibration", self.predict_examples)[0] for layer in layers]
        together = predicted_change(on, deltas, examples=self.predict_examples, progress=progress)
        twin = on.copy()
        for layer in twin.layers(self.layers):
            layer.write(layer.weight.detach() + deltas[layer.name])
        return {"sum_of_predicted": float(table["predicted_change"].sum()), "sum_of_measured": float(table["measured_change"].sum()),
                "predicted_change": float(together.total), "measured_change": mean_loss(twin, "calibration", self.predict_examples, 8) - before}  # fmt: skip


def decibel(signal: Tensor | float, noise: Tensor | float) -> float:
    """10 log10(signal / noise), at most 200 (no noise at all)."""
    return 10 * math.log10(max(float(signal), 1e-30) / max(float(noise), 1e-20 * max(float(signal), 1e-10)))


def kurtosis(values: Tensor) -> float:
    """E x^4 / (E x^2)^2."""
    square = values.double().square()
    return float(square.square().mean() / square.mean().square().clamp_min(1e-60))


def in_units(weight: Tensor, grid: Grid) -> Tensor:
    """The weight in units of its scale (zero point added), in the grid's coordinates."""
    scale, zero = grid.columns(weight.shape[-1])
    moved = weight if grid.transform is None else grid.transform.weight(weight)
    return (moved / scale) if zero is None else moved / scale + zero


def away_from_nearest(weight: Tensor, rounded: Tensor, grid: Grid, mask: Tensor | None) -> float:
    """Share of the kept weights that are not at their nearest value."""
    far = (grid.round(weight) - rounded).abs() > 1e-6 * weight.abs().amax().clamp_min(1e-12)
    return float(far.float().mean() if mask is None else far[mask].float().mean())


@torch.no_grad()
def output_noise(dense: Subject, quantized: Subject, layers: Sequence[Layer], examples: int, progress: Progress, batch_size: int = 8) -> dict[
        str, tuple[float, float, float, float]]:  # fmt: skip
    """name -> energies of (made here, inherited, both together, signal) at the layer's output x W^T.

    made: the dense input through the quantized weight; inherited: the quantized prefix's input through the dense weight.
    A stack of experts is compared on tokens routed to it in both models, and left out (zeros) when the numbers differ.
    """
    twins = {layer.name: layer for layer in quantized.layers("*")}
    names = [layer.name for layer in layers]
    if missing := [name for name in names if name not in twins]:
        raise BadInput(f"layers: the quantized subject has no layer {missing[0]}")
    sums = {name: np.zeros(4) for name in names}
    weights = {layer.name: (layer.weight.detach().float(), twins[layer.name].weight.detach().float()) for layer in layers}
    for batch in progress.track(dense.batches("calibration", batch_size, examples), "errors at the outputs", -(-examples // batch_size)):
        with collecting(dense, layers) as (_, first):
            dense.task.output(dense.model, batch)
        with collecting(quantized, [twins[name] for name in names]) as (_, second):
            quantized.task.output(quantized.model, batch)
        for (name, expert), rows in first.items():
            x, other = torch.cat(rows).float(), second.get((name, expert))
            y = None if other is None else torch.cat(other).float()
            if y is None or y.shape != x.shape:
                continue
            w, q = (t if t.ndim == 2 else t[expert] for t in weights[name])
            exact = x @ w.T
            parts = (x @ q.T - exact, y @ w.T - exact, y @ q.T - exact, exact)
            sums[name] += np.array([float(p.square().sum()) for p in parts])
    return {name: tuple(found) for name, found in sums.items()}  # type: ignore[misc]
