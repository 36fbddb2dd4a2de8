"""What an instrument that trains on the way has chosen for its run."""

from __future__ import annotations

from typing import Any

from workbench.axis import Choice, Fields, parameter
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.precision.precision import PRECISION

#: AdamW as torch has it, which the loops that train on the way have always used.
ADAMW = {"betas": (0.9, 0.999), "fused": False}
FIELDS = ("optimizer", "precision", "micro_batch", "clip")


class RunFields(Fields):
    """Fields of whatever trains on the way: they go to its run on the training loop."""

    optimizer: Choice = OPTIMIZER.choice("adamw", usual=ADAMW, group="Training")
    precision: Choice = PRECISION.choice("fp32", group="Training")
    micro_batch: int = parameter(
        0,
        "examples at once (gradient accumulation); 0 takes the whole batch",
        ge=0,
        le=65536,
        group="Training",
    )
    clip: float = parameter(1.0, "largest gradient norm; 0 does not clip", ge=0, le=1e6, group="Training")


def chosen_settings(fields: RunFields) -> dict[str, Any]:
    """Settings of a run from these fields; `schedule` is the learning rate's."""
    found: dict[str, Any] = {name: getattr(fields, name) for name in (*FIELDS, "schedule")}
    found["clip"] = found["clip"] or None
    return found
