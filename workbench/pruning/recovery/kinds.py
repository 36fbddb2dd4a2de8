"""Kinds of recovery: what trains after and between pruning events, and on which loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.axis import Choice, Options, parameter
from workbench.pruning.axes import RECOVERY
from workbench.pruning.recovery.recovery import Recovery
from workbench.subjects import Layer, Subject
from workbench.training.chosen import RunFields, chosen_settings
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE


class Finetune(Options, RunFields):
    steps: int = parameter(0, "optimizer steps in all", ge=0)
    learning_rate: float = parameter(5e-5, "peak learning rate", gt=0, scale="log")
    batch_size: int = parameter(16, "examples in a training batch", ge=1, unit="examples")
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("rise-and-fall")


class Distil(Finetune):
    temperature: float = parameter(2.0, "outputs are divided by this before they are compared", gt=0)


class Adapters(Finetune):
    rank: int = parameter(8, "rank of the adapters", ge=1)


@RECOVERY.add("none", formula="no training", source="baseline", traits="nothing")
def none(
    on: Subject,
    layers: Sequence[Layer],
    teacher: Subject | None,
    options: Options,
    made: type[Recovery] = Recovery,
    **more: Any,
) -> None:
    return None


@RECOVERY.add(
    "finetune",
    formula="min over w of the task's loss, masks in force",
    source="Han et al. 2015",
    needs="training",
    options=Finetune,
    beside={"recovery.steps": 20},
)
def finetune(
    on: Subject,
    layers: Sequence[Layer],
    teacher: Subject | None,
    options: Finetune,
    made: type[Recovery] = Recovery,
    **more: Any,
) -> Recovery:
    """All weights but the embeddings."""
    more |= {"settings": chosen_settings(options)}
    rate = options.learning_rate
    return made(on, layers, "finetune", options.steps, rate, options.batch_size, **more)


@RECOVERY.add(
    "distil",
    formula="task's loss + t^2 KL(teacher || student) + distance of hidden states",
    source="Hinton et al. 2015",
    needs="training",
    options=Distil,
    beside={"recovery.steps": 20},
)
def distil(
    on: Subject,
    layers: Sequence[Layer],
    teacher: Subject | None,
    options: Distil,
    made: type[Recovery] = Recovery,
    **more: Any,
) -> Recovery:
    """The same, with the dense model as a teacher."""
    more |= {"teacher": teacher, "temperature": options.temperature}
    more |= {"settings": chosen_settings(options)}
    return made(on, layers, "distil", options.steps, options.learning_rate, options.batch_size, **more)


@RECOVERY.add(
    "low-rank",
    formula="W = M * (W_p + B A), B and A, biases and norms trained",
    source="Zimmer et al. 2023 (PERP); Munoz et al. 2024 (SQFT)",
    needs="training",
    options=Adapters,
    beside={"recovery.steps": 20},
)
def low_rank(
    on: Subject,
    layers: Sequence[Layer],
    teacher: Subject | None,
    options: Adapters,
    made: type[Recovery] = Recovery,
    **more: Any,
) -> Recovery:
    """Masked adapters, merged at the end without losing a zero."""
    more |= {"rank": options.rank, "settings": chosen_settings(options)}
    return made(on, layers, "low-rank", options.steps, options.learning_rate, options.batch_size, **more)
