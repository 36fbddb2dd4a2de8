"""Dimensions of an architecture that its configuration names: hidden channels, layers, experts;
cut for the whole model at once.

Which axis of which parameter belongs to a dimension is found by building the stock class, without memory, at
another size and comparing shapes. The smaller model is the stock class built from the smaller configuration
with the kept slices loaded into it, so that configuration and weights agree by construction
and `from_pretrained` opens it as it is.

Where BERT and GPT-2 tie a head's size to hidden size / heads, the heads are turned into their principal axes
first (queries with keys, values with outputs; an identity as long as nothing is cut)
and lose their last axes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects import all_layers, blocks
from workbench.subjects.changes import bake
from workbench.subjects.checkpoints import quiet_transformers
from workbench.subjects.structure.removal import HEAD_COUNTS, RECORD, own_head_size, parameter_name
from workbench.subjects.structure.units import Group, Member, discover
from workbench.subjects.subject import plain_experts

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k")
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


# ---- channels ----------------------------------------------------------------------------------------------
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
        config.head_dim = (
            group.members[1].index.shape[1]
            if len(group.members) > 2
            else group.members[0].index.shape[1] // 3
        )
    if getattr(config, "n_inner", 0) is None:
        config.n_inner = 4 * config.n_embd
    return config


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
    wider = copy.deepcopy(config)
    wider.hidden_size = config.hidden_size + 2 * channel_step(model)
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
    if len(group.members) == 2:
        size = first.index.shape[1] // 3
        return [(first, part) for part in first.index.split(size, 1)] + [(last, last.index)]
    parts = [(m, m.index) for m in group.members]
    if len({index.shape[1] for _, index in parts}) > 1:
        raise BadInput(
            f"pattern: channels cannot go: {group.name} has grouped queries and no head size of its own"
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
    config = fixed_config(model)
    config.hidden_size = left
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


# ---- layers ------------------------------------------------------------------------------------------------
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


# ---- experts -----------------------------------------------------------------------------------------------
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


# ---- all three ---------------------------------------------------------------------------------------------
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
