"""Whole blocks: lists of them, the fields of the configuration that count them, models without some."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import blocks
from workbench.subjects.structure.skeleton import config_of, rebuilt, skeleton


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Path of each list of blocks -> the paths of its blocks, in forward order."""
    found: dict[str, list[str]] = {}
    for name, _ in blocks(model):
        found.setdefault(name.rsplit(".", 1)[0], []).append(name)
    return found


def count_fields(model: nn.Module) -> dict[str, str]:
    """Path of each list of blocks -> the configuration field that counts it;
    `BadInput` when there is none.
    """
    config = config_of(model, "layers")
    sizes = {path: len(names) for path, names in stacks(model).items()}
    if not sizes:
        raise BadInput(f"pattern: layers: {type(model).__name__} has no repeated blocks")
    found: dict[str, str] = {}
    for field, value in config.to_dict().items():
        if (
            ("layers" not in field and field != "n_layer")
            or not isinstance(value, int)
            or value not in sizes.values()
        ):
            continue
        longer = copy.deepcopy(config)
        lengthen(longer, value)
        setattr(longer, field, value + 1)
        shapes = skeleton(model, longer)
        for path, size in sizes.items():
            if any(name.startswith(f"{path}.{size}.") for name in shapes):
                found.setdefault(path, field)
    if missing := sorted(set(sizes) - set(found)):
        raise BadInput(
            f"pattern: layers of {type(model).__name__} cannot go: "
            f"no field of its configuration counts {missing[0]}"
        )
    return found


def lengthen(config: Any, size: int) -> None:
    """Repeat the last entry of every list that has one entry for each layer."""
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == size and "layer" in field:
            setattr(config, field, [*value, value[-1]])


@torch.no_grad()
def shrink_layers(model: nn.Module, kept: Tensor) -> nn.Module:
    """The model without the blocks that kept (blocks,) says False for (an encoder's before a decoder's)."""
    fields, lists = count_fields(model), stacks(model)
    config = copy.deepcopy(config_of(model, "layers"))
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise BadInput("pattern: layers cannot go: the configuration scales attention by the layer's number")
    renamed: dict[str, str] = {}
    at = 0
    for path, names in lists.items():
        stay = [i for i in range(len(names)) if bool(kept[at + i])]
        at += len(names)
        if not stay:
            raise BadInput(f"kept: no block of {path} would be left; every list of blocks keeps at least one")
        setattr(config, fields[path], len(stay))
        renamed |= {f"{path}.{old}.": f"{path}.{new}." for new, old in enumerate(stay)}
        if len(lists) == 1:
            for field, value in config_of(model, "layers").to_dict().items():
                if isinstance(value, list) and len(value) == len(names) and "layer" in field:
                    setattr(config, field, [value[i] for i in stay])
    state = {}
    for name, value in model.state_dict().items():
        prefix = next(
            (
                f"{path}.{name.removeprefix(path + '.').split('.')[0]}."
                for path in lists
                if name.startswith(path + ".")
            ),
            "",
        )
        if (
            "relative_attention_bias" in name or not prefix
        ):  # T5's table sits in the first block and serves all of them
            state[name] = value
        elif prefix in renamed:
            state[renamed[prefix] + name.removeprefix(prefix)] = value
    return rebuilt(model, config, state)
