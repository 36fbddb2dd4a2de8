"""Where input scales can be folded away: linear layers that read what one module gives, and that module.

    W x = (W diag(s)) (diag(1 / s) x)

A norm divides what it gives by s with its own scale (and bias), a linear layer with its rows. What only goes
to the readers can be scaled: a pre-norm model's norms, the values of attention with as many key as query
heads (a mixture of values is linear), and the up projection of a gated product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.quantization.rotation.fold import matrix_of, stream_of


@dataclass(frozen=True)
class ScaleGroup:
    """Layers that share one scale a feature.

    giver : the norm or linear layer whose `rows` of outputs they read;  readers : the layers
    inspected : the module whose outputs tell how good a scale is (Lin et al. 2023: attention, the
        feed-forward network, or the one reader of a linear layer)
    block : the block that all of them are in
    """

    giver: str
    readers: tuple[str, ...]
    inspected: str
    block: str
    rows: slice = field(default_factory=lambda: slice(None))
    norm: bool = True


def scale_groups(model: Any) -> list[ScaleGroup]:
    """The groups of a pre-norm causal language model, in the order in which they are called.

    Raises `BadInput` for a model whose norms feed the residual stream too.
    """
    names = {module: name for name, module in model.named_modules()}
    stream = stream_of(model)
    found = []
    for parts, (value, rows, output) in zip(stream.blocks, stream.heads, strict=True):
        block = names[parts[0][0]].rpartition(".")[0]
        for norm, readers, writer in parts:
            inside = tuple(names[reader] for reader in readers)
            found.append(ScaleGroup(names[norm], inside, inside[0].rpartition(".")[0], block))
            made = matrix_of(value)[rows]
            if writer is output and len(made) == matrix_of(output).shape[1]:
                found.append(linear_group(names[value], names[output], block, rows))
            elif writer is not output and len(readers) == 2:  # gate and up, multiplied
                found.append(linear_group(names[readers[-1]], names[writer], block, slice(None)))
    return found


def linear_group(giver: str, reader: str, block: str, rows: slice) -> ScaleGroup:
    return ScaleGroup(giver, (reader,), reader, block, rows, norm=False)


@torch.no_grad()
def fold(model: nn.Module, group: ScaleGroup, scale: Tensor) -> None:
    """Divide what the giver gives by `scale` (in,), positive, and multiply the readers' columns by it."""
    giver = model.get_submodule(group.giver)
    for name in ("weight", "bias"):
        tensor = getattr(giver, name, None)
        if tensor is None:
            continue
        if group.norm or name == "bias":
            tensor[group.rows].div_(scale)
        else:
            matrix_of(giver)[group.rows].div_(scale.unsqueeze(1))
    for name in group.readers:
        matrix_of(model.get_submodule(name)).mul_(scale)
