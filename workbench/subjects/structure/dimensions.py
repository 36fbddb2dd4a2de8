"""Dimensions of an architecture that its configuration names: hidden channels, layers, experts;
cut for the whole model at once.

Which axis of which parameter belongs to a dimension is found by building the stock class, without memory, at
another size and comparing shapes. The smaller model is the stock class built from the smaller configuration
with the kept slices loaded into it, so that configuration and weights agree by construction
and `from_pretrained` opens it as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import blocks
from workbench.subjects.changes import bake
from workbench.subjects.structure.channels import (
    channel_axes,
    channel_step,
    channels,
    shrink_channels,
)
from workbench.subjects.structure.depth import count_fields, shrink_layers
from workbench.subjects.structure.experts import expert_count, expert_modules, shrink_experts
from workbench.subjects.structure.removal import RECORD

SHRINK = {"channels": shrink_channels, "layers": shrink_layers, "experts": shrink_experts}


def extent(model: nn.Module, kind: str) -> tuple[int, int]:
    """(units, step in which they go): channels, blocks, or experts of one layer.
    `BadInput` when the model has none.
    """
    if kind == "channels":
        return channels(model), channel_step(model)
    if kind == "layers":
        return len(blocks(model)), 1
    expert_modules(model)
    return expert_count(model)[1], 1


def check_shrinkable(model: nn.Module, kind: str) -> None:
    """`BadInput` with the reason when the model's class or configuration cannot lose units of a dimension."""
    if kind == "channels":
        channel_axes(model)
    elif kind == "layers":
        count_fields(model)
    else:
        expert_modules(model)
        expert_count(model)


def shrink(model: nn.Module, kind: str, kept: Tensor) -> nn.Module:
    """A smaller model of the same class; masks and other changes are baked in first.
    `kept` as the three functions above say.

    `BadInput` for a model whose heads or neurons were removed in a way its configuration cannot say:
    cut dimensions first.
    """
    if getattr(model, RECORD, None):
        raise BadInput(
            f"pattern: {kind} have to go before heads or neurons: "
            "this model has removed some that its configuration cannot express"
        )
    model = bake(copy.deepcopy(model))
    return SHRINK[kind](model, kept.cpu())


def left_after(total: int, sparsity: float, step: int = 1, least: int = 1) -> int:
    """Units that stay: the multiple of `step` nearest to (1 - sparsity) x total, at least `least`."""
    return min(max(round((1 - sparsity) * total / step) * step, step, least), total)


def smallest_units(scores: Tensor, left: int) -> Tensor:
    """scores (..., units) -> kept (..., units): the `left` largest; among equals the later ones go last."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., : scores.shape[-1] - left], False)


def names_of(model: nn.Module, kind: str) -> Sequence[str]:
    """What the rows of a table of units are called."""
    return (
        [name for name, _ in blocks(model)]
        if kind == "layers"
        else expert_modules(model)
        if kind == "experts"
        else ["channels"]
    )
