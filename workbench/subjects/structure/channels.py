"""Channels of the residual stream, cut for the whole model at once.

Where BERT and GPT-2 tie a head's size to hidden size / heads, the heads are turned into their principal axes
first (queries with keys, values with outputs; an identity as long as nothing is cut)
and lose their last axes.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.structure.removal import HEAD_COUNTS, own_head_size, parameter_name
from workbench.subjects.structure.skeleton import Axes, config_of, moved_axes, rebuilt, skeleton, sliced
from workbench.subjects.structure.units import Group, Member, discover


def channels(model: nn.Module) -> int:
    """Width of the residual stream."""
    size = getattr(config_of(model, "channels"), "hidden_size", None)
    if not isinstance(size, int):
        raise BadInput(
            "pattern: channels need a configuration with one hidden_size, "
            f"and that of {type(model).__name__} has none"
        )
    return size


def channel_step(model: nn.Module) -> int:
    """Channels go in such numbers: transformers asks for a hidden size that the heads divide."""
    config = config_of(model, "channels")
    return next(
        (int(getattr(config, name)) for name in HEAD_COUNTS if isinstance(getattr(config, name, None), int)),
        1,
    )


def fixed_config(model: nn.Module) -> Any:
    """A copy of the configuration in which what would follow from the hidden size is said by itself,
    where there is a field for it.
    """
    config = copy.deepcopy(config_of(model, "channels"))
    if own_head_size(model):
        group = discover(model, ("heads",))[0]
        fused = len(group.members) == 2 and not group.shared
        config.head_dim = (
            group.members[0].index.shape[1] // 3
            if fused
            else group.members[0 if group.shared else 1].index.shape[1]
        )
    if getattr(config, "n_inner", 0) is None:
        config.n_inner = 4 * config.n_embd
    return config


EMBEDDING_SIZES = ("word_embed_proj_dim", "embedding_size")


def at_width(model: nn.Module, config: Any, size: int) -> Any:
    """A copy of the configuration at another hidden size. Embeddings of the hidden size stay so where they
    would need a projection otherwise (OPT, ELECTRA).
    """
    said = copy.deepcopy(config)
    said.hidden_size = size
    if set(skeleton(model, said)) != set(skeleton(model, config)):
        for field in EMBEDDING_SIZES:
            if getattr(config, field, None) == config.hidden_size:
                setattr(said, field, size)
    return said


def head_axes(model: nn.Module) -> Axes:
    """Axes of the attention matrices that run inside the heads."""
    found: dict[str, set[int]] = {}
    for group in discover(model, ("heads",)):
        for member in group.members:
            axis = (member.axis if not member.layer.transposed else -3 - member.axis) % 2
            found.setdefault(parameter_name(model, member.layer.original), set()).add(axis)
            if member.axis == -2 and member.layer.bias is not None:
                found.setdefault(parameter_name(model, member.layer.bias), set()).add(0)
    return {name: tuple(axes) for name, axes in found.items()}


def channel_axes(model: nn.Module) -> tuple[Axes, Axes]:
    """(axes that run along the residual stream, axes that run inside heads whose size follows from it).

    `BadInput` when an axis grows with the hidden size without being of that length,
    or when the model scales by a function of it.
    """
    config = fixed_config(model)
    if any(float(getattr(m, "embed_scale", 1.0)) != 1.0 for m in model.modules()):
        raise BadInput(
            f"pattern: channels of {type(model).__name__} cannot go: "
            "its embeddings are scaled by the square root of the hidden size"
        )
    wider = at_width(model, config, config.hidden_size + 2 * channel_step(model))
    moved, shapes, heads = moved_axes(model, config, wider), skeleton(model, config), head_axes(model)
    residual, inner = {}, {}
    for name, axes in moved.items():
        inner[name] = tuple(a for a in axes if a in heads.get(name, ()))
        residual[name] = tuple(a for a in axes if a not in inner[name])
        if any(shapes[name][a] != config.hidden_size for a in residual[name]):
            raise BadInput(
                f"pattern: channels of {type(model).__name__} cannot go: "
                f"{name} has an axis that depends on the hidden size in another way"
            )
    inner = {name: axes for name, axes in inner.items() if axes}
    if inner and any("rotary" in name for name, _ in model.named_modules()):
        raise BadInput(
            f"pattern: channels of {type(model).__name__} cannot go: "
            "its head size follows from the hidden size and carries rotary positions"
        )
    return {name: axes for name, axes in residual.items() if axes}, inner


def principal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a (d, n), b (d, m) -> the pair with the same a^T b whose rows are its singular directions,
    largest first.
    """
    left, right = torch.linalg.qr(a.T), torch.linalg.qr(b.T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T)
    return (left.Q @ u * s.sqrt()).T, (right.Q @ vh.T * s.sqrt()).T


def projections(group: Group) -> list[tuple[Member, Tensor]]:
    """(member, rows or columns (heads, size)) of queries, keys, values and outputs, fused or not."""
    first, last = group.members[0], group.members[-1]
    if group.shared:
        raise BadInput(
            f"pattern: channels cannot go: the heads of {group.name} share one key and one value and have no "
            "size of their own; give pattern heads, neurons or layers"
        )
    if len(group.members) == 2:
        size = first.index.shape[1] // 3
        return [(first, part) for part in first.index.split(size, 1)] + [(last, last.index)]
    parts = [(m, m.index) for m in group.members]
    if len({index.shape[1] for _, index in parts}) > 1:
        raise BadInput(
            f"pattern: channels cannot go: {group.name} has grouped queries and no head size of its own; "
            "give pattern heads, neurons or layers"
        )
    return parts


@torch.no_grad()
def align_heads(model: nn.Module) -> None:
    """Turn every head into its principal axes, in place: queries with keys (biases included),
    values with outputs. Computes the same.
    """
    for group in discover(model, ("heads",)):
        query, key, value, output = projections(group)
        matrices = {
            id(m.layer): m.layer.weight.detach().double().clone() for m, _ in (query, key, value, output)
        }
        biases = {
            id(m.layer): m.layer.bias.detach().double().clone()
            for m, _ in (query, key, value)
            if m.layer.bias is not None
        }

        def rows(
            part: tuple[Member, Tensor],
            head: int,
            matrices: dict[int, Tensor] = matrices,
            biases: dict[int, Tensor] = biases,
        ) -> Tensor:
            member, index = part
            weight, bias = matrices[id(member.layer)], biases.get(id(member.layer))
            return (
                weight[index[head]]
                if bias is None
                else torch.cat([weight[index[head]], bias[index[head], None]], 1)
            )

        def put(
            part: tuple[Member, Tensor],
            head: int,
            new: Tensor,
            matrices: dict[int, Tensor] = matrices,
            biases: dict[int, Tensor] = biases,
        ) -> None:
            member, index = part
            width = matrices[id(member.layer)].shape[1]
            matrices[id(member.layer)][index[head]] = new[:, :width]
            if id(member.layer) in biases:
                biases[id(member.layer)][index[head]] = new[:, width]

        for head in range(group.units):
            new_query, new_key = principal(rows(query, head), rows(key, head))
            columns = output[1][head]
            new_value, new_output = principal(rows(value, head), matrices[id(output[0].layer)][:, columns].T)
            for part, new in ((query, new_query), (key, new_key), (value, new_value)):
                put(part, head, new)
            matrices[id(output[0].layer)][:, columns] = new_output.T
        for member, _ in (query, key, value, output):
            member.layer.write(matrices[id(member.layer)].to(member.layer.original.dtype))
            if id(member.layer) in biases:
                assert member.layer.bias is not None
                member.layer.bias.copy_(biases[id(member.layer)])


@torch.no_grad()
def shrink_channels(model: nn.Module, kept: Tensor) -> nn.Module:
    """The model without the channels that kept (hidden,) says False for."""
    size, left = len(kept), int(kept.sum())
    if left % channel_step(model) or not left:
        raise BadInput(f"kept: {left} channels; the {channel_step(model)} heads must divide their number")
    residual, inner = channel_axes(model)
    config = at_width(model, fixed_config(model), left)
    work = copy.deepcopy(model)
    state = work.state_dict(keep_vars=True)
    gone = (~kept).nonzero().flatten()
    for name, axes in residual.items():  # what is cut must not turn the heads' axes
        for axis in axes:
            state[name].index_fill_(axis, gone.to(state[name].device), 0)
    slices: dict[str, dict[int, Tensor]] = {
        name: {axis: kept.nonzero().flatten() for axis in axes} for name, axes in residual.items()
    }
    if inner:
        align_heads(work)
        for group in discover(work, ("heads",)):
            parts = projections(group)
            before = parts[0][1].shape[1]
            after = before * left // size
            scaled = getattr(config, "scale_attn_weights", True)
            if scaled:  # scores are divided by the root of the head size
                query, index = parts[0]
                scale_rows(query, index, math.sqrt(after / before))
            for member in group.members:
                mine = (
                    torch.cat([index[:, :after].flatten() for m, index in parts if m is member]).sort().values
                )
                axis = (member.axis if not member.layer.transposed else -3 - member.axis) % 2
                slices.setdefault(parameter_name(work, member.layer.original), {})[axis] = mine
                if member.axis == -2 and member.layer.bias is not None:
                    slices.setdefault(parameter_name(work, member.layer.bias), {})[0] = mine
    if getattr(
        config, "scale_decoder_outputs", False
    ):  # T5 divides the last hidden state by the root of the hidden size
        state["decoder.final_layer_norm.weight"].mul_(math.sqrt(left / size))
    return rebuilt(work, config, sliced(work, slices))


def scale_rows(member: Member, index: Tensor, factor: float) -> None:
    weight = member.layer.weight.detach().clone()
    weight[index.flatten()] *= factor
    member.layer.write(weight)
    if member.layer.bias is not None:
        member.layer.bias[index.flatten()] *= factor
