"""What learns, on which loss, with which backward pass, and on which part of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from workbench.axis import Options, parameter
from workbench.pruning.pattern import NM, Pattern
from workbench.pruning.recovery.recovery import distilled_loss
from workbench.pruning.recovery.trainable import parse_blocks, set_trainable
from workbench.pruning.sparse_training.axes import BACKWARD, OBJECTIVE, PORTION, TRAINABLE
from workbench.pruning.sparse_training.slope import DoublePruned

if TYPE_CHECKING:
    from workbench.subjects import Batch, Layer, Subject


@TRAINABLE.add("all", formula="everything", source="baseline")
def everything(on: Subject, seed: int, options: Options) -> list[nn.Parameter]:
    return set_trainable(on, "all")


@TRAINABLE.add("body", formula="everything but the embeddings", source="baseline")
def body(on: Subject, seed: int, options: Options) -> list[nn.Parameter]:
    return set_trainable(on, "body")


@TRAINABLE.add(
    "adapters", formula="low-rank terms, biases, norms and what changes bring", source="Zimmer et al. 2023"
)
def adapters(on: Subject, seed: int, options: Options) -> list[nn.Parameter]:
    return set_trainable(on, "adapters")


@TRAINABLE.add(
    "half", formula="half of each kind of matrix, drawn anew in every stage", source="Hui et al. 2024 (HFT)"
)
def half(on: Subject, seed: int, options: Options) -> list[nn.Parameter]:
    return set_trainable(on, "half", seed=seed)


class Named(Options):
    blocks: str = parameter("", "numbers of the blocks that learn, such as 0,2")


@TRAINABLE.add(
    "blocks",
    formula="the named blocks and the head",
    source="Kaplun et al. 2023 (SubTuning)",
    options=Named,
    beside={"trainable.blocks": "0"},
)
def named_blocks(on: Subject, seed: int, options: Named) -> list[nn.Parameter]:
    return set_trainable(on, "blocks", parse_blocks(options.blocks, len(on.blocks())))


@TRAINABLE.add("head", formula="what comes after the last block", source="baseline")
def head(on: Subject, seed: int, options: Options) -> list[nn.Parameter]:
    return set_trainable(on, "head")


@OBJECTIVE.add("task", formula="L", source="baseline")
def task(on: Subject, teacher: Subject | None, batch: Batch, options: Options) -> Tensor:
    return on.loss(batch)


@OBJECTIVE.add(
    "distil", formula="L + t^2 KL(teacher || student)", source="Hinton et al. 2015", traits="teacher"
)
def distil(on: Subject, teacher: Subject | None, batch: Batch, options: Options) -> Tensor:
    assert teacher is not None
    return distilled_loss(on, teacher, batch, hidden_states=False)


@BACKWARD.add("exact", formula="dX = dY W", source="baseline")
def exact(layers: Sequence[Layer], pattern: Pattern, options: Options) -> None:
    return None


class Lazy(Options):
    lazy: float = parameter(0.01, "share of the last steps in which adapters take part", ge=0, le=1)


@BACKWARD.add(
    "double-pruned",
    formula="dX = dY W_RC, W_RC pruned N:M along both sides",
    source="Mozaffari et al. 2024 (SLoPe)",
    options=Lazy,
    traits="n:m",
    beside={"pattern": "2:4"},
)
def double_pruned(layers: Sequence[Layer], pattern: Pattern, options: Lazy) -> DoublePruned:
    assert isinstance(pattern, NM)
    return DoublePruned(layers, pattern.keep, pattern.of)


@PORTION.add("whole", formula="all of it in every stage", source="baseline")
def whole(on: Subject, stage: int, stages: int, options: Options) -> Subject:
    return on


class Megabatches(Options):
    replay: bool = parameter(False, "a stage sees the parts before its own again")


@PORTION.add(
    "megabatches",
    formula="part k of n in stage k",
    source="Misra et al. 2022 (APP)",
    options=Megabatches,
    traits="parts",
)
def megabatches(on: Subject, stage: int, stages: int, options: Megabatches) -> Subject:
    return megabatch(on, stage, stages, options.replay)


def megabatch(on: Subject, index: int, count: int, replay: bool) -> Subject:
    """The same model with one of `count` consecutive parts of the training split,
    or with all parts up to it.
    """
    bounds = np.linspace(0, on.size("train"), count + 1).round().astype(int)
    first = 0 if replay else int(bounds[index])
    part = {key: value[first : int(bounds[index + 1])] for key, value in on.split("train").items()}
    return on.with_split("train", part)
