"""Changes to weights, as `torch.nn.utils.parametrize` parametrizations:
they compose, train through, can be undone or baked in.

A change is a module whose `change(weight)` maps a matrix (..., out, in) to a matrix of the same shape. Its
tensors are its buffers or parameters and its numbers are in `config()`, so a subject is saved as
safetensors + JSON and never pickled. The order along a weight is fixed by `order`:
low-rank terms first, then number formats, masks last, so zeros stay zeros.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.storage.resident import cloned, disk, empty_like, let_go

REGISTRY: dict[str, type[Change]] = {}


class Change(nn.Module):
    """One change of a weight. Subclasses implement `change`, and `config` when they hold numbers or strings.

    A subclass's constructor takes its tensors by the name they are registered under, then the entries
    of `config()`. `transposed` is set when the module stores its weight as (in, out), as GPT-2's Conv1D does.
    """

    order: ClassVar[int] = 50
    transposed: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.__name__] = cls

    def change(self, weight: Tensor) -> Tensor:  # (..., out, in) -> (..., out, in)
        raise TypeError(f"{type(self).__name__} has no change()")

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments other than tensors."""
        return {}

    def attached(self, module: nn.Module) -> None:
        """Called when the change is put on a weight of `module`;
        a change that also acts on activations hooks in here.
        """

    def restored(self, model: nn.Module) -> None:
        """Called when a saved change is on a model again; a change that needs more of the model than its
        module asks for it here.
        """

    def stored_bytes(self, shape: tuple[int, ...], kept: int | None) -> float | None:
        """Bytes of a weight (..., out, in) that is stored in this change's format, with `kept` entries where
        a mask leaves no more; None where the change does not say how a weight is stored.
        """
        return None

    def forward(self, weight: Tensor) -> Tensor:
        return self.change(weight.mT).mT if self.transposed else self.change(weight)


class Mask(Change):
    """Zeros where `mask` is False. Idempotent; gradients of pruned weights are zero."""

    order = 90
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())  # (..., out, in)

    def change(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class LowRank(Change):
    """Adds scale * up @ down, with up (..., out, rank) and down (..., rank, in), both trainable
    (Hu et al. 2021).
    """

    order = 10

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Parameter(up), nn.Parameter(down), scale

    def change(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).to(weight.dtype)

    def config(self) -> dict[str, Any]:
        return {"scale": self.scale}


def stacks_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of each changed weight, by the weight's name; empty where nothing is changed."""
    if not parametrize.is_parametrized(module):
        return {}
    # torch types what a module holds as Tensor | Module; `is_parametrized` has seen that it is a ModuleDict
    return dict(cast("Mapping[str, parametrize.ParametrizationList]", module.parametrizations).items())


def original_of(module: nn.Module, tensor: str) -> nn.Parameter:
    """The trainable tensor underneath a weight's changes, in the module's own orientation;
    the weight itself where it has none.
    """
    stack = stacks_of(module).get(tensor)
    # changes are put on parameters only, which torch keeps as parameters and types as Tensor | Module
    return cast("nn.Parameter", getattr(module, tensor) if stack is None else stack.original)


def holder_of(module: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """The module, and the name in it, of the parameter underneath a weight's changes."""
    stack = stacks_of(module).get(tensor)
    return (module, tensor) if stack is None else (stack, "original")


def restack(module: nn.Module, tensor: str, changes: Iterable[Change]) -> None:
    """Let a changed weight carry these changes, innermost first, and no others."""
    kept, stack = list(changes), stacks_of(module)[tensor]
    while len(stack):
        del stack[-1]
    stack.extend(kept)


def attach(module: nn.Module, tensor: str, change: Change, transposed: bool = False) -> None:
    """Add a change to a weight, at its place by `order` (replacing one of the same class)."""
    change.transposed = transposed
    change.attached(module)
    if not parametrize.is_parametrized(module, tensor):
        parametrize.register_parametrization(module, tensor, change, unsafe=True)
        return
    others = (c for c in changes_of(module, tensor) if type(c) is not type(change))
    restack(module, tensor, sorted([*others, change], key=lambda c: c.order))


def changes_of(module: nn.Module, tensor: str) -> list[Change]:
    """The changes on a weight, innermost first."""
    # what torch types as modules was put there by `attach`
    return cast("list[Change]", list(stacks_of(module).get(tensor, ())))


def detach(module: nn.Module, tensor: str, change: Change) -> None:
    """Take one change off a weight; the parameter underneath stays the same object, so an optimizer keeps it.

    The last change goes the way `bake` takes it: without touching the class that copies of the module share.
    """
    left = {name: [c for c in changes_of(module, name) if c is not change] for name in stacks_of(module)}
    if left[tensor]:
        restack(module, tensor, left[tensor])
        return
    originals = {name: original_of(module, name) for name in left}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, original in originals.items():
        module.register_parameter(name, original)
        for other in left[name]:
            attach(module, name, other, other.transposed)


def same_tensors(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: parameters and buffers by identity -> ones with the same memory and the same
    counter of writes. A parameter that several modules hold is left out, so that it stays theirs together,
    unless one of them is an embedding, whose weight is no layer's.

    The parameters are marked: `write` gives one memory of its own, so that the other model keeps what it has.
    Nothing else may write to them.
    """
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    words = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    found: dict[int, Any] = {id(b): b.detach() for b in model.buffers()}
    for parameter in model.parameters():
        if held[id(parameter)] == 1 or id(parameter) in words:
            made = nn.Parameter(parameter.detach(), parameter.requires_grad)
            made.shared = True  # type: ignore[attr-defined]
            found[id(parameter)] = made
    return found


def is_shared(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "shared", False))


@torch.no_grad()
def own_tensors(model: nn.Module) -> None:
    """Give every parameter and buffer that `same_tensors` left in another model's memory one of its own, so
    that anybody may write to them.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_shared(parameter):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(cloned(parameter), parameter.requires_grad)
                let_go([parameter])
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = cloned(buffer)


@torch.no_grad()
def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module's parameter these values: in its memory, or in new memory where it is shared."""
    parameter = getattr(module, name)
    if not is_shared(parameter):
        parameter.copy_(value)
        return
    made = empty_like(parameter)
    made.copy_(value)
    setattr(module, name, nn.Parameter(made, parameter.requires_grad))


@contextlib.contextmanager
def computed_once(model: nn.Module, limit: int = 64 << 20) -> Iterator[None]:
    """Inside, a changed weight is computed once and kept, while all of them together take no more than
    `limit` bytes; those of a larger model are computed at each use, little beside a product with many rows.
    """
    underneath = [original_of(module, name) for module in model.modules() for name in stacks_of(module)]
    small = sum(p.numel() * p.element_size() for p in underneath) <= limit
    with parametrize.cached() if small else contextlib.nullcontext():
        yield


def bake(model: nn.Module) -> nn.Module:
    """Replace every changed weight by its value, in place, so that no parametrization is left.

    Not by `remove_parametrizations`: it deletes the property from the module's class, which a deep copy
    shares with the model it was copied from, so baking a copy would break the original.
    """
    for module in list(model.modules()):
        if stacks := stacks_of(module):
            values = {tensor: getattr(module, tensor).detach() for tensor in stacks}
            trained = {tensor: original_of(module, tensor).requires_grad for tensor in stacks}
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for tensor, value in values.items():
                kept = value if disk() is None else cloned(value)
                module.register_parameter(tensor, nn.Parameter(kept, requires_grad=trained[tensor]))
    return model


def baked(model: nn.Module) -> nn.Module:
    """A copy to be read, whose changed weights are plain values; what is not changed it shares."""
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return bake(copy.deepcopy(model, shared))


def restoring(model: nn.Module) -> Iterator[Change]:
    """The changes that ask something of the whole model (`Change.restored`)."""
    for module in model.modules():
        for tensor in stacks_of(module):
            yield from (c for c in changes_of(module, tensor) if type(c).restored is not Change.restored)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, its parameters where a run's changed weights go."""
    place = disk()
    if place is None:
        return copy.deepcopy(model)
    known = {id(p): nn.Parameter(cloned(p), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, known)


def describe_changes(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Every change in the model as (JSON records, tensors):
    what a saved subject needs to attach them again.
    """
    records, tensors = [], {}
    for path, module in model.named_modules():
        for tensor in stacks_of(module):
            tensors[f"{path}.{tensor}.original"] = original_of(module, tensor).detach()
            for change in changes_of(module, tensor):
                key = f"{path}.{tensor}.{type(change).__name__}"
                state = change.state_dict()
                tensors |= {f"{key}.{name}": value for name, value in state.items()}
                records.append(
                    {
                        "module": path,
                        "tensor": tensor,
                        "change": type(change).__name__,
                        "transposed": change.transposed,
                        "config": change.config(),
                        "state": sorted(state),
                    }
                )
    return records, tensors


def made_again(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    """The change that a record of `describe_changes` tells of, with its tensors."""
    key = f"{record['module']}.{record['tensor']}.{record['change']}"
    state = {name: tensors[f"{key}.{name}"] for name in record["state"]}
    return REGISTRY[record["change"]](**state, **record["config"])


def restore_changes(model: nn.Module, records: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Attach saved changes to a model that holds the baked weights."""
    for record in records:
        path, tensor = record["module"], record["tensor"]
        module = model.get_submodule(path)
        change = made_again(record, tensors)
        attach(module, tensor, change, record["transposed"])
        change.restored(model)
        with torch.no_grad():
            original_of(module, tensor).copy_(tensors[f"{path}.{tensor}.original"])
