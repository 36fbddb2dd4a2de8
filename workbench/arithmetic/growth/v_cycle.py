"""The maps of a V-cycle: a model made smaller by means of its units, and larger again by copies of them.

F averages units that are put together, T gives each its copy back, and F T = 1: what is made larger and
smaller again is what it was. So it is with R and G, which do the same to blocks.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from workbench.arithmetic.growth.growth import built, config_of
from workbench.arithmetic.growth.width import FIELDS, input_axis, parts_of, tied_head, tiled
from workbench.arithmetic.sources import block_of
from workbench.errors import BadInput
from workbench.subjects.structure.depth import count_fields, stacks
from workbench.subjects.structure.skeleton import skeleton


def interpolated(before: Tensor, after: Tensor, alpha: float = 0.25) -> Tensor:
    """(1 - alpha) before + alpha after: the large model's own weights keep its copies from staying alike."""
    return (1 - alpha) * before + alpha * after


@torch.no_grad()
def coalesced(model: nn.Module, width: int, depth: int) -> nn.Module:
    """The class at a `width`-th of its width and a `depth`-th of its blocks: units that lie the small width
    apart are averaged where they are given and summed where they are read, neighbouring blocks averaged.
    Embeddings that are the head too are summed, as the authors do.
    """
    config, lists = config_of(model), stacks(model)
    named = config.to_dict()
    for field in FIELDS:
        if isinstance(value := named.get(field), int):
            setattr(config, field, divided(field, value, width))
    for path, field in count_fields(model).items():
        setattr(config, field, divided(field, len(lists[path]), depth))
    shapes, tied = skeleton(model, config), bool(tied_head(model))
    sums: dict[str, list[Tensor]] = {}
    for name, value in model.state_dict().items():
        small = renumbered(name, depth)
        if small not in shapes:
            raise BadInput(f"method: {type(model).__name__} at another size has no {small}")
        scale = width if tied and is_embedding(model, name) else 1
        sums.setdefault(small, []).append(scale * joined(model, name, value, shapes[small]))
    return built(model, config, {name: torch.stack(each).mean(0) for name, each in sums.items()})


def divided(field: str, value: int, times: int) -> int:
    if value % times:
        raise BadInput(f"width: {field} is {value}, which {times} does not divide; give another multiple")
    return value // times


def renumbered(name: str, depth: int) -> str:
    """The name of the block that a block goes into."""
    block = block_of(name)
    path, _, number = block.rpartition(".")
    return f"{path}.{int(number) // depth}{name.removeprefix(block)}" if block else name


def is_embedding(model: nn.Module, name: str) -> bool:
    """Whether a tensor is looked up, or is the head that shares such a one."""
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Embedding) or name == tied_head(model)


def joined(model: nn.Module, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor at its smaller shape."""
    inward = input_axis(model, name, value)
    if name == tied_head(model):
        inward = None
    for axis, size in enumerate(shape):
        if value.shape[axis] == size:
            continue
        parts = 1 if axis == inward else parts_of(name)
        apart = value.unflatten(axis, (parts, -1, size // parts))
        value = (apart.sum(axis + 1) if axis == inward else apart.mean(axis + 1)).flatten(axis, axis + 1)
    return value


@torch.no_grad()
def interpolated_model(large: nn.Module, small: nn.Module, width: int, depth: int, alpha: float) -> nn.Module:
    """The large model drawn towards the small one made large again: (1 - alpha) of its weights, alpha of the
    copies.
    """
    made = copy.deepcopy(large)
    held, tied = small.state_dict(), tied_head(large)
    for name, value in made.state_dict().items():
        source = renumbered(name, depth)
        if source not in held:
            continue
        own = held[source]
        if name == tied or (tied and is_embedding(large, name)):
            grown = torch.cat([own] * width, 1) / width
        else:
            grown = tiled(small, source, own, tuple(value.shape), own, 0.0)
        value.copy_(interpolated(value, grown, alpha))
    return made
