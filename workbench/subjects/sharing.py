"""Models that share their tensors: a copy costs nothing until a weight of it is written.

A parameter of such a copy is marked, and `write` gives it memory of its own, so that the other model keeps
what it has. Nothing else may write to a marked parameter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


def same_tensors(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: parameters and buffers by identity -> ones with the same memory and the same
    counter of writes. A parameter that several modules hold is left out, so that it stays theirs together,
    unless one of them is an embedding, whose weight is no layer's.
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
def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module's parameter these values: in its memory, or in new memory where it is shared."""
    parameter = getattr(module, name)
    if not is_shared(parameter):
        parameter.copy_(value)
        return
    made = torch.empty_like(parameter)
    made.copy_(value)
    setattr(module, name, nn.Parameter(made, parameter.requires_grad))
