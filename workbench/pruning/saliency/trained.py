"""Saliencies that come out of training: channels that learn to stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.axis import Choice, Options, parameter
from workbench.progress import Progress
from workbench.pruning.axes import SALIENCY
from workbench.pruning.recovery.pat import learn_channels
from workbench.subjects import Subject
from workbench.training.chosen import chosen_settings


class Learned(Options):
    rank: int = parameter(8, "rank of the channels' transforms", ge=1)


@SALIENCY.add(
    "learned",
    formula="m = sigmoid(T M) + c, M trained",
    source="Liu et al. 2024 (PAT)",
    needs="training",
    traits="channels",
    options=Learned,
    beside={"recovery": "finetune", "recovery.steps": 20},
)
def learned(
    on: Subject, left: int, recovery: Choice, seed: int, progress: Progress, options: Learned
) -> tuple[Tensor, list[dict[str, Any]]]:
    """(kept (hidden,), curve): the subject is trained in place."""
    training = recovery.options
    settings = chosen_settings(training)
    if training.schedule == "rise-and-fall":  # the tuning has one of its own, which rests at the end
        del settings["schedule"]
    kept, curve = learn_channels(
        on,
        left,
        recovery.name,
        training.steps,
        training.learning_rate,
        training.batch_size,
        options.rank,
        seed,
        progress,
        settings,
    )
    return kept, list(curve)
