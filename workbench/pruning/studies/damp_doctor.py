"""The damp doctor: what a layer's calibration second moment looks like,
and which damp the second-order methods need.

SparseGPT, GPTQ and ZipLM factorise H = X X^T + damp x mean diagonal. Too little calibration data or dead
inputs make H singular ("not positive definite"); too much damp throws its information away.
This shows where a model stands.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor

from workbench.axis import entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.calibration import Calibration
from workbench.pruning.solvers import obs
from workbench.results import Result
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

SMALLEST, LARGEST = 1e-10, 10.0


class DampDoctor(SubjectInstrument):
    """Spectrum and condition of every layer's input second moment, dead inputs,
    the smallest damp that factorises, and what damp costs.
    """

    summary_line: ClassVar[str] = (
        "which damp the second-order methods need, layer by layer, and what it does to the loss"
    )

    layers: str = parameter("blocks", "which layers: blocks or globs")
    calibration_examples: int = parameter(
        128, "examples for the layers' input statistics", ge=1, unit="examples", group="Data"
    )
    damps: int = parameter(
        5, "damps to try for the loss, from the smallest that works everywhere to 1 (0: spectra only)", ge=0
    )
    sparsity: float = parameter(0.6, "sparsity of the SparseGPT pruning whose loss is compared", gt=0, lt=1)
    calibration_split: str = parameter("calibration", "split for the statistics", group="Data")
    test_split: str = parameter("validation", "split for the losses", group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return DampResult

    def step(self, damp: float) -> Any:
        """The pruning whose loss is compared."""
        from workbench.pruning.prune import Prune

        return Prune(
            method="sparsegpt",
            sparsity=self.sparsity,
            layers=self.layers,
            saliency={"name": "obs", "damp": damp},
            compensation={"name": "obs", "damp": damp},
            sequential=False,
            predict_examples=0,
            seed=self.seed,
            device=self.device,
            calibration_examples=self.calibration_examples,
            calibration_split=self.calibration_split,
            test_split=self.test_split,
        )

    def code(self) -> str:
        """Version of the code that its prunings reach."""
        return code_version(type(self), [entry.value for entry in entries_in(self.step(0.01))])

    def check(self, on: Any) -> None:
        on.layers(self.layers)
        for split in (self.calibration_split, self.test_split):
            on.split(split)

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers = on.layers(self.layers)
        calibration = Calibration(
            on, layers, self.calibration_split, self.calibration_examples, progress=progress
        )
        rows, spectra = [], {}
        for layer in progress.track(layers, "spectra"):
            tokens = calibration.moments(layer).tokens.tolist()
            for expert, gram in enumerate(calibration.gram(layer)):
                name = layer.name if len(layer.shape) == 2 else f"{layer.name}[{expert}]"
                values = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(0)
                spectra[name] = values.float().cpu().numpy()
                rows.append(
                    {
                        "layer": name,
                        "inputs": gram.shape[0],
                        "tokens": int(tokens[expert]),
                        **examine(gram, values),
                    }
                )
        table = pd.DataFrame(rows)
        needed = max((row["smallest_damp"] for row in rows), default=SMALLEST)
        facts: dict[str, Any] = {
            "smallest_damp": needed,
            "dead_inputs": sum(row["dead_inputs"] for row in rows),
            "worst_condition": max((row["condition"] for row in rows), default=1.0),
        }
        tables = {}
        if self.damps and not progress.stopped:
            losses = self._losses(on, needed, progress)
            tables["damps"] = losses
            if len(losses):
                facts["best_damp"] = float(losses.sort_values("loss").damp.iloc[0])
        return self.result(table, facts, tables=tables, arrays=spectra)

    def _losses(self, on: Subject, needed: float, progress: Progress) -> pd.DataFrame:
        """The loss after SparseGPT at each damp."""
        first = max(needed, 1e-5)
        grid = (
            [10.0**e for e in np.linspace(math.log10(first), 0.0, self.damps)] if self.damps > 1 else [first]
        )
        found = []
        for damp in progress.track(grid, "damps"):
            try:
                result = self.step(float(damp)).run(on, Progress(), cache=False)
            except BadInput:  # float32 has less room with the grid's first value than the search found
                continue
            found.append(
                {
                    "damp": float(damp),
                    "loss": result.facts["loss"],
                    "relative_output_error": float(result.table.relative_output_error.mean()),
                }
            )
        return pd.DataFrame(found, columns=["damp", "loss", "relative_output_error"])


def examine(gram: Tensor, values: Tensor) -> dict[str, Any]:
    """Dead inputs, rank, effective dimension, condition number and the smallest damp of one second moment
    (in, in).
    """
    top = float(values[0])
    live = values[values > top * len(values) * torch.finfo(torch.float32).eps]
    return {
        "dead_inputs": int((gram.diagonal() == 0).sum()),
        "rank": len(live),
        "effective_dimension": float(values.sum().square() / values.square().sum().clamp_min(1e-300)),
        "condition": top / float(live[-1]) if len(live) else float("inf"),
        "smallest_damp": smallest_damp(gram),
    }


def factorises(gram: Tensor, damp: float) -> bool:
    try:
        return bool(torch.isfinite(obs.inverse_factor(gram, damp)).all())
    except (BadInput, torch.linalg.LinAlgError):
        return False


def smallest_damp(gram: Tensor, steps: int = 12) -> float:
    """The smallest damp (a share of the mean diagonal) with which H and its inverse factorise in float32,
    by bisection in its logarithm.
    """
    if factorises(gram, SMALLEST):
        return SMALLEST
    if not factorises(gram, LARGEST):
        return float("inf")
    low, high = math.log10(SMALLEST), math.log10(LARGEST)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if factorises(gram, 10**middle) else (middle, high)
    return 10**high


class DampView(BaseModel):
    """What the viewer may choose."""

    show: Literal["spectra", "damps"] = "spectra"


class DampResult(Result):
    """Spectra of all layers, or loss against damp."""

    def view_model(self) -> type[BaseModel]:
        return DampView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, line

        arrays, losses = self.arrays, self.tables.get("damps")
        if DampView(**view).show == "damps" and losses is not None:
            fig = figure(
                "SparseGPT's loss against damp",
                x="damp (share of the mean diagonal)",
                y="loss (nats)",
                xaxis_type="log",
            )
            line(fig, losses.damp, losses.loss, "loss")
            return fig
        worst = self.table.sort_values("condition", ascending=False).layer.head(6)
        fig = figure(
            "Spectra of the six worst conditioned inputs",
            x="eigenvalue number",
            y="eigenvalue / largest",
            yaxis_type="log",
        )
        for name in worst:
            values = arrays[name]
            line(fig, np.arange(1, len(values) + 1), np.maximum(values / max(values[0], 1e-30), 1e-12), name)
        return fig
