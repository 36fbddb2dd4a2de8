"""Quantization-aware training: the loss is minimised through the rounding, whatever of it is learned
(see `trained_rounding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from pydantic import BaseModel

from workbench.errors import BadInput
from workbench.measures.reference import measured_beside, reference_of
from workbench.progress import Progress
from workbench.quantization.activations.attention import (
    order_of,
)
from workbench.quantization.quantized_layer import put
from workbench.quantization.trained.objective import Objective
from workbench.quantization.trained.rounded_course import RoundedCourse
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import TrainedRounding
from workbench.results import Result, choices
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Change

if TYPE_CHECKING:
    import plotly.graph_objects as go


class TrainQuantizedResult(Result):
    """Loss over the steps, with the moment quantization was switched on."""

    def figure(self, column: str = "train_loss", **more: Any) -> go.Figure:
        from workbench.figures import figure, line, rule

        if column == "readings":
            read = self.tables["readings"]
            fig = figure("One stored integer, read at several widths", "bits", "test loss (nats)")
            line(fig, read["bits"].to_numpy(), read["loss"].to_numpy(), "loss", mode="lines+markers")
            return fig
        fig = figure(
            "Quantization-aware training",
            "step",
            {"average_width": "bits", "map_distance": "1 - cosine", "information": "-log information"}.get(
                column, "loss (nats)"
            ),
        )
        found = self.table[self.table[column].notna()]
        line(fig, found["step"].to_numpy(), found[column].to_numpy(), column.replace("_", " "))
        switch = self.facts.get("switch_step", 0)
        if switch:
            rule(fig, "quantized from here", x=float(switch))
        return fig

    def view_model(self) -> type[BaseModel] | None:
        known = (
            "train_loss",
            "task_loss",
            "teacher_loss",
            "map_distance",
            "information",
            "validation_loss",
            "average_width",
        )
        return choices(
            "TrainQuantizedView",
            column=tuple(c for c in known if c in self.table)
            + (("readings",) if "readings" in self.tables else ()),
        )


class TrainQuantized(TrainedSettings):
    """Train through the rounding: learned steps (LSQ), ternary / binary weights and attention, learned widths
    or formats, adapters; with a teacher, after a dense part.
    """

    changes_model: ClassVar[bool] = True

    @classmethod
    def result_class(cls) -> type[Result]:
        return TrainQuantizedResult

    def check(self, on: Subject) -> None:
        layers = on.layers(self.layers)
        on.split("train")
        on.split("test")
        Objective.check(self, on)
        if self.method.has("low-rank") and (self.switch_at or self.from_scratch):
            raise BadInput(
                f"method: {self.method} trains low-rank terms of frozen weights from the first step; "
                "set switch_at 0 and from_scratch false"
            )
        self.method.value.check(self, on, layers)
        self._check_activations(on, layers)
        if self.from_scratch and not hasattr(on.model, "config"):
            raise BadInput("from_scratch: only a transformers model can be made anew from its configuration")

    def _check_activations(self, on: Subject, layers: Sequence[Layer]) -> None:
        if not self.activation_bits:
            if self.rounded_attention or self.wide_tokens:
                raise BadInput(
                    "activation_bits: rounded_attention and wide_tokens round to it, but it is 0; "
                    "choose 2 to 8"
                )
            return
        if self.activation_bits == 1 or self.method.has("signs"):
            raise BadInput(
                f"activation_bits: {self.activation_bits} does not go with method {self.method}; it takes 2 "
                f"to 8, and inputs of {' and '.join(TRAINED_ROUNDING.with_trait('signs'))} are signs"
            )
        if fused := [layer.name for layer in layers if len(layer.shape) == 3]:
            raise BadInput(
                f"activation_bits: {fused[0]} reads its inputs inside a fused expert kernel; "
                "choose layers without experts, or 0"
            )
        if self.wide_tokens and on.task.name == "seq2seq-lm":
            raise BadInput(
                "wide_tokens: an encoder's and a decoder's tokens have no common order of importance; use 0"
            )
        if self.rounded_attention or self.wide_tokens:
            order_of(on, [])

    def _run(self, on: Subject, progress: Progress) -> Result:
        reference = None
        if not self.from_scratch:
            reference = reference_of(on, "test", self.test_examples, progress, changing=True)
        dense = on.evaluated("test", self.test_examples)
        objective = Objective(self, on)
        if self.from_scratch:
            torch.manual_seed(self.seed)
            device = on.device
            on = on.with_model(type(on.model)(on.model.config).to(device))
        layers = on.layers(self.layers)
        trained = [(p, p.requires_grad) for p in on.model.parameters()]
        course = RoundedCourse(self, on, layers, objective)
        course.train(progress)
        roundings = course.roundings
        widths = self._freeze(layers)
        for tensor, wanted in trained:
            tensor.requires_grad_(wanted)
        facts: dict[str, Any] = {"switch_step": course.switch} | {f"dense_{k}": v for k, v in dense.items()}
        if not progress.stopped:
            facts |= measured_beside(reference, on, "test", self.test_examples, progress)
        tables = {"widths": widths} if len(widths) else {}
        if tables:
            facts["average_width"] = float(
                (widths["bits"] * widths["weights"]).sum() / widths["weights"].sum()
            )
            facts["bytes"] = math.ceil(widths["bytes"].sum())
        if roundings and not progress.stopped:
            tables |= type(roundings[0]).tables(roundings, layers, on, self, progress)
        return self.result(pd.DataFrame(course.rows), facts, tables=tables, subject=on)

    @torch.no_grad()
    def _freeze(self, layers: Sequence[Layer]) -> pd.DataFrame:
        """Replace the trained roundings by the grid they ended on, with the values that were trained;
        one row a layer with its width.
        """
        rows = []
        for layer in layers:
            for change in layer.changes:
                if isinstance(change, TrainedRounding):
                    weight = (layer.original.mT if layer.transposed else layer.original).detach()
                    for inner in layer.changes:
                        weight = inner.change(weight) if inner.order < change.order else weight
                    values, grid = change.final(weight.float())
                    put(layer, values, grid)
                    remove(layer, change)
                    rows.append(
                        {
                            "layer": layer.name,
                            "format": grid.format.name,
                            "bits": grid.format.element.bits,
                            "weights": math.prod(layer.shape),
                            "bytes": grid.bytes(layer.shape)
                            + 2 * sum(p.numel() for c in layer.changes for p in c.parameters()),
                        }
                    )
                    break
        return pd.DataFrame(rows)


def remove(layer: Layer, change: Change) -> None:
    """Take one of several changes off a weight."""
    layer.restack(c for c in layer.changes if c is not change)
