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
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.activations.activations import ActivationQuant
from workbench.quantization.activations.attention import (
    AttentionChange,
    order_of,
    round_activations,
)
from workbench.quantization.quantize_result import choices
from workbench.quantization.quantized_layer import put
from workbench.quantization.trained.objective import Objective
from workbench.quantization.trained.settings import TRAINED_ROUNDING, TrainedSettings
from workbench.quantization.trained.trained_rounding import Course, TrainedRounding, average_width
from workbench.results import Result
from workbench.subjects import Layer, LowRank, Subject
from workbench.subjects.changes import Change

if TYPE_CHECKING:
    import plotly.graph_objects as go


class TrainQuantizedResult(Result):
    """Loss over the steps, with the moment quantization was switched on."""

    def figure(self, column: str = "train_loss", **more: Any) -> go.Figure:
        from workbench.figures import figure, line, rule

        if column == "readings":
            read = (self.tables or {})["readings"]
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
            + (("readings",) if "readings" in (self.tables or {}) else ()),
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
        dense = on.evaluated("test", self.test_examples)
        objective = Objective(self, on)
        if self.from_scratch:
            torch.manual_seed(self.seed)
            device = on.device
            on = on.with_model(type(on.model)(on.model.config).to(device))
        layers = on.layers(self.layers)
        sizes = [math.prod(layer.shape) for layer in layers]
        generator = torch.Generator().manual_seed(self.seed)
        course = Course(self, torch.Generator().manual_seed(self.seed + 1))
        switch = round(self.switch_at * self.steps)
        trained = [(p, p.requires_grad) for p in on.model.parameters()]
        optimizer = torch.optim.AdamW(
            [{"params": [p for p, wanted in trained if wanted], "rate": 1.0}],
            self.learning_rate,
            weight_decay=0.0,
        )
        rows: list[dict[str, float]] = []
        roundings: list[TrainedRounding] = []
        on.model.train()
        for step in progress.track(range(self.steps), "training"):
            if step == switch:
                roundings = self._switch_on(on, layers, optimizer)
            course.done = (step - switch + 1) / (self.steps - switch)
            for rounding in roundings:
                rounding.prepare(course)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * group["rate"] * (1 - step / self.steps)
            pick = torch.randint(on.size("train"), (self.batch_size,), generator=generator)
            batch = {k: v[pick].to(on.device) for k, v in on.split("train").items()}
            loss = objective(on, batch)
            if not bool(torch.isfinite(loss)):
                raise BadInput(
                    f"learning_rate: the loss was no longer finite at step {step}; "
                    f"{self.learning_rate:g} is too large here"
                )
            extra = type(roundings[0]).extra(roundings, sizes, loss, course) if roundings else None
            (loss if extra is None else loss + extra).backward()
            torch.nn.utils.clip_grad_norm_(on.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append(
                {
                    "step": step,
                    "train_loss": float(loss.detach()),
                    "validation_loss": float("nan"),
                    "quantized": float(step >= switch),
                }
                | objective.parts
            )
            if roundings and roundings[0].width is not None:
                rows[-1]["average_width"] = float(average_width(roundings, sizes).detach())
            if (step + 1) % max(1, self.steps // 5) == 0 and "validation" in on.splits:
                rows[-1]["validation_loss"] = on.evaluate("validation", limit=self.test_examples)["loss"]
                on.model.train()
        on.model.eval()
        if len(rows) <= switch:
            roundings = self._switch_on(on, layers, optimizer)
        widths = self._freeze(layers)
        for tensor, wanted in trained:
            tensor.requires_grad_(wanted)
        after = on.evaluate("test", limit=self.test_examples, progress=progress)
        facts: dict[str, Any] = {"switch_step": switch} | {f"dense_{k}": v for k, v in dense.items()} | after
        tables = {"widths": widths} if len(widths) else {}
        if tables:
            facts["average_width"] = float(
                (widths["bits"] * widths["weights"]).sum() / widths["weights"].sum()
            )
            facts["bytes"] = math.ceil(widths["bytes"].sum())
        if roundings:
            tables |= type(roundings[0]).tables(roundings, layers, on, self, progress)
        return self.result(pd.DataFrame(rows), facts, tables=tables, subject=on)

    def _switch_on(
        self, on: Subject, layers: Sequence[Layer], optimizer: torch.optim.Optimizer
    ) -> list[TrainedRounding]:
        """Put the roundings on and give the optimizer what they learn.
        Methods that train low-rank terms freeze everything else.
        """
        low_rank = self.method.has("low-rank")
        if low_rank:
            for tensor in on.model.parameters():
                tensor.requires_grad_(False)
        made: list[TrainedRounding] = []
        generator = torch.Generator().manual_seed(self.seed)
        rounding: type[TrainedRounding] = self.method.value
        surveyed = rounding.survey(on, layers, self)
        rounding.before(layers, self, generator)
        for layer in layers:
            group = min(self.group_size, layer.shape[-1])
            begun = rounding.begin(layer.weight.detach().float(), group, self)
            if begun is not None:
                begun.surveyed = surveyed.get(layer.name, {})
                layer.attach(begun)
                made.append(begun)
        terms: list[nn.Parameter] = []
        if low_rank:
            changes = [c for layer in layers for c in layer.changes if isinstance(c, LowRank)]
            terms = [p for change in changes for p in change.parameters()]
        rounding.after(on, layers, self, generator)
        if self.activation_bits:
            round_activations(on, layers, self.activation_bits, self.wide_tokens, self.rounded_attention)
        own = [p for change in made for p in change.parameters()]
        own += [
            p
            for layer in layers
            for c in layer.changes
            if isinstance(c, (ActivationQuant, AttentionChange))
            for p in c.parameters()
        ]
        for params, rate in ((own, rounding.rate), (terms, 10.0)):
            for tensor in params:
                tensor.requires_grad_(True)
            if fresh := [p for p in params if not known(optimizer, p)]:
                optimizer.add_param_group({"params": fresh, "rate": rate})
        if self.reset_optimizer:
            optimizer.state.clear()
        return made

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


def known(optimizer: torch.optim.Optimizer, tensor: Tensor) -> bool:
    return any(tensor is p for group in optimizer.param_groups for p in group["params"])


def remove(layer: Layer, change: Change) -> None:
    """Take one of several changes off a weight."""
    stack = layer.module.parametrizations[layer.tensor]
    kept = [c for c in stack if c is not change]
    while len(stack):
        del stack[-1]
    stack.extend(kept)
