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
from workbench.subjects.checkpoint_files import one_line
from workbench.subjects.structure.channels import (
    channel_axes,
    channel_step,
    channels,
    shrink_channels,
)
from workbench.subjects.structure.depth import count_fields, shrink_layers, stacks
from workbench.subjects.structure.experts import expert_count, expert_modules, shrink_experts
from workbench.subjects.structure.removal import RECORD
from workbench.subjects.structure.skeleton import blank

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
    try:
        if kind == "channels":
            channel_axes(model)
        elif kind == "layers":
            count_fields(model)
        else:
            expert_modules(model)
            expert_count(model)
    except Exception as error:  # another library's constructor at another size: anything can be raised
        raise cannot(model, f"lose {kind}", error) from error


def try_shrinking(model: nn.Module, kind: str, left: int) -> None:
    """`BadInput` when the model's class has no such size: `left` of its units, on a model without numbers."""
    made = blank(model)
    if kind == "layers":
        sizes = [len(names) for names in stacks(made).values()]
        firsts = [sum(sizes[:at]) for at in range(len(sizes))]
        first = firsts + [at for at in range(sum(sizes)) if at not in firsts]
    else:
        first = list(range(extent(model, kind)[0]))
    kept = torch.zeros(len(first), dtype=torch.bool)
    kept[first[:left]] = True
    if kind == "experts":
        kept = kept.expand(len(expert_modules(made)), -1)
    try:
        SHRINK[kind](made, kept)
    except NotImplementedError:  # an operation that does not exist without numbers
        return
    except Exception as error:
        raise cannot(model, f"lose {kind}", error) from error


def cannot(model: nn.Module, what: str, error: Exception) -> BadInput:
    """What another library raised for a model, as one line that names its class; a `BadInput` as it is."""
    if isinstance(error, BadInput):
        return error
    return BadInput(
        f"pattern: {type(model).__name__} cannot {what} ({one_line(error)}); "
        "give another sparsity or another pattern"
    )


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
