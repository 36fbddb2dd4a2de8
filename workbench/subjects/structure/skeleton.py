"""The stock class at another size: shapes without memory, which axes move with a field of the configuration,
and the model built anew with slices of the old weights in it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.checkpoints import quiet_transformers
from workbench.subjects.subject import plain_experts

Axes = dict[str, tuple[int, ...]]  # parameter -> its axes that run along the dimension


SKELETONS: dict[
    tuple[type, str], dict[str, tuple[int, ...]]
] = {}  # the few shapes that one cut asks for several times


def skeleton(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and saved buffers that the model's class has for a configuration;
    no memory is taken.
    """
    key = (type(model), config.to_json_string(use_diff=False))
    if key not in SKELETONS:
        while len(SKELETONS) >= 32:
            SKELETONS.pop(next(iter(SKELETONS)))
        with torch.device("meta"), quiet_transformers():
            made = type(model)(config)
        SKELETONS[key] = {name: tuple(value.shape) for name, value in made.state_dict(keep_vars=True).items()}
    return SKELETONS[key]


def config_of(model: nn.Module, kind: str) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise BadInput(
            f"pattern: {kind} are cut by the model's transformers configuration, "
            f"and {type(model).__name__} has none; use rows or columns instead"
        )
    return config


def moved_axes(model: nn.Module, before: Any, after: Any) -> Axes:
    """Axes whose length differs between two configurations."""
    old, new = skeleton(model, before), skeleton(model, after)
    found = {}
    for name, shape in old.items():
        moved = tuple(
            axis for axis, (a, b) in enumerate(zip(shape, new.get(name, shape), strict=True)) if a != b
        )
        if moved:
            found[name] = moved
    return found


def sliced(model: nn.Module, slices: dict[str, dict[int, Tensor]]) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        for axis, index in slices.get(name, {}).items():
            value = value.index_select(axis, index.to(value.device))
        state[name] = value
    return state


def rebuilt(model: nn.Module, config: Any, state: dict[str, Tensor]) -> nn.Module:
    """The stock class of another configuration with a state loaded; every parameter must be there and fit."""
    parameter = next(model.parameters())
    with quiet_transformers():
        made = type(model)(config)
    made = made.to(device=parameter.device, dtype=parameter.dtype)
    made.load_state_dict(state, strict=True)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return plain_experts(made).train(model.training)
