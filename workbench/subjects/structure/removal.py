"""Physical removal: smaller matrices, and a checkpoint that opens to the same outputs.

Where the stock configuration can say what is left (equally many heads or neurons everywhere, and a head size
of its own), it is updated and `from_pretrained` opens the small model. Where it cannot (different widths by
layer; BERT's and GPT-2's head size is hidden size / heads), the checkpoint is written in the stock shapes
with zeros in the removed places, so that `transformers` computes the same outputs, and
`workbench.subject(folder)` removes them again from the record beside it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.changes import bake
from workbench.subjects.structure.skeleton import unlike
from workbench.subjects.structure.units import Group, Member, discover

RECORD = "_removed_structures"
Kept = dict[str, Tensor]  # group name -> bool (experts, units)
NEURON_FIELDS = (
    "intermediate_size",
    "d_ff",
    "n_inner",
    "ffn_dim",
    "hidden_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


def kept_lines(member: Member, kept: Tensor) -> Tensor:
    """Rows or columns of the member that stay, those of no unit included: (experts, lines)."""
    stays = torch.ones(len(kept), member.layer.shape[member.axis], dtype=torch.bool)
    for row, mine in zip(stays, kept, strict=True):
        row[member.index[~mine].flatten()] = False
    return torch.stack([row.nonzero().flatten() for row in stays])


def slice_member(member: Member, kept: Tensor) -> None:
    """Replace the member's matrix (and bias) by its kept lines, in the module's own orientation."""
    layer = member.layer
    lines = kept_lines(member, kept).to(layer.original.device)
    weight = layer.original.detach()
    axis = member.axis if not layer.transposed else (-2 if member.axis == -1 else -1)
    if weight.ndim == 3:
        small = torch.stack([w.index_select(axis, i) for w, i in zip(weight, lines, strict=True)])
    else:
        small = weight.index_select(axis, lines[0])
    setattr(
        layer.module,
        layer.tensor,
        nn.Parameter(small.contiguous(), requires_grad=layer.original.requires_grad),
    )
    if member.axis == -2 and layer.bias is not None and weight.ndim == 2:
        layer.module.bias = nn.Parameter(
            layer.bias.detach()[lines[0]].contiguous(), requires_grad=layer.bias.requires_grad
        )
    sizes = {"nf": -2, "out_features": -2, "nx": -1, "in_features": -1}
    for name, side in sizes.items():
        if side == member.axis and hasattr(layer.module, name):
            setattr(layer.module, name, small.shape[axis])


def resize_modules(group: Group, kept: Tensor) -> None:
    """The sizes that modules remember beside their matrices."""
    left = int(kept[0].sum())
    for module in group.modules:
        for owner in (module, getattr(module, "self", None)):
            if owner is None:
                continue
            for name in ("intermediate_size", "intermediate_dim") if group.kind == "neurons" else ():
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, left)
            if group.kind != "heads":
                continue
            for name in (*HEAD_COUNTS, "num_key_value_heads", "kv_heads"):
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, max(getattr(owner, name) * left // group.units, 1))
            if group.shared and isinstance(getattr(owner, "num_key_value_groups", None), int):
                owner.num_key_value_groups = left
            split = ("embed_dim",) if getattr(owner, "multi_query", False) else ()
            for name in ("all_head_size", "inner_dim", "split_size", *split):
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, getattr(owner, name) * left // group.units)
            table = getattr(owner, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding):
                table.weight = nn.Parameter(
                    table.weight.detach()[:, kept[0].to(table.weight.device)].contiguous()
                )
                table.embedding_dim = left


def remove(model: nn.Module, kept: Kept) -> nn.Module:
    """Remove, in place, the units that `kept` says False for; masks and other changes are baked in first.

    `BadInput` when a group would be left empty or a stack of experts would get unequal widths.
    """
    groups = {g.name: g for kind in ("heads", "neurons") for g in safe(model, kind)}
    for name, mask in kept.items():
        counts = mask.sum(-1)
        if name not in groups:
            raise BadInput(
                f"kept: {name!r} is no group of this model; groups look like {', '.join(list(groups)[:3])}"
            )
        if groups[name].norm and int(counts.min()) < groups[name].units:
            raise BadInput(norm_says(groups[name]))
        if int(counts.min()) < 1:
            raise BadInput(
                f"kept: {name} would be left without a unit; every attention and feed-forward keeps at "
                "least one"
            )
        if int(counts.min()) != int(counts.max()):
            raise BadInput(
                f"kept: the experts of {name} would keep different numbers of neurons; "
                "equally many are needed"
            )
    bake(model)
    for name, mask in kept.items():
        for member in groups[name].members:
            slice_member(member, mask)
        resize_modules(groups[name], mask)
    for kind in ("heads", "neurons"):
        mine = {n: m for n, m in kept.items() if groups[n].kind == kind}
        later = [g for n, g in groups.items() if kind == "heads" and n in kept and g.kind == "neurons"]
        if mine and not say_in_config(model, kind, safe(model, kind), mine, tensors_of(model, later)):
            record = getattr(model, RECORD, {})
            setattr(model, RECORD, record | {n: combined(record.get(n), m) for n, m in mine.items()})
    return model


def norm_says(group: Group) -> str:
    return (
        f"pattern: {group.norm!r} of {group.name} is a norm over all heads, so taking some out changes the "
        "others; give pattern.remove false, which masks them, or choose neurons"
    )


def safe(model: nn.Module, kind: str) -> list[Group]:
    try:
        return discover(model, (kind,))
    except BadInput:
        return []


def combined(earlier: list[list[bool]] | None, mask: Tensor) -> list[list[bool]]:
    """A second removal, in terms of the units the stock shapes have."""
    if earlier is None:
        return mask.tolist()
    found = []
    for before, now in zip(earlier, mask.tolist(), strict=True):
        remaining = iter(now)
        found.append([next(remaining) if was else False for was in before])
    return found


def tensors_of(model: nn.Module, groups: list[Group]) -> set[str]:
    """Names of the matrices and biases of groups."""
    layers = [member.layer for group in groups for member in group.members]
    mine = {id(part) for layer in layers for part in (layer.original, layer.bias) if part is not None}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in mine}


def say_in_config(model: nn.Module, kind: str, groups: list[Group], kept: Kept, aside: set[str]) -> bool:
    """Put the new sizes into `model.config` when a model of it has every tensor in its size now, those named
    in `aside` left out; True when it did.
    """
    config = getattr(model, "config", None)
    sizes = {g.units for g in groups}
    if config is None or len(sizes) != 1 or getattr(model, RECORD, None):
        return config is None
    left = sizes.pop()
    known, state = config.to_dict(), model.state_dict()
    if kind == "neurons":
        before = next(iter(kept.values())).shape[1]
        fields = [name for name in NEURON_FIELDS if name in known]
        equal = [name for name in fields if known[name] == before]
        for names in (*([name] for name in fields), equal):
            said = copy.deepcopy(config)
            for name in names:
                setattr(said, name, left)
            if names and not unlike(model, said, state, aside):
                for name in names:
                    setattr(config, name, left)
                return True
        return False
    if not own_head_size(model):
        return False
    said = copy.deepcopy(config)
    if "d_kv" not in known:
        said.head_dim = groups[0].members[1].index.shape[1]
    share = next(iter(kept.values())).shape[1]
    for name in (*HEAD_COUNTS, "num_key_value_heads"):
        if name in known and isinstance(known[name], int):
            setattr(said, name, max(known[name] * left // share, 1))
    if "num_decoder_heads" in known:
        said.num_decoder_heads = left
    if not accepted(said) or unlike(model, said, state, aside):
        return False
    for name, value in said.to_dict().items():
        if known.get(name) != value:
            setattr(config, name, value)
    return True


def accepted(config: Any) -> bool:
    """Whether transformers opens a configuration: Llama's wants heads that divide the hidden size,
    though its heads have a size of their own.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, StrictDataclassError):
        return False
    return True


def own_head_size(model: nn.Module) -> bool:
    """Whether the configuration can give the heads a size that does not follow from the hidden size."""
    config = getattr(model, "config", None)
    known = config.to_dict() if config is not None else {}
    return "head_dim" in known or "d_kv" in known or known.get("model_type") == "vit"


def stock(model: nn.Module) -> nn.Module:
    """A model of the stock shapes with the same outputs: zeros where units were removed.
    The model itself when nothing has to be filled.
    """
    record = getattr(model, RECORD, None)
    if not record:
        return model
    full = type(model)(copy.deepcopy(model.config)).to(next(model.parameters()).device)
    kinds = [k for k in ("heads", "neurons") if safe(full, k)]
    members: dict[str, list[tuple[Member, Tensor]]] = {}
    tables: dict[str, Tensor] = {}
    for group in discover(full, kinds):
        if group.name not in record:
            continue
        kept = torch.tensor(record[group.name])
        for member in group.members:
            members.setdefault(parameter_name(full, member.layer.original), []).append(
                (member, kept_lines(member, kept))
            )
            if member.axis == -2 and member.layer.bias is not None:
                members.setdefault(parameter_name(full, member.layer.bias), []).append(
                    (member, kept_lines(member, kept))
                )
        for module in group.modules:
            table = getattr(module, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding):
                tables[parameter_name(full, table.weight)] = kept[0]
    small = model.state_dict()
    with torch.no_grad():
        for name, target in full.state_dict(keep_vars=True).items():
            value = small[name]
            if name in tables:
                target.zero_()
                target[:, tables[name].to(target.device)] = value
            elif name not in members:
                target.copy_(value)
            else:
                target.zero_()
                fill(target, value, members[name])
    return full.eval()


def opens_again(model: nn.Module) -> None:
    """`BadInput` when a model of transformers has other tensors than one of its configuration, which is what
    opens a saved folder.
    """
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "config"):
        return
    if differs := unlike(model, model.config, model.state_dict()):
        raise BadInput(
            f"subject: {type(model).__name__} would not open again from its configuration: {differs}; "
            "keep the run, which makes it again"
        )


def fill(target: Tensor, value: Tensor, parts: list[tuple[Member, Tensor]]) -> None:
    """Write a small tensor into the kept rows and columns of a stock-shaped one."""
    for e in range(len(target) if target.ndim == 3 else 1):
        view, source = (target[e], value[e]) if target.ndim == 3 else (target, value)
        index = [torch.arange(n, device=target.device) for n in view.shape]
        for member, lines in parts:
            axis = (
                0
                if view.ndim == 1
                else (member.axis if not member.layer.transposed else (-2 if member.axis == -1 else -1)) % 2
            )
            index[axis] = lines[e if len(lines) > 1 else 0].to(target.device)
        view[torch.meshgrid(*index, indexing="ij")] = source


def parameter_name(model: nn.Module, parameter: Any) -> str:
    return next(name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter)


def record_of(model: nn.Module) -> dict[str, Any]:
    """What a saved subject must know to remove the same units again (JSON)."""
    return getattr(model, RECORD, {})


def again(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Remove, from a model of the stock shapes, what `record_of` wrote down."""
    return remove(model, {name: torch.tensor(kept) for name, kept in record.items()}) if record else model
