"""Rotate: fold a rotation of the residual stream into a model's weights,
and show what it does to what its layers read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from pydantic import BaseModel

from workbench.axis import Choice, parameter
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.activations.activations import InputRanges, input_ranges
from workbench.quantization.rotation.fold import change_of_outputs, stream_of
from workbench.quantization.rotation.rotations import ROTATION
from workbench.results import Result, choices
from workbench.subjects import Layer, Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


class RotateResult(Result):
    """Tails of each layer's inputs and what rounding noise does to its outputs, with and without the
    rotation; the rotated model is `.subject`.
    """

    def figure(self, column: str = "kurtosis", **more: Any) -> go.Figure:
        from workbench.figures import by_layer

        words = {
            "kurtosis": "kurtosis of the inputs (3 is Gaussian)",
            "spread": "largest over root mean square input",
            "noise_gain": "noise gain (outputs' relative error over the weights')",
        }[column]
        kind = self.instrument.kind  # type: ignore[attr-defined]
        title = f"What each layer reads, before and after the {kind} rotation"
        both = {"as trained": self.table[column], "rotated": self.table[f"{column}_rotated"]}
        return by_layer(title, self.table["layer"].to_list(), both, words, log=True)

    def view_model(self) -> type[BaseModel] | None:
        return choices("RotateView", column=("kurtosis", "spread", "noise_gain"))


class Rotate(SubjectInstrument):
    """Fold a rotation of the residual stream into a pre-norm causal model, drawn, learned (SpinQuant)
    or principal (ResQ); its function stays.

    Round with `gptq` afterwards, as QuaRot's and SpinQuant's commands do: folding the norms' scales raises
    the noise gain of the layers that read them, and at 4 bits nearest rounding then loses more than before.
    """

    changes_model: ClassVar[bool] = True

    kind: Choice = ROTATION.choice("hadamard")
    calibration_examples: int = parameter(64, "calibration examples", ge=1, unit="examples")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"rate": "kind.learning_rate", "examples": "calibration_examples"}

    @classmethod
    def result_class(cls) -> type[Result]:
        return RotateResult

    def check(self, on: Subject) -> None:
        stream_of(on.model)
        on.split("calibration")

    def _run(self, on: Subject, progress: Progress) -> Result:
        made, losses = self.kind(on, self.calibration_examples, self.seed, progress)
        found = []
        for subject in (on, made):
            layers = subject.layers("blocks")
            noise = NoiseGains(layers)
            ranges = input_ranges(
                subject,
                layers,
                examples=self.calibration_examples,
                progress=progress,
                also=noise.add,
            )
            found.append({name: tails(ranges[name]) | {"noise_gain": noise.of(name)} for name in ranges})
        before, after = found
        rows = [
            {"layer": name} | before[name] | {f"{key}_rotated": v for key, v in after[name].items()}
            for name in before
        ]
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {
            "largest_change_of_logits": change_of_outputs(on, made)[0],
            "kurtosis": float(table["kurtosis"].median()),
            "kurtosis_rotated": float(table["kurtosis_rotated"].median()),
            "noise_gain": float(table["noise_gain"].median()),
            "noise_gain_rotated": float(table["noise_gain_rotated"].median()),
        }
        tables = {"learning": pd.DataFrame({"step": range(len(losses)), "loss": losses})} if losses else {}
        return self.result(table, facts, tables=tables, subject=made)


def tails(ranges: InputRanges) -> dict[str, float]:
    """Kurtosis, and largest over root mean square magnitude, over all entries of a layer's inputs."""
    mean_square = float(
        (ranges.second.sum(-1) / (ranges.tokens * ranges.second.shape[-1]).clamp_min(1)).mean()
    )
    return {
        "kurtosis": float(ranges.kurtosis.mean()),
        "spread": float(ranges.largest.max()) / max(mean_square, 1e-30) ** 0.5,
    }


class NoiseGains:
    """(tr G / n) |W|^2 / tr(W G W^T) of layers: the relative squared error that white noise on the weights
    makes in what a layer puts out, over the noise's relative energy.

    G (n, n) is the second moment of the inputs. A rotation leaves it as it is, but the folding of a norm's
    scale that comes first does not: where it grows, nearest rounding loses by the rotation whatever the
    kurtosis says.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.inputs, self.outputs = (dict.fromkeys(self.layers, 0.0) for _ in range(2))

    def add(self, layer: Layer, expert: int, rows: torch.Tensor) -> None:
        """Inputs (tokens, n) of a layer, in float32."""
        self.inputs[layer.name] += float(rows.square().sum())
        self.outputs[layer.name] += float((rows @ layer.weight.detach().float().mT).square().sum())

    def of(self, name: str) -> float:
        weight = self.layers[name].weight.detach().float()
        energy = self.inputs[name] / weight.shape[-1] * float(weight.square().sum())
        return energy / max(self.outputs[name], 1e-30)
