"""The axis of growth: how a larger model of the same class is made from a small one's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.axis import Axis
from workbench.errors import BadInput
from workbench.subjects.checkpoints import quiet_transformers
from workbench.subjects.layers import plain_experts
from workbench.subjects.structure.skeleton import unlike

#: `entry(model, times, options)` gives the grown model; the one given, which has no changes on its weights,
#: stays as it is. Traits: "preserving" where the grown model answers what the small one does; "width" or
#: "depth", what is multiplied.
GROWTH = Axis(
    "growth",
    "how a larger model is made from a small one's weights",
    found_in="workbench.arithmetic.growth",
    home="grow.method",
)


def config_of(model: nn.Module) -> Any:
    """A copy of the model's configuration; `BadInput` for a model without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise BadInput(
            f"method: {type(model).__name__} has no transformers configuration that could say its new size; "
            "growth needs one"
        )
    return copy.deepcopy(config)


def built(model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The model's class at another configuration, with these tensors; `BadInput` where they do not fit."""
    if differs := unlike(model, config, state):
        raise BadInput(
            f"method: {type(model).__name__} cannot grow so: its configuration does not say what it becomes, "
            f"{differs}"
        )
    parameter = next(model.parameters())
    with quiet_transformers():
        made = type(model)(config).to(device=parameter.device, dtype=parameter.dtype)
    made.load_state_dict(dict(state), strict=True)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return plain_experts(made).train(model.training)


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
