"""Biases that a model can have and this one has not: added as zeros, so that nothing changes but what may."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workbench.subjects.structure.units import discover

SWITCH = {"heads": "attention_bias", "neurons": "mlp_bias"}  # fields of configs of transformers


def can_be_given(model: nn.Module, kind: str) -> bool:
    """True when a saved model of this class with biases on a kind of group opens again."""
    config: Any = getattr(model, "config", None)
    if getattr(config, SWITCH[kind], None) is not False:  # it has no such switch, or biases already
        return False
    changed = type(config).from_dict({**config.to_dict(), SWITCH[kind]: True})
    with torch.device("meta"):
        expected = set(type(model)(changed).state_dict())
    added = {f"{name}.bias" for name in unbiased(model, kind)}
    return expected - set(model.state_dict()) == added


def unbiased(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Path -> matrix without a bias, of all groups of a kind."""
    names = {id(module): name for name, module in model.named_modules()}
    matrices = [member.layer.module for group in discover(model, (kind,)) for member in group.members]
    return {names[id(m)]: m for m in matrices if getattr(m, "bias", None) is None}


def give_biases(model: nn.Module, kind: str) -> None:
    """Zero biases for all groups of a kind, said in the configuration."""
    for module in unbiased(model, kind).values():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        module.register_parameter(
            "bias", nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        )
    setattr(model.config, SWITCH[kind], True)
