"""What each layer costs when it alone is put on a number format: predicted by curvature and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor

from workbench.axis import Choice, parameter
from workbench.curvature.estimators.gauss_newton import with_targets
from workbench.curvature.estimators.quadratic import mean_loss, predicted_change
from workbench.curvature.operators.curvature_operator import curvature_operator
from workbench.curvature.operators.weights import differentiable, place_of, with_weights
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.quantize import Quantize
from workbench.quantization.quantized_layer import layer_row, moments_for
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.rounding_order import Rounded, Source, round_layers
from workbench.results import Result, choices
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

Change = tuple[str, int]  # (layer, number of its candidate)


def alone(
    subject: Subject,
    layers: Sequence[Layer],
    deltas: Mapping[str, Sequence[Tensor]],
    split: str = "calibration",
    examples: int = 16,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """(g.d, 1/2 d.H d) of the mean loss for each layer's candidate changes d taken alone,
    without the interactions between layers.

    One graph of the gradient serves every layer and candidate of a batch.
    """
    progress = progress or Progress()
    places = [place_of(layer) for layer in layers]
    sums = {layer.name: np.zeros((len(deltas[layer.name]), 2)) for layer in layers}
    items = 0
    count = -(-min(examples, subject.size(split)) // batch_size) * len(layers)
    done = 0
    with differentiable(subject.model, places) as weights, torch.enable_grad():
        for batch, weight in with_targets(subject, split, batch_size, examples):
            loss = subject.loss(batch)
            gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            for layer, value, gradient in zip(layers, weights, gradients, strict=True):
                progress.show("sensitivity of each layer", done := done + 1, count)
                if gradient is None:
                    continue
                for row, delta in enumerate(deltas[layer.name]):
                    change = (delta.mT if layer.transposed else delta).to(value.dtype)
                    slope = (gradient * change).sum()
                    (product,) = (
                        torch.autograd.grad(slope, (value,), retain_graph=True, allow_unused=True)
                        if slope.requires_grad
                        else (None,)
                    )
                    second = 0.0 if product is None else 0.5 * float((product * change).sum())
                    sums[layer.name][row] += weight * np.array([float(slope.detach()), second])
            items += weight
            del loss, gradients
            if progress.stopped:
                break
    return {name: [(float(a), float(b)) for a, b in found / items] for name, found in sums.items()}


def measured_alone(
    subject: Subject,
    layer: Layer,
    deltas: Sequence[Tensor],
    before: float,
    split: str,
    examples: int,
    batch_size: int = 8,
) -> list[float]:
    """The loss change each candidate change of one layer makes, on the batches of `alone`."""
    found = []
    for delta in deltas:
        value = getattr(layer.module, layer.tensor).detach() + (delta.mT if layer.transposed else delta)
        with with_weights(subject.model, [place_of(layer)], [value]):
            found.append(mean_loss(subject, split, examples, batch_size) - before)
    return found


def traces(
    subject: Subject,
    layers: Sequence[Layer],
    probes: int,
    examples: int,
    generator: torch.Generator,
    split: str = "calibration",
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """(trace, standard error) of each layer's Hessian block by Hutchinson's estimator with Rademacher probes
    drawn for all layers at once.

    z_l.(Hz)_l is unbiased for Tr(H_ll): the other layers' probes are independent of z_l.
    One Hessian-vector product a probe.
    """
    draws: dict[str, list[float]] = {layer.name: [] for layer in layers}
    for _ in range(probes):
        signs = {
            layer.name: (torch.randint(0, 2, layer.shape, generator=generator) * 2.0 - 1.0).to(
                layer.original.device
            )
            for layer in layers
        }
        found = predicted_change(subject, signs, split=split, examples=examples, progress=progress)
        for name, (_, second) in found.by_layer.items():
            draws[name].append(2 * second)
        if progress is not None and progress.stopped:
            break
    return {
        n: (float(np.mean(v)), float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else float("nan"))
        for n, v in draws.items()
    }


def top_eigenvalues(
    subject: Subject,
    layers: Sequence[Layer],
    parts: int,
    examples: int,
    generator: torch.Generator,
    iterations: int = 10,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) over `parts` disjoint shares of the calibration examples of the eigenvalue
    of largest magnitude of each layer's Hessian block, by power iteration on all blocks side by side
    (Dong et al. 2019, HAWQ; Shen et al. 2020, Q-BERT, section 3.1).

    A Rayleigh quotient's magnitude never exceeds the eigenvalue's:
    with few iterations the estimate is low, not high.
    """
    examples = min(examples, subject.size("calibration"))
    parts = min(parts, examples)
    share = examples // parts
    names = [layer.name for layer in layers]
    found = np.zeros((parts, len(layers)))
    for part in range(parts):
        some = subject.with_split(
            "calibration",
            {k: v[part * share : (part + 1) * share] for k, v in subject.split("calibration").items()},
        )
        with curvature_operator(
            some, "hessian", ",".join(names), examples=share, progress=progress
        ) as hessian:
            vector = torch.randn(hessian.size, generator=generator).to(hessian.device)
            for _ in range(iterations):
                for piece in hessian.slices:
                    vector[piece] /= vector[piece].norm().clamp_min(1e-30)
                image = hessian.block_matmat(vector[None])[0]
                found[part] = [float(vector[piece] @ image[piece]) for piece in hessian.slices]
                vector = image
    spread = found.std(0, ddof=1) if parts > 1 else np.full(len(layers), np.nan)
    return {name: (float(m), float(s)) for name, m, s in zip(names, found.mean(0), spread, strict=True)}


class LayerSensitivityResult(Result):
    """Predicted beside measured loss change, one point a layer."""

    def figure(self, view: str = "predicted beside measured", **more: Any) -> go.Figure:
        from workbench.figures import by_layer
        from workbench.studies import predicted_beside_measured

        table = self.table.assign(series=[f"{b:g} bits" for b in self.table["width"]])
        if view == "predicted beside measured" and "measured_change" in table:
            return predicted_beside_measured(table, "Loss change of each layer quantized alone")
        wide = table.pivot(index="layer", columns="series", values="predicted_second")
        names = list(dict.fromkeys(table["layer"]))
        found = {str(width): wide[width].loc[names] for width in dict.fromkeys(table["series"])}
        return by_layer("Predicted cost of rounding each layer", names, found, "loss change (nats)", log=True)

    def view_model(self) -> type[BaseModel] | None:
        return choices("LayerSensitivityView", view=("predicted beside measured", "by layer"))


class LayerSensitivity(SubjectInstrument):
    """Quantize each layer alone: predicted (gradient and curvature) beside measured loss change,
    for one or more widths.
    """

    layers: str = parameter("blocks", "layers, comma-separated globs")
    format: Choice = NUMBER_FORMAT.choice("int4")
    widths: list[int] = parameter(
        [4], "widths to try (integer format; any other format ignores them)", min_length=1, unit="bits"
    )
    granularity: Literal["auto", "tensor", "channel", "group"] = parameter("auto", "what shares a scale")
    group_size: int = parameter(
        64, "weights of a group", ge=1, le=4096, scale="log", unit="weights", group="Rounding"
    )
    range: Literal["auto", "minmax", "mse", "mean"] = parameter(
        "auto", "how scales are found", group="Rounding"
    )
    rounding: Choice = ROUNDING.choice("nearest", group="Rounding")
    calibration_examples: int = parameter(
        64, "calibration examples of the inputs' second moments", ge=1, unit="examples", group="Data"
    )
    predict_examples: int = parameter(
        32, "calibration examples of prediction and measurement", ge=1, unit="examples", group="Data"
    )
    measure: bool = parameter(True, "measure each layer's loss change as well")

    @classmethod
    def result_class(cls) -> type[Result]:
        return LayerSensitivityResult

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"symmetric": "format.symmetric", "examples": "calibration_examples"}

    def quantizer(self, width: int) -> Quantize:
        integer = self.format.name == "int"
        return Quantize(
            layers=self.layers,
            format=self.format.with_options(bits=width) if integer else self.format,
            granularity=self.granularity,
            group_size=self.group_size,
            range=self.range,
            rounding=self.rounding,
            sequential=False,
            calibration_examples=self.calibration_examples,
            seed=self.seed,
        )

    def check(self, on: Subject) -> None:
        for width in self.widths:
            if self.format.name == "int" and not 2 <= width <= 8:
                raise BadInput(f"widths: {width} bits are not accepted; give widths from 2 to 8")
            self.quantizer(width).check(on)
        check_alone(self.rounding)

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        rows, deltas = candidates(
            on, layers, [self.quantizer(w) for w in self.widths], self.calibration_examples, progress
        )
        predicted = alone(on, layers, deltas, examples=self.predict_examples, progress=progress)
        before = mean_loss(on, "calibration", self.predict_examples, 8)
        table = pd.DataFrame([row for layer in layers for row in rows[layer.name]])
        table["predicted_first"] = [first for layer in layers for first, _ in predicted[layer.name]]
        table["predicted_second"] = [second for layer in layers for _, second in predicted[layer.name]]
        table["predicted_change"] = table["predicted_first"] + table["predicted_second"]
        facts: dict[str, Any] = {"layers": len(layers), "loss": before}
        if self.measure:
            measured: list[float] = []
            for layer in progress.track(layers, "measuring each layer"):
                measured += measured_alone(
                    on, layer, deltas[layer.name], before, "calibration", self.predict_examples
                )
            table = table.iloc[: len(measured)].copy()
            table["measured_change"] = measured
            facts |= self._agreement(table)
        return self.result(table, facts)

    def _agreement(self, table: pd.DataFrame) -> dict[str, Any]:
        """Spearman's rank correlation of predicted and measured, the worst over the widths,
        with a bootstrap interval over layers.
        """
        from workbench.studies import rank_correlation

        def agreement(pairs: np.ndarray) -> float:
            return rank_correlation(pairs[:, 0].tolist(), pairs[:, 1].tolist())

        found = {}
        for width, part in table.groupby("width"):
            pairs = part[["predicted_change", "measured_change"]].to_numpy()
            random = np.random.default_rng(self.seed)
            draws = [pairs[random.integers(0, len(pairs), len(pairs))] for _ in range(400)]
            spread = (
                np.nanquantile([agreement(d) for d in draws], [0.025, 0.975])
                if len(pairs) > 4
                else [np.nan, np.nan]
            )
            found[width] = (agreement(pairs), *spread)
        worst = min(found.values())
        return {
            "rank_correlation": float(worst[0]),
            "rank_correlation_low": float(worst[1]),
            "rank_correlation_high": float(worst[2]),
        }


def candidates(
    on: Subject, layers: Sequence[Layer], quantizers: Sequence[Quantize], examples: int, progress: Progress
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[Tensor]]]:
    """For each layer, the rows (errors, bytes) and weight changes of each quantizer."""
    moments = moments_for(on, layers, examples, progress)
    rows: dict[str, list[dict[str, Any]]] = {}
    deltas: dict[str, list[Tensor]] = {}
    factors = Factors()

    def roundings(quantizer: Quantize) -> Iterator[Rounded]:
        sources = {
            layer.name: Source(moments[layer.name], torch.Generator().manual_seed(quantizer.seed), factors)
            for layer in layers
        }
        return round_layers(quantizer, layers, sources)

    for layer, *found in zip(layers, *map(roundings, quantizers), strict=True):
        weight = layer.weight.detach()
        rows[layer.name], deltas[layer.name] = [], []
        for values, grid, _ in found:
            delta = values - weight.float()
            width = grid.format.element.bits
            rows[layer.name].append(
                layer_row(layer, weight.float(), delta, grid, moments[layer.name]) | {"width": width}
            )
            deltas[layer.name].append(delta.to(weight.dtype))
    return rows, deltas


def check_alone(rounding: Choice) -> None:
    """`BadInput` for a rounding that does not take layers one by one."""
    if rounding.has("learned") and rounding.options.objective.has("by blocks"):
        raise BadInput("rounding.objective: 'block' learns layers together; each is taken alone, use layer")
