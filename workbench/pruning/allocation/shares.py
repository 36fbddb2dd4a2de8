"""Allocations: how a total sparsity is shared among layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.pruning.pattern import NM, Tiles, cheapest, reduce, sizes
from workbench.subjects import Layer

ALLOCATIONS = ("row", "layer", "global", "erdos-renyi")


def uniform(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    return {layer.name: sparsity for layer in layers}


def erdos_renyi(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Densities proportional to (in + out) / (in x out), scaled to the total and capped at 1
    (Mocanu et al. 2018; Evci et al. 2020).
    """
    count = torch.tensor([float(layer.original.numel()) for layer in layers], dtype=torch.float64)
    shape = torch.tensor(
        [(sum(layer.shape[-2:])) / (layer.shape[-1] * layer.shape[-2]) for layer in layers],
        dtype=torch.float64,
    )
    budget = (1 - sparsity) * count.sum()
    dense = torch.zeros(len(layers), dtype=torch.bool)
    while True:
        scale = (budget - count[dense].sum()) / (count * shape)[~dense].sum()
        over = ~dense & (scale * shape > 1)
        if not bool(over.any()):
            break
        dense |= over
    density = torch.where(dense, 1.0, scale * shape)
    return {layer.name: float(1 - d) for layer, d in zip(layers, density, strict=True)}


def global_threshold(
    layers: Sequence[Layer], scores: dict[str, Tensor], pattern: Tiles | NM, sparsity: float
) -> dict[str, float]:
    """The sparsities that one threshold over all units' mean scores leaves in each layer."""
    tiles = pattern if isinstance(pattern, Tiles) else Tiles(1, 1)
    parts = []
    for layer in layers:
        weights = sizes(tiles, layer.shape)
        means = reduce(scores[layer.name], tiles).cpu() / weights
        parts.append((means.flatten(), weights.flatten()))
    if tiles.single:
        values = torch.cat([v for v, _ in parts])
        from workbench.pruning.pattern import smallest

        drop = smallest(values, round(sparsity * len(values)))
    else:
        drop = cheapest(torch.cat([v for v, _ in parts]), torch.cat([w for _, w in parts]), sparsity)
    found, at = {}, 0
    for layer, (values, weights) in zip(layers, parts, strict=True):
        mine = drop[at : at + len(values)]
        found[layer.name] = float(weights[mine].sum() / weights.sum())
        at += len(values)
    return found


def allocate(
    kind: str, layers: Sequence[Layer], scores: dict[str, Tensor], pattern: Tiles | NM, sparsity: float
) -> dict[str, float]:
    """Layer name -> sparsity, with the asked total over all layers (each by itself for `row` and `layer`)."""
    if isinstance(pattern, NM) or kind in ("row", "layer"):
        return uniform(layers, sparsity)
    if kind == "erdos-renyi":
        return erdos_renyi(layers, sparsity)
    return global_threshold(layers, scores, pattern, sparsity)
