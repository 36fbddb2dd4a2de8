"""Experts of a mixture: where they are, how many the configuration says, and models with fewer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import all_layers
from workbench.subjects.structure.skeleton import config_of, moved_axes, rebuilt, sliced

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k")


def expert_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that hold a router and its stack of experts, in forward order;
    `BadInput` when there is none.
    """
    found = []
    for layer in all_layers(model):
        path = layer.name.rsplit(".", 2)[0]
        if len(layer.shape) == 3 and path not in found:
            found.append(path)
    if not found:
        raise BadInput(f"pattern: experts: {type(model).__name__} has no stack of experts")
    return found


def expert_count(model: nn.Module) -> tuple[str, int]:
    """(configuration field, experts in a layer)."""
    config = config_of(model, "experts")
    for field in EXPERT_COUNTS:
        if isinstance(getattr(config, field, None), int):
            return field, getattr(config, field)
    raise BadInput(
        f"pattern: experts: the configuration of {type(model).__name__} has no number of experts "
        f"({', '.join(EXPERT_COUNTS)})"
    )


@torch.no_grad()
def shrink_experts(model: nn.Module, kept: Tensor) -> nn.Module:
    """The model without the experts that kept (layers with experts, experts) says False for;
    equally many stay everywhere.

    The router chooses among those left; it chooses all of them when fewer are left than it used to choose.
    """
    paths, (field, size) = expert_modules(model), expert_count(model)
    left = {int(n) for n in kept.sum(-1)}
    if len(left) != 1 or left == {0}:
        raise BadInput(
            f"kept: {sorted(left)} experts in different layers; "
            "the configuration has one number for all, at least 1"
        )
    config = copy.deepcopy(model.config)
    more = copy.deepcopy(config)
    setattr(more, field, size + 1)
    slices: dict[str, dict[int, Tensor]] = {}
    for name, axes in moved_axes(model, config, more).items():
        owner = next((i for i, path in enumerate(paths) if name.startswith(path + ".")), None)
        if owner is None:
            raise BadInput(
                f"pattern: experts of {type(model).__name__} cannot go: "
                f"{name} depends on their number and belongs to no layer of experts"
            )
        slices[name] = {axis: kept[owner].nonzero().flatten() for axis in axes}
    count = left.pop()
    setattr(config, field, count)
    for name in CHOSEN_EXPERTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), count))
    return rebuilt(model, config, sliced(model, slices))
