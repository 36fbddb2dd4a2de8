"""What a subject takes to store: every weight in the format that it is kept in, tied ones once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.subjects import Layer, LowRank, Mask, Subject, all_layers, gguf_files

#: Narrower first: the format a checkpoint was stored in is the first that holds all of its weights.
STORAGE = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Size:
    """Bytes of matrices (layers of `layers('*')`), of embeddings and of everything else."""

    matrix_bytes: float
    embedding_bytes: float
    other_bytes: float
    matrix_weights: int

    @property
    def bytes(self) -> float:
        return self.matrix_bytes + self.embedding_bytes + self.other_bytes

    @property
    def bits(self) -> float:
        """Bits a weight of the matrices, scales, zero points, masks and layers that stay included."""
        return 8 * self.matrix_bytes / max(self.matrix_weights, 1)


@torch.no_grad()
def storage_dtype(model: nn.Module, without: Collection[int] = ()) -> torch.dtype:
    """The narrowest of bfloat16, float16 and the weights' own type that holds every weight exactly: what the
    checkpoint was stored in, whatever it is computed in. Changes on weights are looked under, and weights
    with a number format of their own are left out.

    without : ids of further parameters that are left out
    """
    left = list(STORAGE)
    own = torch.float32
    formatted = {id(layer.original) for layer in all_layers(model) if has_format(layer)}
    for parameter in model.parameters():
        if id(parameter) in formatted or id(parameter) in without:
            continue
        own = parameter.dtype
        if own in STORAGE:
            return own
        left = [dtype for dtype in left if exact(parameter, dtype)]
        if not left:
            return own
    return left[0] if left else own


def exact(tensor: Tensor, dtype: torch.dtype, piece: int = 1 << 22) -> bool:
    """Whether a type holds every number of a tensor; looked at in pieces, so that nothing large is made."""
    return all(
        bool((part.to(dtype).to(part.dtype) == part).all()) for part in tensor.reshape(-1).split(piece)
    )


def has_format(layer: Layer) -> bool:
    """Whether a layer is stored in a number format of its own."""
    return any(change.stored_bytes(layer.shape, None) is not None for change in layer.changes)


def layer_bytes(layer: Layer, bits: int) -> float:
    """Bytes of one layer: in its number format where it has one, else in `bits` a weight; of a pruned one the
    entries that are left and a bitmap, where that is smaller; and the terms beside it in 16 bits.
    """
    changes = layer.changes
    masks = [change.mask for change in changes if isinstance(change, Mask)]
    kept = int(masks[0].sum()) if masks else None
    weights = layer.original.numel()
    found = [size for c in changes if (size := c.stored_bytes(layer.shape, kept)) is not None]
    if found:
        own = found[-1]
    else:
        own = weights * bits / 8
        if kept is not None:
            own = min(own, (kept * bits + weights) / 8)
    terms = sum(2 * (c.up.numel() + c.down.numel()) for c in changes if isinstance(c, LowRank))
    return own + terms


def size_of(on: Subject, bits: int | None = None, instead: Mapping[str, float] | None = None) -> Size:
    """The subject's size with `bits` a number for what has no format of its own (default: those of the type
    it is stored in, see `storage_dtype`). Weights that are shared are counted once, as embeddings where one
    of them is an embedding.

    instead : layer -> bytes that it is to take, whatever it takes now
    """
    model = on.model
    layers = all_layers(model)
    planned = instead or {}
    replaced = [id(layer.original) for layer in layers if layer.name in planned]
    wide = bits or 8 * storage_dtype(model, replaced).itemsize
    counted = {id(layer.original) for layer in layers}
    matrices = sum(planned.get(layer.name) or layer_bytes(layer, wide) for layer in layers)
    embeddings = other = 0.0
    held = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in held:
        for parameter in module.parameters():
            if id(parameter) not in counted:
                counted.add(id(parameter))
                embeddings += parameter.numel() * wide / 8
    inside = {id(p) for layer in layers for c in layer.changes for p in c.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in counted | inside:
            counted.add(id(parameter))
            other += parameter.numel() * wide / 8
    return Size(matrices, embeddings, other, sum(layer.original.numel() for layer in layers))


def gguf_size(file: Path) -> Size:
    """What a GGUF file stores, which is less than what its weights take once they are expanded."""
    matrix = embedding = other = 0.0
    weights = 0
    for tensor in gguf_files.opened(file).tensors:
        if len(tensor.shape) < 2:
            other += int(tensor.n_bytes)
        elif "embd" in tensor.name:
            embedding += int(tensor.n_bytes)
        else:
            matrix += int(tensor.n_bytes)
            weights += int(tensor.n_elements)
    return Size(matrix, embedding, other, weights)
