"""The fields of `train-sparse`, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.axis import Choice, parameter, warn
from workbench.instruments import SubjectInstrument
from workbench.pruning.axes import PATTERN, SALIENCY, SPARSITY_ALLOCATION, SPARSITY_SCHEDULE
from workbench.pruning.plan import form_of
from workbench.pruning.sparse_training.axes import (
    BACKWARD,
    MASKS,
    OBJECTIVE,
    PORTION,
    SPARSE_METHOD,
    TERMS,
    TRAINABLE,
)
from workbench.training.chosen import RunFields
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE
from workbench.training.sweep.objective import Start


def with_sparsity_schedule(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with `sparsity_schedule` where `schedule` names one of those, as it did one release ago;
    the two axes share the name `linear` alone, which was refused here.
    """
    named = given.get("schedule")
    name = named.get("name") if isinstance(named, Mapping) else named
    if str(name) not in SPARSITY_SCHEDULE.entries or str(name) in LEARNING_RATE_SCHEDULE.entries:
        return dict(given)
    warn(f"schedule: {name} is a sparsity_schedule now; the old name goes with the next release")
    return {
        f"sparsity_{field}" if field.partition(".")[0] == "schedule" else field: value
        for field, value in given.items()
    }


class SparsePlan(SubjectInstrument, RunFields):
    """What `train-sparse` is told: every part of its run reads it."""

    method: Choice = SPARSE_METHOD.choice("static")
    sparsity: float = parameter(
        0.5,
        "share of the weights to remove (gates: comes out of the penalty; N:M patterns have their own)",
        ge=0,
        lt=1,
        step=0.01,
    )
    pattern: Choice = PATTERN.choice(
        "unstructured",
        "unstructured, 2:4, block 16x16, row, column; gates also: "
        "hybrid 16x16 (blocks in attention, whole neurons elsewhere)",
    )
    layers: str = parameter("blocks", "which layers carry masks: blocks or globs over names")
    masks: Choice = MASKS.choice(None, group="Masks")
    saliency: Choice = SALIENCY.choice(
        None, "what chooses a mask that is made before training", usual={"gradients": 64}, group="Masks"
    )
    allocation: Choice = SPARSITY_ALLOCATION.choice(
        None, "how a mask made before training shares its sparsity among layers", group="Masks"
    )
    sparsity_schedule: Choice = SPARSITY_SCHEDULE.choice(
        None,
        "sparsity over the run: from-start, cubic, or from stage to stage: geometric, late",
        group="Masks",
    )
    trainable: Choice = TRAINABLE.choice(None, group="Masks")
    terms: Choice = TERMS.choice(None, group="Masks")
    objective: Choice = OBJECTIVE.choice(None, group="Masks")
    backward: Choice = BACKWARD.choice(None, group="Masks")
    start: Start = parameter("weights", "start from the subject's weights or from random ones", group="Masks")
    steps: int = parameter(200, "optimizer steps in all", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log", group="Training")
    learning_rate: float = parameter(
        1e-3, "peak learning rate, anew in every stage", gt=0, le=10, scale="log"
    )
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("cosine", group="Training")
    stages: int = parameter(
        1,
        "parts of the run: the half that learns is drawn, and a staged schedule prunes, at the start of each",
        ge=1,
        le=1000,
        group="Masks",
    )
    portion: Choice = PORTION.choice(None, group="Masks")
    calibration_examples: int = parameter(
        64, "examples for saliencies that need inputs", ge=1, unit="examples", group="Data"
    )
    test_split: str = parameter("test", "split for the reported loss and metrics", group="Data")

    def __init__(self, **given: Any) -> None:
        super().__init__(**with_sparsity_schedule(given))

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {
            "lr": "learning_rate",
            "score_lr": "masks.learning_rate",
            "blocks": "trainable.blocks",
            "data": "portion",
            "learning_rate_schedule": "schedule",
        }

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        fixed = form_of(given).fixed
        method = SPARSE_METHOD.chosen(given.get("method", "static"), "method")
        return {**method(), **({} if fixed is None else {"sparsity": fixed})}

    def compares_layers_by_itself(self) -> bool:
        """True when layers' scores are compared and the method did not say so."""
        return self.allocation.has("across layers") and self.allocation != self.method()["allocation"]
