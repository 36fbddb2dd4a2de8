"""The fields of `prune`, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from workbench.axis import Choice, parameter
from workbench.instruments import NUMBERS, WEIGHTS, SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.axes import (
    COMPENSATION,
    PATTERN,
    PRUNING_METHOD,
    RECOVERY,
    SALIENCY,
    SPARSITY_ALLOCATION,
    SPARSITY_SCHEDULE,
)
from workbench.pruning.calibration import Calibration
from workbench.pruning.pattern import NM, Pattern, Tiles
from workbench.subjects import Layer, Subject


def form_of(given: Mapping[str, Any]) -> Pattern:
    """The pattern that was given, with its options, or the one of single weights."""
    chosen = PATTERN.chosen(given.get("pattern", "unstructured"), "pattern")
    options = {name.removeprefix("pattern."): v for name, v in given.items() if name.startswith("pattern.")}
    known = {name: v for name, v in options.items() if name in chosen.entry.options.model_fields}
    made: Pattern = PATTERN.chosen(chosen, "pattern", **known)()
    return made


TRAINED_BEFORE_LAST = 0.6  # share of the recovery steps spent before the last event of a gradual schedule


class PrunePlan(SubjectInstrument):
    """What `prune` is told: every part of a pruning reads it."""

    method: Choice = PRUNING_METHOD.choice("obert")
    sparsity: float = parameter(
        0.5,
        "share to remove of what the pattern is about: weights, or heads, neurons, channels, blocks, experts "
        "(the result's sparsity after heads or neurons is of the weights in all chosen layers, "
        "its units and units_left are of those); an N:M pattern has its own",
        ge=0,
        lt=1,
        step=0.01,
    )
    pattern: Choice = PATTERN.choice("unstructured")
    layers: str = parameter(
        "blocks",
        "which layers: blocks (all inside the repeated blocks) or globs over names, such as '*.query,*.key'",
    )
    saliency: Choice = SALIENCY.choice(None, group="Pruning method")
    compensation: Choice = COMPENSATION.choice(None, group="Pruning method")
    allocation: Choice = SPARSITY_ALLOCATION.choice(None, group="Pruning method")
    sparsity_schedule: Choice = SPARSITY_SCHEDULE.choice("one-shot", group="Pruning method")
    calibration_examples: int = parameter(
        128, "examples for the layers' input statistics", ge=1, unit="examples", group="Data"
    )
    sequential: bool = parameter(
        True,
        "block by block: calibrate on the inputs that the already pruned blocks produce; else on the dense "
        "model's (no difference where nothing but the weights is read, or where gradients, recovery or "
        "other layers' scores are)",
        group="Pruning method",
    )
    recovery: Choice = RECOVERY.choice("none")
    predict_examples: int = parameter(
        32,
        "examples for predicted and measured loss change (0: leave them out)",
        ge=0,
        unit="examples",
        group="Data",
    )
    calibration_split: str = parameter("calibration", "split that all statistics come from", group="Data")
    test_split: str = parameter("test", "split for the reported loss and metrics", group="Data")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {
            "schedule": "sparsity_schedule",
            "steps": "sparsity_schedule.events",
            "recovery_steps": "recovery.steps",
            "lr": "recovery.learning_rate",
        }

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        form = form_of(given)
        fixed = {} if form.fixed is None else {"sparsity": form.fixed}
        return {**PRUNING_METHOD.chosen(given.get("method", "obert"), "method")(form), **fixed}

    def idle(self) -> Iterator[str]:
        yield from super().idle()
        if self.pattern().fixed is not None and self.allocation != self.parts()["allocation"]:
            yield f"allocation: has no effect with pattern {self.pattern}, which has one sparsity everywhere"

    def with_gradients(self, count: int) -> Self:
        """A copy in which everything that measures gradients measures so many."""
        fields = ("method", "saliency", "compensation")
        takes = [f for f in fields if "gradients" in getattr(self, f).entry.options.model_fields]
        return self.with_fields(**{f"{field}.gradients": count for field in takes})

    def parts(self) -> Mapping[str, Any]:
        """What the method fixes for this pattern."""
        found: Mapping[str, Any] = self.method(self.pattern())
        return found

    def compares_layers_by_itself(self) -> bool:
        """True when layers' scores are compared and the method did not say so."""
        return self.allocation.has("across layers") and self.allocation != self.parts()["allocation"]

    @property
    def walks(self) -> bool:
        """True when each layer's mask and weights follow from its own inputs, at once and for good, so that
        blocks are pruned one after another with the statistics of one.
        """
        local = ("", "inputs")
        return (
            self.sparsity_schedule.has("at once")
            and self.recovery.has("nothing")
            and self.saliency.entry.needs in local
            and self.compensation.entry.needs in local
            and not self.allocation.has("across layers")
            and not self.method.has("refines")
            and isinstance(self.pattern(), Tiles | NM)
        )

    @property
    def in_sequence(self) -> bool:
        """True when a block is pruned once those before it are."""
        reads = "inputs" in (self.saliency.entry.needs, self.compensation.entry.needs)
        return self.sequential and self.walks and reads

    @property
    def recovery_steps(self) -> int:
        """Optimizer steps of the recovery in all."""
        return int(getattr(self.recovery.options, "steps", 0))

    def steps_between(self, events: int) -> int:
        """Recovery steps before each of so many pruning events."""
        return int(TRAINED_BEFORE_LAST * self.recovery_steps / events) if events > 1 else 0

    def calibrates(self) -> dict[str, tuple[str, int]]:
        """The inputs' examples or those of the gradients, whichever are more; where only weights are read,
        what the reported errors come from.
        """
        parts = (self.method, self.saliency, self.compensation, self.allocation)
        counts = [self.calibration_examples for part in parts if part.entry.needs == "inputs"]
        counts += [
            part.options.gradients * getattr(part.options, "gradient_batch", 1)
            for part in parts
            if part.entry.needs == "gradients"
        ]
        decides = WEIGHTS if counts else NUMBERS
        return {decides: (self.calibration_split, max(counts, default=self.calibration_examples))}

    def calibration(self, on: Subject, layers: Sequence[Layer], progress: Progress) -> Calibration:
        return Calibration(on, layers, self.calibration_split, self.calibration_examples, self.seed, progress)
