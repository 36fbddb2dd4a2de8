"""The axis of training losses: what a step descends.

An entry is a function (subject, options) -> (subject, batch) -> mean loss over the batch's items, or None for
the task's own.
"""

from __future__ import annotations

from workbench.axis import Axis, Options
from workbench.subjects import Subject

TRAINING_LOSS = Axis(
    "training-loss",
    "loss of a training step",
    found_in=("workbench.training.losses", "workbench.training.batch.adversary"),
)


@TRAINING_LOSS.add("task", formula="L(w; x)", source="")
def task(on: Subject, options: Options) -> None:
    """The task's loss."""
