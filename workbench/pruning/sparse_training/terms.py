"""Terms added to a weight while it is trained: under its mask, or beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.axis import Options, parameter
from workbench.pruning.sparse_training import side_terms
from workbench.pruning.sparse_training.axes import TERMS
from workbench.pruning.sparse_training.trained_masks import mask_in_force

if TYPE_CHECKING:
    from workbench.pruning.sparse_training.run import Course


@TERMS.add("none", formula="W", source="baseline")
def none(course: Course, options: Options) -> None:
    """No terms."""


class Rank(Options):
    rank: int = parameter(8, "rank of the terms", ge=1)


@TERMS.add("low-rank", formula="M * (W + B A)", source="Hu et al. 2021 (LoRA)", options=Rank)
def low_rank(course: Course, options: Rank) -> None:
    side_terms.add_low_rank(course.layers, options.rank, False, course.generator, off=course.late)


@TERMS.add("side-low-rank", formula="M * W + B A", source="Mozaffari et al. 2024 (SLoPe)", options=Rank)
def side_low_rank(course: Course, options: Rank) -> None:
    side_terms.add_low_rank(course.layers, options.rank, True, course.generator, off=course.late)


class Group(Options):
    group: int = parameter(16, "inputs that share a number", ge=1)


@TERMS.add("side-blocks", formula="M * W + S P^T", source="Huang et al. 2024 (AST)", options=Group)
def side_blocks(course: Course, options: Group) -> None:
    for layer in course.layers:
        mask = mask_in_force(layer)
        weight = (layer.original.mT if layer.transposed else layer.original).detach()
        whole = torch.ones_like(weight, dtype=torch.bool)
        side_terms.add_blocks(layer, whole if mask is None else mask, weight, options.group)


class Entries(Rank):
    entries: int = parameter(64, "free entries in a matrix", ge=1)
    support: str = parameter(
        "decomposition",
        "where the free entries lie: decomposition or random",
        pattern="^(decomposition|random)$",
    )


@TERMS.add(
    "side-low-rank+entries",
    formula="M * W + B A + S2",
    source="Chen et al. 2021 (DSEE)",
    options=Entries,
    traits="entries",
)
def side_entries(course: Course, options: Entries) -> None:
    for layer in course.layers:
        side_terms.add_entries(layer, options.rank, options.entries, options.support, course.generator)
    side_terms.add_low_rank(course.layers, options.rank, True, course.generator, off=course.late)
