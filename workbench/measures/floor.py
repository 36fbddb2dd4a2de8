"""The floor of a divergence: the model against itself with the rounding noise of the type it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.measures.reference import Comparison, Reference
from workbench.measures.size import storage_dtype
from workbench.progress import Progress
from workbench.subjects.subject import Subject


@torch.no_grad()
def jittered(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Move every weight, in place, by a number drawn evenly from half a spacing of `dtype` below it to half a
    spacing above: the weights that storing in this type cannot tell from these. Where a parameter is itself
    of that type and holds nothing in between, one in twelve moves by a whole spacing, up or down, which has
    the same variance. Shared weights move once.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        flat = parameter.view(-1) if parameter.is_contiguous() else None
        for part in [parameter] if flat is None else flat.split(1 << 22):
            draw = torch.rand(part.shape, generator=generator, dtype=torch.float32).to(part.device) - 0.5
            if torch.finfo(part.dtype).eps >= torch.finfo(dtype).eps:
                draw = torch.where(draw.abs() > 0.5 - 1 / 24, draw.sign(), 0.0)
            part.add_((draw * spacing(part, dtype)).to(part.dtype))
    return model


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a type at each value: eps times the power of two below it."""
    exponent = torch.frexp(values.float()).exponent - 1
    return torch.where(values == 0, 0.0, torch.finfo(dtype).eps * exponent.float().exp2())


def floor_of(reference: Reference, progress: Progress | None = None, seed: int = 0) -> Comparison | None:
    """The reference against a copy of its model whose weights moved within their storage's rounding."""
    on = reference.on
    copy = on.copy()
    moved = Subject(
        f"{on.name}, jittered",
        jittered(copy.model, storage_dtype(on.model), seed),
        on.task,
        on.splits,
        fingerprint=None,
    )
    return reference.against(moved, progress, seed)
