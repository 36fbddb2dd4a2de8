"""Quantization-aware training: the loss is minimised through the rounding, with steps that are learned or follow the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from workbench.instruments import BadInput, Progress, Result, SubjectInstrument, parameter
from workbench.quantization.formats import named
from workbench.quantization.grid import Grid, in_groups, stored
from workbench.quantization.quantize import choices, put
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Change

if TYPE_CHECKING:
    import plotly.graph_objects as go


class LearnedStep(Change):
    """LSQ (Esser et al. 2020): s round(clip(w / s)) with a learned step s for every group.

    d/ds is round(w/s) - w/s inside the range and the bound outside (eq. 3), which is what the straight-through rounding of
    w / s gives; it is scaled by 1 / sqrt(weights of a group x highest) (section 2.2).
    """

    order = 50

    def __init__(self, step: Tensor, *, format: str, group: int) -> None:
        super().__init__()
        self.step = nn.Parameter(step)  # (..., out or 1, groups)
        self.format, self.group = format, group

    def change(self, weight: Tensor) -> Tensor:
        element = named(self.format).element
        factor = (self.group * max(element.highest, 1.0)) ** -0.5
        step = self.step.abs().clamp_min(1e-8)
        step = step * factor + (step - step * factor).detach()
        spread = step.repeat_interleave(self.group, -1)[..., : weight.shape[-1]]
        units = (weight / spread).clamp(element.lowest, element.highest)
        return (units + (element.round(units.detach()) - units).detach()) * spread

    def grid(self) -> Grid:
        format = named(self.format)
        return Grid(format, stored(self.step.detach().abs().clamp_min(1e-8), format), None, self.group)

    def config(self) -> dict[str, Any]:
        return {"format": self.format, "group": self.group}


class MeanScaled(Change):
    """Ternary or binary weights that follow the mean magnitude: gamma round(clip(w / gamma)), gamma = mean |w| of a group, straight through
    (Ma et al. 2024; Kaushal et al. 2024, TriLM). `blend` phases it in: w + blend (Q(w) - w)."""

    order = 50
    blend: Tensor

    def __init__(self, blend: Tensor | None = None, *, format: str, group: int) -> None:
        super().__init__()
        self.register_buffer("blend", torch.ones(()) if blend is None else blend)
        self.format, self.group = format, group

    def grid_of(self, weight: Tensor) -> Grid:
        format = named(self.format)
        return Grid(format, stored(in_groups(weight.detach().float(), self.group).abs().mean(-1), format), None, self.group)

    def change(self, weight: Tensor) -> Tensor:
        rounded = self.grid_of(weight).round(weight.detach())
        return weight + self.blend * (rounded - weight).detach()

    def config(self) -> dict[str, Any]:
        return {"format": self.format, "group": self.group}


class TrainQuantizedResult(Result):
    """Loss over the steps, with the moment quantization was switched on."""

    def figure(self, column: str = "train_loss", **more: Any) -> go.Figure:
        from workbench.figures import figure, line, rule

        fig = figure("Quantization-aware training", "step", "loss (nats)")
        found = self.table[self.table[column].notna()]
        line(fig, found["step"].to_numpy(), found[column].to_numpy(), column.replace("_", " "))
        switch = self.facts.get("switch_step", 0)
        if switch:
            rule(fig, "quantized from here", x=float(switch))
        return fig

    def view_model(self) -> type[BaseModel] | None:
        return choices("TrainQuantizedView", column=("train_loss", "validation_loss"))


class TrainQuantized(SubjectInstrument):
    """Train through the rounding: learned steps (LSQ) or ternary / binary weights, from the start or after a part of the steps in full precision."""

    changes_model: ClassVar[bool] = True

    layers: str = parameter("blocks", "layers to quantize, comma-separated globs")
    method: Literal["lsq", "ternary", "binary"] = parameter("lsq", "learned steps; or values that follow the mean magnitude")
    bits: int = parameter(3, "width for lsq", ge=2, le=8, unit="bits")
    group_size: int = parameter(4096, "weights of a group (4096 and wider rows: one scale a row)", ge=1, le=4096, scale="log", unit="weights")
    steps: int = parameter(200, "optimizer steps", ge=1, le=100000, scale="log")
    batch_size: int = parameter(16, "examples of a step", ge=1, le=4096, scale="log", unit="examples")
    learning_rate: float = parameter(2e-4, "peak learning rate of AdamW (linear decay)", gt=0, le=1, scale="log")
    switch_at: float = parameter(0.0, "share of the steps trained in full precision first", ge=0, lt=1, step=0.05)
    ramp: float = parameter(0.0, "share of the steps over which rounding is phased in after the switch (ternary and binary)", ge=0, le=1, step=0.05)
    reset_optimizer: bool = parameter(False, "forget the optimizer's moments at the switch")
    from_scratch: bool = parameter(False, "start from random weights instead of the subject's")
    test_examples: int = parameter(512, "test and validation examples at most", ge=1, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return TrainQuantizedResult

    def check(self, on: Subject) -> None:
        layers = on.layers(self.layers)
        on.split("train")
        on.split("test")
        if self.ramp and self.method == "lsq":
            raise BadInput("ramp: phasing in is for ternary and binary; lsq learns its steps instead")
        if self.ramp + self.switch_at > 1:
            raise BadInput(f"ramp: {self.ramp:g} after a switch at {self.switch_at:g} ends beyond the last step; the two must add up to at most 1")
        if quantized := [layer.name for layer in layers if any(c.order == 50 for c in layer.changes)]:
            raise BadInput(f"layers: {quantized[0]} is quantized already; train the dense subject")
        if self.from_scratch and not hasattr(on.model, "config"):
            raise BadInput("from_scratch: only a transformers model can be made anew from its configuration")

    def _run(self, on: Subject, progress: Progress) -> Result:
        dense = on.memo(("evaluate", "test", self.test_examples), lambda: on.evaluate("test", limit=self.test_examples))
        if self.from_scratch:
            torch.manual_seed(self.seed)
            device = on.device
            on = on.with_model(type(on.model)(on.model.config).to(device))
        layers = on.layers(self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        switch = round(self.switch_at * self.steps)
        optimizer = torch.optim.AdamW((p for p in on.model.parameters() if p.requires_grad), self.learning_rate, weight_decay=0.0)
        rows: list[dict[str, float]] = []
        on.model.train()
        for step in progress.track(range(self.steps), "training"):
            if step == switch:
                self._switch_on(on, layers, optimizer)
            if self.ramp and step >= switch:
                for layer in layers:
                    for change in layer.changes:
                        if isinstance(change, MeanScaled):
                            change.blend.fill_(min(1.0, (step - switch + 1) / max(self.ramp * self.steps, 1)))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.steps)
            pick = torch.randint(on.size("train"), (self.batch_size,), generator=generator)
            batch = {k: v[pick].to(on.device) for k, v in on.split("train").items()}
            loss = on.loss(batch)
            if not bool(torch.isfinite(loss)):
                raise BadInput(f"learning_rate: the loss was no longer finite at step {step}; {self.learning_rate:g} is too large here")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(on.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append({"step": step, "train_loss": float(loss.detach()), "validation_loss": float("nan"), "quantized": float(step >= switch)})
            if (step + 1) % max(1, self.steps // 5) == 0 and "validation" in on.splits:
                rows[-1]["validation_loss"] = on.evaluate("validation", limit=self.test_examples)["loss"]
                on.model.train()
        on.model.eval()
        if len(rows) <= switch:
            self._switch_on(on, layers, optimizer)
        self._freeze(layers)
        after = on.evaluate("test", limit=self.test_examples, progress=progress)
        facts: dict[str, Any] = {"switch_step": switch} | {f"dense_{k}": v for k, v in dense.items()} | after
        return self.result(pd.DataFrame(rows), facts, subject=on)

    def _switch_on(self, on: Subject, layers: list[Layer], optimizer: torch.optim.Optimizer) -> None:
        for layer in layers:
            group = min(self.group_size, layer.shape[-1])
            if self.method == "lsq":
                format = named("int", self.bits)
                # The paper's start, 2 mean|w| / sqrt(highest), on each group.
                start = 2 * in_groups(layer.weight.detach().float(), group).abs().mean(-1) / max(format.element.highest, 1.0) ** 0.5
                layer.attach(LearnedStep(start.clamp_min(1e-6), format=format.name, group=group))
            else:
                layer.attach(MeanScaled(torch.tensor(0.0 if self.ramp else 1.0, device=layer.original.device), format=self.method, group=group))
        steps = [c.step for layer in layers for c in layer.changes if isinstance(c, LearnedStep)]
        if steps:
            optimizer.add_param_group({"params": steps})
        if self.reset_optimizer:
            optimizer.state.clear()

    @torch.no_grad()
    def _freeze(self, layers: list[Layer]) -> None:
        """Replace the trainable changes by the grid they ended on, with the values that were trained."""
        for layer in layers:
            for change in layer.changes:
                if isinstance(change, (LearnedStep, MeanScaled)):
                    inner = layer.original.mT if layer.transposed else layer.original
                    grid = change.grid() if isinstance(change, LearnedStep) else change.grid_of(inner)
                    values = grid.round(inner.detach().float())
                    put(layer, values, grid)
                    remove(layer, change)
                    break


def remove(layer: Layer, change: Change) -> None:
    """Take one of several changes off a weight."""
    stack = layer.module.parametrizations[layer.tensor]
    kept = [c for c in stack if c is not change]
    while len(stack):
        del stack[-1]
    stack.extend(kept)
