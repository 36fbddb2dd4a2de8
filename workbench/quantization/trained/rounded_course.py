"""What happens to a subject that trains through its rounding, step by step, on the training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.activations.activations import ActivationQuant
from workbench.quantization.activations.attention import AttentionChange, round_activations
from workbench.quantization.trained.objective import Objective
from workbench.quantization.trained.trained_rounding import Course, TrainedRounding, average_width
from workbench.subjects import Batch, Layer, LowRank, Subject
from workbench.training.chosen import chosen_settings
from workbench.training.data_order import Draws
from workbench.training.loop import Training
from workbench.training.resume import remembered

if TYPE_CHECKING:
    from workbench.quantization.trained.settings import TrainedSettings


class RoundedCourse:
    """A dense part, the switch, and what the roundings ask for in every step after it.

    rows : one a step: step, train_loss, validation_loss, quantized and the objective's parts.
    """

    def __init__(
        self, settings: TrainedSettings, on: Subject, layers: Sequence[Layer], objective: Objective
    ) -> None:
        self.settings, self.on, self.layers, self.objective = settings, on, layers, objective
        self.sizes = [math.prod(layer.shape) for layer in layers]
        self.course = Course(settings, torch.Generator().manual_seed(settings.seed + 1))
        self.switch = round(settings.switch_at * settings.steps)
        self.roundings: list[TrainedRounding] = []
        self.rows: list[dict[str, float]] = []
        self.step, self.task_loss = 0, math.nan

    def train(self, progress: Progress) -> None:
        """All steps; the roundings are on afterwards, even when somebody stopped before the switch."""
        settings = self.settings
        given: dict[str, Any] = {
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "warmup": 0.0,
            "weight_decay": 0.0,
            "order": Draws(settings.seed),
            "own_generator": False,
            "evaluate_split": "",
            "clipped": self.on.model.parameters,
            "loss": self.loss,
            "before_gradient": [self.begin_step],
            "callbacks": [self.end_step],
            "begun": self.begin,
            "keeps": [self],
            "progress": progress,
            "label": "training",
        }
        run = Training.start(self.on, **(given | chosen_settings(settings)))
        run.advance()
        if run.diverged:
            raise self.too_fast(run.step - 1)
        run.finish()
        self.on.model.eval()
        if run.step <= self.switch:
            self.switch_on(run, early=True)

    def begin(self, run: Training) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "step": self.step,
            "done": self.course.done,
            "kept": self.course.kept,
            "generator": self.course.generator.get_state(),
            "parts": self.objective.parts,
            "rounded": bool(self.run.step > self.switch),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["rounded"]:
            self.switch_on(self.run)
        self.rows, self.step = list(state_dict["rows"]), state_dict["step"]
        self.course.done, self.course.kept = state_dict["done"], dict(state_dict["kept"])
        self.course.generator.set_state(state_dict["generator"])
        self.objective.parts = dict(state_dict["parts"])

    def begin_step(self, run: Training) -> None:
        self.step = run.step
        if run.step == self.switch:
            self.switch_on(run)
        self.course.done = (run.step - self.switch + 1) / (self.settings.steps - self.switch)
        for rounding in self.roundings:
            rounding.prepare(self.course)

    def loss(self, on: Subject, batch: Batch) -> Tensor:
        loss = self.objective(on, batch)
        if not bool(torch.isfinite(loss)):
            raise self.too_fast(self.step)
        self.task_loss = float(loss.detach())
        if not self.roundings:
            return loss
        extra = type(self.roundings[0]).extra(self.roundings, self.sizes, loss, self.course)
        return loss if extra is None else loss + extra

    def too_fast(self, step: int) -> BadInput:
        return BadInput(
            f"learning_rate: the loss was no longer finite at step {step}; "
            f"{self.settings.learning_rate:g} is too large here"
        )

    def end_step(self, run: Training) -> None:
        row = {
            "step": self.step,
            "train_loss": self.task_loss,
            "validation_loss": math.nan,
            "quantized": float(self.step >= self.switch),
        }
        row |= self.objective.parts
        if self.roundings and self.roundings[0].width is not None:
            row["average_width"] = float(average_width(self.roundings, self.sizes).detach())
        if run.step % max(1, self.settings.steps // 5) == 0 and "validation" in self.on.splits:
            limit = self.settings.test_examples
            row["validation_loss"] = self.on.evaluate("validation", limit=limit)["loss"]
        self.rows.append(row)

    def switch_on(self, run: Training, early: bool = False) -> None:
        """Put the roundings on and give the optimizer what they learn.
        Methods that train low-rank terms freeze everything else.

        When a checkpoint puts them on again, they begin at the weights of then. early : somebody has stopped
        before the switch, and no checkpoint knows of this one.
        """
        settings, on, layers = self.settings, self.on, self.layers
        if self.switch and not early:
            on.model.load_state_dict(remembered("switch", lambda: dict(on.model.state_dict()), always=True))
        low_rank = settings.method.has("low-rank")
        if low_rank:
            for tensor in on.model.parameters():
                tensor.requires_grad_(False)
        made: list[TrainedRounding] = []
        generator = torch.Generator().manual_seed(settings.seed)
        rounding: type[TrainedRounding] = settings.method.value
        surveyed = rounding.survey(on, layers, settings) if early else self.survey(rounding)
        rounding.before(layers, settings, generator)
        for layer in layers:
            group = min(settings.group_size, layer.shape[-1])
            begun = rounding.begin(layer.weight.detach().float(), group, settings)
            if begun is not None:
                begun.surveyed = surveyed.get(layer.name, {})
                layer.attach(begun)
                made.append(begun)
        terms: list[nn.Parameter] = []
        if low_rank:
            changes = [c for layer in layers for c in layer.changes if isinstance(c, LowRank)]
            terms = [p for change in changes for p in change.parameters()]
        rounding.after(on, layers, settings, generator)
        if settings.activation_bits:
            round_activations(
                on, layers, settings.activation_bits, settings.wide_tokens, settings.rounded_attention
            )
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
            run.learn(params, rate)
        if settings.reset_optimizer:
            for part in getattr(run.optimizer, "parts", [run.optimizer]):
                part.state.clear()
        self.roundings = made

    def survey(self, rounding: type[TrainedRounding]) -> dict[str, dict[str, float]]:
        """What a method asks of the subject, by layer."""

        def asked() -> dict[str, dict[str, float]]:
            found = rounding.survey(self.on, self.layers, self.settings)
            return {name: dict(numbers) for name, numbers in found.items()}

        answers: dict[str, dict[str, float]] = remembered("survey", asked)
        return answers
