"""What became of every tensor of a checkpoint: used, renamed (the prefix of a wrapper), new (a head for the
task) or left over (another head's); anything else is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from workbench.errors import BadInput
from workbench.subjects.checkpoint_files import adapter_in, one_whole

#: endings of tensors that no output depends on: tables that are computed again, states of optimizers
TABLES = re.compile(
    r"(^|[._])(inv_freq|position_ids|masked_bias|causal_mask|cos_cached|sin_cached|relative_position_index"
    r"|num_batches_tracked|_extra_state|exp_avg|exp_avg_sq|momentum_buffer|[kv]_scale|total_ops"
    r"|total_params)$"
)


def account(source: str, model: nn.Module, report: dict[str, Any], new: bool) -> list[str]:
    """What there is to say of tensors that are not simply used: new and left over ones; `BadInput` for
    others that are missing, of another shape, or that the blocks of the class have no use for.
    """
    kind = type(model).__name__
    told: list[str] = []
    left = sorted(report["unexpected_keys"])
    if part := adapter_in(left):
        raise BadInput(f"subject: {source!r} holds an adapter ({part}), {one_whole()}")
    for name, given, wanted in sorted(report["mismatched_keys"], key=str):
        raise BadInput(
            f"subject: {name} is {list(given)} in the file and {list(wanted)} by config.json; "
            "give the config that the weights were saved with"
        )
    missing = sorted(report["missing_keys"])
    poolers = [name for name in missing if "pooler" in name.split(".")]
    heads = [name for name in missing if name not in poolers]
    body = trunk_names(model) if new and heads else set()
    lost = [name for name in heads if not new or name in body]
    if lost:
        raise BadInput(
            f"subject: {source!r} lacks {lost[0]} ({len(lost)} missing in all), "
            f"which {kind} needs; copy or save it again"
        )
    if heads:
        told.append(f"the head of {kind} is new and untrained: {listed(heads)}")
    if poolers:
        told.append(f"the pooler is new and untrained: {listed(poolers)}")
    names = set(model.state_dict())
    for name in left:
        if (sibling := sibling_of(name, names)) is not None:
            raise BadInput(
                f"subject: {source!r} holds {name}, a block that config.json does not name (it ends before "
                f"{sibling}); give the number of blocks that the weights hold"
            )
    trunk = getattr(model, "base_model_prefix", "") + "."
    unused = [name for name in left if is_inside(name, names - set(missing), trunk)]
    if unused:
        raise BadInput(
            f"subject: {source!r} holds {listed(unused)} in modules of {kind} that do not use them, so it "
            "would compute something else; config.json names another class or other settings than the "
            "weights were saved with: give theirs"
        )
    if left:
        told.append(f"left over: {listed(left)}")
    return told


def trunk_names(model: nn.Module) -> set[str]:
    """The model's tensors that are no head's: those under its trunk's prefix, and those that the class
    without a head has by the same name.
    """
    import transformers

    trunk = getattr(model, "base_model_prefix", "") + "."
    found = {name for name in model.state_dict() if name.startswith(trunk)}
    try:
        with torch.device("meta"):
            bare = transformers.AutoModel.from_config(model.config)
    except Exception:  # another library's code: there is no such class
        return found
    return found | (set(bare.state_dict()) & set(model.state_dict()))


def is_inside(name: str, names: set[str], trunk: str) -> bool:
    """Whether a leftover tensor belongs to a block or a module that the model has filled from the checkpoint
    (`names`; the trunk's prefix may be there or not), and is no table that is computed again.
    """
    if TABLES.search(name):
        return False
    for form in {name, trunk + name, name.removeprefix(trunk)}:
        parts = form.split(".")
        owner = ".".join(parts[:-1]) + "."
        own = any(each.startswith(owner) and "." not in each[len(owner) :] for each in names)
        if own and len(parts) > 1:
            return True
        if parts[-1] == "bias":  # of a module without weights: the causal mask of older checkpoints
            continue
        counted = [place for place, part in enumerate(parts) if part.isdigit()]
        block = ".".join(parts[: counted[0] + 1]) + "." if counted else ""
        if block and any(each.startswith(block) for each in names):
            return True
    return False


def sibling_of(name: str, names: set[str]) -> str | None:
    """The part of a leftover name that counts a block, when the model has that tensor in another block."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if not part.isdigit():
            continue
        before, after = ".".join(parts[:place]), ".".join(parts[place + 1 :])
        pattern = re.compile(rf"(?:.*\.)?{re.escape(before)}\.\d+\.{re.escape(after)}$")
        same = any(pattern.match(each) for each in names)
        here = re.compile(rf"(?:.*\.)?{re.escape(before)}\.{part}\.")
        if same and not any(here.match(each) for each in names):
            return ".".join(parts[: place + 1])
    return None


def listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
