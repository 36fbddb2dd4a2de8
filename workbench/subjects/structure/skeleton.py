"""The stock class at another size: shapes without memory, which axes move with a field of the configuration,
and the model built anew with slices of the old weights in it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.checkpoint_files import one_line
from workbench.subjects.checkpoints import quiet_transformers
from workbench.subjects.layers import plain_experts

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


def unlike(model: nn.Module, config: Any, state: Mapping[str, Tensor], aside: Container[str] = ()) -> str:
    """What keeps a state from being the one of the model's class at a configuration, as a clause: the class
    cannot be built, or the first tensor that only one of them has or that has another shape there. "" when
    they agree on all but the names `aside`.
    """
    try:
        wanted = skeleton(model, config)
    except Exception as error:  # another library's constructor: anything can be raised
        return f"{type(model).__name__} cannot be built from it ({one_line(error)})"
    for name in sorted({*wanted, *state}):
        if name in aside:
            continue
        if name not in state:
            return f"{name} is missing"
        if name not in wanted:
            return f"it has no place for {name}"
        if wanted[name] != tuple(state[name].shape):
            return f"{name} is {list(state[name].shape)} and has to be {list(wanted[name])}"
    return ""


def blank(model: nn.Module) -> nn.Module:
    """The stock class of a model's configuration without memory."""
    with torch.device("meta"), quiet_transformers():
        return plain_experts(type(model)(copy.deepcopy(config_of(model, "units"))))


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
    """The stock class of another configuration with a state loaded; `BadInput` when a tensor does not fit."""
    if differs := unlike(model, config, state):
        raise BadInput(
            f"pattern: {type(model).__name__} cannot lose these: its configuration cannot say what is left, "
            f"{differs}; give another sparsity or another pattern"
        )
    parameter = next(model.parameters())
    weightless = torch.device("meta") if parameter.is_meta else contextlib.nullcontext()
    with quiet_transformers(), weightless:
        made = type(model)(config)
    made = made.to(device=parameter.device, dtype=parameter.dtype)
    made.load_state_dict(state, strict=True)
    if (stored := getattr(model, "stored_dtype", None)) is not None:
        made.stored_dtype = stored
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return plain_experts(made).train(model.training)
