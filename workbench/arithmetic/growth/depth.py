"""Depth: more blocks, copies of those that are there, or ones that do nothing yet."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from workbench.arithmetic.growth.growth import GROWTH, built, config_of
from workbench.axis import Options
from workbench.errors import BadInput
from workbench.subjects.structure.depth import count_fields, stacks
from workbench.subjects.structure.units import discover


@GROWTH.add(
    "stack",
    formula="blocks 1..L, 1..L, ... k times",
    source="Du et al. 2024, Stacking Your Transformers, section 3 (G_stack); Gong et al. 2019",
    title="Stacking",
    traits="depth",
)
def stack(model: nn.Module, times: int, options: Options) -> nn.Module:
    """The whole list of blocks, again and again."""
    return deepened(model, times, lambda count: [i % count for i in range(times * count)])


@GROWTH.add(
    "interpolation",
    formula="blocks 1, 1, ..., 2, 2, ..., each k times",
    source="Chang et al. 2018; Pan et al. 2024, Apollo, section 3",
    title="Interpolated depth",
    traits="depth",
)
def interpolation(model: nn.Module, times: int, options: Options) -> nn.Module:
    """Every block beside its copies."""
    return deepened(model, times, lambda count: [i // times for i in range(times * count)])


@GROWTH.add(
    "zero-blocks",
    formula="each block, then k - 1 copies of it whose output projections are zero",
    source="Du et al. 2024, G_zero by depth; Shen et al. 2022",
    title="Zero-initialised depth",
    traits=("preserving", "depth"),
)
def zero_blocks(model: nn.Module, times: int, options: Options) -> nn.Module:
    """Of a pre-norm model the new blocks add nothing at first. A post-norm block norms its input again."""
    made = deepened(model, times, lambda count: [i // times for i in range(times * count)])
    new = tuple(f"{name}." for names in stacks(made).values() for i, name in enumerate(names) if i % times)
    with torch.no_grad():
        for group in discover(made):
            for member in group.consumers:
                if not member.layer.name.startswith(new):
                    continue
                member.layer.original.zero_()
                if member.layer.bias is not None:
                    member.layer.bias.zero_()
    return made


def deepened(model: nn.Module, times: int, order: Callable[[int], list[int]]) -> nn.Module:
    """The class with `times` as many blocks; `order(count)` says which old block each new one copies."""
    config = config_of(model)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise BadInput(
            "method: the configuration scales attention by the block's number; it cannot grow deeper"
        )
    lists, fields = stacks(model), count_fields(model)
    for path, names in lists.items():
        chosen = order(len(names))
        for field, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == len(names) and "layer" in field:
                setattr(config, field, [value[i] for i in chosen])
        setattr(config, fields[path], len(chosen))
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path = next((p for p in lists if name.startswith(f"{p}.")), "")
        if not path:
            state[name] = value
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        for new, old in enumerate(order(len(lists[path]))):
            shared = "relative_attention_bias" in rest and new > 0  # T5's first block has it for all of them
            if old == int(number) and not shared:
                state[f"{path}.{new}.{rest}"] = value
    return built(model, config, state)


def stacking_tokens(parameters: float, flops: float) -> float:
    """Tokens to train the small model on before it is stacked fourfold, by the published guideline:
    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (Du et al. 2024, eq. 5), N the large model's parameters,
    C the FLOPs of the whole run. Its constants are of that study's models and data.
    """
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
