"""Coupled structures: which rows and columns of which matrices belong to one head or one feed-forward neuron.

A *group* is one attention or one feed-forward module; its *units* are heads (with grouped queries:
a key-value head and its query heads) or neurons. Removing a unit removes rows of the matrices that produce it
and columns of the one that consumes it. Modules are recognised by the names of their projections, which
covers the stock transformers classes; a stack of experts is a feed-forward group in which every expert keeps
its own neurons, equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.changes import Mask
from workbench.subjects.layers import Layer, all_layers

# query, key, value, output: paths below the module that holds them all
ATTENTION = (
    ("self.query", "self.key", "self.value", "output.dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q", "k", "v", "o"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
)
# producers, consumer
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("intermediate.dense",), "output.dense"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("lin1",), "lin2"),
)
HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Member:
    """Part of a unit in one matrix: `index[u]` are the rows (axis -2) or columns (axis -1) of unit u."""

    layer: Layer
    axis: int
    index: Tensor  # (units, width), long


@dataclass
class Group:
    """All units of one module, or of several modules whose units are tied together."""

    name: str
    kind: str
    units: int
    experts: int
    members: list[Member]
    modules: list[nn.Module] = field(default_factory=list)
    #: the norm over the queries or keys of all heads together, which removing some would change
    norm: str = ""
    #: query heads that share one key and one value, which stay
    shared: bool = False

    @property
    def consumers(self) -> list[Member]:
        return [m for m in self.members if m.axis == -1]

    def weights_per_unit(self) -> int:
        """Weights (of one expert) that go with one unit."""
        return sum(m.index.shape[1] * m.layer.shape[-1 if m.axis == -2 else -2] for m in self.members)

    def unit_scores(self, scores: dict[str, Tensor], members: Sequence[Member] | None = None) -> Tensor:
        """Sum of the weights' scores in every unit: (experts, units)."""
        total = torch.zeros(self.experts, self.units)
        for member in members or self.members:
            lines = (
                scores[member.layer.name].sum(-1 if member.axis == -2 else -2).reshape(self.experts, -1)
            )  # (experts, rows or columns)
            total += lines[:, member.index.to(lines.device)].sum(-1).cpu()
        return total

    def mask(self, kept: Tensor) -> None:
        """Put masks on all members for kept (experts, units); earlier masks stay in force."""
        for member in self.members:
            experts, size = self.experts, member.layer.shape[member.axis]
            lines = torch.ones(experts, size, dtype=torch.bool)
            for e in range(experts):
                lines[e, member.index[~kept[e]].flatten()] = False
            lines = lines if len(member.layer.shape) == 3 else lines[0]
            mask = (lines.unsqueeze(-1) if member.axis == -2 else lines.unsqueeze(-2)).expand(
                member.layer.shape
            )
            mask = mask.to(member.layer.original.device)
            for change in member.layer.changes:
                if isinstance(change, Mask):
                    mask = mask & change.mask
            member.layer.attach(Mask(mask.contiguous()))

    def alive(self) -> Tensor:
        """(experts, units): False for units whose consumer columns are all zero already."""
        live = torch.zeros(self.experts, self.units, dtype=torch.bool)
        for member in self.consumers:
            columns = (member.layer.weight.detach() != 0).any(-2).reshape(self.experts, -1).cpu()
            live |= columns[:, member.index].any(-1)
        return live


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None. Asked of every module for every known form,
    so without `get_submodule`'s exceptions.
    """
    found: nn.Module | None = module
    for part in path.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def ranges(units: int, width: int, offset: int = 0) -> Tensor:
    return offset + torch.arange(units * width).reshape(units, width)


def head_size(module: nn.Module, model: nn.Module) -> int | None:
    for owner in (module, child(module, "self")):
        for name in HEAD_SIZE:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    config = getattr(model, "config", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return width // heads if heads and width else None


def attention_group(name: str, module: nn.Module, model: nn.Module, layers: dict[int, Layer]) -> Group | None:
    for form in ATTENTION:
        found = [child(module, path) for path in form]
        parts = [layers.get(id(m)) for m in found]
        if any(p is None for p in parts) or not (size := head_size(module, model)):
            continue
        query, key, value, output = (p for p in parts if p is not None)
        if query is key:
            units, members = fused_heads(query, size, getattr(module, "multi_query", None))
            shared = bool(getattr(module, "multi_query", False))
        else:
            keys = getattr(getattr(model, "config", None), "num_key_value_heads", None)
            shared = keys == 1 and key.shape[-2] == size < query.shape[-2]
            units = (query if shared else key).shape[-2] // size  # key-value heads, with their query heads
            members = [Member(query, -2, ranges(units, query.shape[-2] // units))]
            if not shared:
                members += [Member(part, -2, ranges(units, size)) for part in (key, value)]
        members.append(Member(output, -1, ranges(units, output.shape[-1] // units)))
        norm = norm_over_heads(module, {query.shape[-2], key.shape[-2]} - {size})
        return Group(name, "heads", units, 1, members, [module], norm, shared)
    return None


def fused_heads(layer: Layer, size: int, multi_query: bool | None) -> tuple[int, list[Member]]:
    """Units and rows of one matrix that makes queries, keys and values.

    GPT-2 keeps all queries, all keys, all values. GPTBigCode, which says whether it is `multi_query`, keeps
    each head's three together, or all queries before the one key and value that they share.
    """
    if multi_query:
        units = layer.shape[-2] // size - 2
        return units, [Member(layer, -2, ranges(units, size))]
    units = layer.shape[-2] // (3 * size)
    if multi_query is False:
        return units, [Member(layer, -2, ranges(units, 3 * size))]
    thirds = [ranges(units, size, part * units * size) for part in range(3)]
    return units, [Member(layer, -2, torch.cat(thirds, 1))]


def norm_over_heads(module: nn.Module, widths: set[int]) -> str:
    """The name of a norm inside an attention whose statistics are those of all heads (OLMo 2), or nothing."""
    for name, inner in module.named_children():
        weight = getattr(inner, "weight", None)
        wide = isinstance(weight, Tensor) and weight.ndim == 1 and len(weight) in widths
        if wide and "norm" in type(inner).__name__.lower() and name[0] in "qk":
            return name
    return ""


def feed_forward_group(
    name: str, module: nn.Module, layers: dict[int, Layer], stacks: dict[str, Layer]
) -> Group | None:
    up, down = stacks.get(f"{name}.gate_up_proj"), stacks.get(f"{name}.down_proj")
    if up is not None and down is not None:  # gate and up in one stack of experts
        units = down.shape[-1]
        both = torch.cat([ranges(units, 1), ranges(units, 1, units)], 1)
        return Group(
            name,
            "neurons",
            units,
            down.shape[0],
            [Member(up, -2, both), Member(down, -1, ranges(units, 1))],
            [module],
        )
    for producers, consumer in FEED_FORWARD:
        ins = [layers.get(id(child(module, path))) for path in producers]
        out = layers.get(id(child(module, consumer)))
        if out is None or any(p is None for p in ins):
            continue
        units = out.shape[-1]
        members = [Member(p, -2, ranges(units, 1)) for p in ins if p is not None and p.shape[-2] == units]
        if len(members) == len(ins):
            return Group(name, "neurons", units, 1, [*members, Member(out, -1, ranges(units, 1))], [module])
    return None


def discover(model: nn.Module, kinds: Sequence[str] = ("heads", "neurons")) -> list[Group]:
    """All groups of the asked kinds, in forward order. `BadInput` when the model has none that is
    recognised.
    """
    every = all_layers(model)
    layers = {id(layer.module): layer for layer in every if layer.tensor == "weight"}
    stacks = {layer.name: layer for layer in every if len(layer.shape) == 3}
    found: list[Group] = []
    for name, module in model.named_modules():
        group = attention_group(name, module, model, layers) if "heads" in kinds else None
        if group is not None:
            found.append(group)
        group = feed_forward_group(name, module, layers, stacks) if "neurons" in kinds else None
        if group is not None and group.units > 0:
            found.append(group)
    found = tie_position_biases(found)
    for kind in kinds:
        if kind in ("heads", "neurons") and not any(g.kind == kind for g in found):
            raise BadInput(
                f"pattern: {kind} were not recognised in {type(model).__name__}; "
                "use a pattern of rows, columns or blocks instead"
            )
    return found


def tie_position_biases(groups: list[Group]) -> list[Group]:
    """T5 adds one position bias, made in the first block, to all self-attentions of a stack:
    their heads go together.

    The cross-attentions share a bias of zeros in the same way.
    """
    if not any(hasattr(m, "relative_attention_bias") for g in groups for m in g.modules):
        return groups
    tied: dict[str, Group] = {}
    for group in groups:
        if group.kind != "heads":
            tied[group.name] = group
            continue
        stack, role = group.name.split(".block.")[0], group.name.rsplit(".", 1)[-1]
        key = f"{stack}.*.{role}"
        if key in tied:
            tied[key].members += group.members
            tied[key].modules += group.modules
        else:
            tied[key] = replace(group, name=key, members=list(group.members), modules=list(group.modules))
    return list(tied.values())
