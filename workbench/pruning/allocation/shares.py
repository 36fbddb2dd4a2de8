"""Allocations: how a total sparsity is shared among layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.axis import Options, parameter
from workbench.pruning.axes import SPARSITY_ALLOCATION
from workbench.pruning.engine import structures
from workbench.pruning.engine.structures import Asked
from workbench.pruning.pattern import NM, Tiles, cheapest, reduce, sizes, smallest
from workbench.subjects import Layer, Subject


class Allocation:
    """Base of the axis's entries: single weights are shared out by `shares`, heads and neurons by `counts`.

    Traits "weights" and "structures" say which of the two there is; "across layers": scores of different
    layers are compared. `within` is the comparison group inside a layer, see `pattern.tile_mask`.
    """

    within: ClassVar[str] = "matrix"

    @staticmethod
    def shares(
        layers: Sequence[Layer],
        scores: Mapping[str, Tensor],
        pattern: Tiles | NM,
        sparsity: float,
        options: Any,
    ) -> dict[str, float]:
        """Layer name -> sparsity, with the asked total over all layers."""
        return uniform(layers, sparsity)

    @staticmethod
    def counts(asked: Asked, options: Any) -> list[int]:
        """Units that each group loses."""
        return structures.uniform(asked.scored, asked.sparsity)

    @staticmethod
    def check(prune: Any, options: Any) -> None:
        """Raise `BadInput` when the settings of a pruning leave this allocation no sense."""

    @staticmethod
    def reached(dense: Subject, small: Subject, split: str, options: Any) -> dict[str, float]:
        """Facts of the model whose units have been taken out."""
        return {}


@SPARSITY_ALLOCATION.add(
    "row", formula="s in every row", source="Sun et al. 2023 (Wanda)", traits=("weights", "structures")
)
class Row(Allocation):
    within = "row"


@SPARSITY_ALLOCATION.add(
    "layer", formula="s in every layer", source="baseline", traits=("weights", "structures")
)
class Uniform(Allocation):
    pass


@SPARSITY_ALLOCATION.add(
    "global",
    formula="one threshold over all layers",
    source="Lee et al. 2019 (SNIP); standardised scores: An et al. 2024 (FLAP)",
    traits=("weights", "structures", "across layers"),
)
class Global(Allocation):
    within = "stack"

    @staticmethod
    def shares(
        layers: Sequence[Layer],
        scores: Mapping[str, Tensor],
        pattern: Tiles | NM,
        sparsity: float,
        options: Any,
    ) -> dict[str, float]:
        return global_threshold(layers, scores, pattern, sparsity)

    @staticmethod
    def counts(asked: Asked, options: Any) -> list[int]:
        return structures.across(asked.scored, asked.sparsity, asked.saliency)


@SPARSITY_ALLOCATION.add(
    "erdos-renyi",
    formula="density ~ (in + out) / (in x out)",
    source="Mocanu et al. 2018; Evci et al. 2020",
    traits="weights",
)
class ErdosRenyi(Allocation):
    @staticmethod
    def shares(
        layers: Sequence[Layer],
        scores: Mapping[str, Tensor],
        pattern: Tiles | NM,
        sparsity: float,
        options: Any,
    ) -> dict[str, float]:
        return erdos_renyi(layers, sparsity)


class Amplitude(Options):
    amplitude: float = parameter(0.1, "how far a block's sparsity moves from the mean", ge=0, le=1)


@SPARSITY_ALLOCATION.add(
    "adaptive",
    formula="s_b = s - amplitude x importance of the block",
    source="Wang et al. 2025 (Adapt-Pruner)",
    needs="inputs",
    options=Amplitude,
    traits="structures",
    beside={"method": "adapt-pruner", "pattern": "heads"},
)
class Adaptive(Allocation):
    @staticmethod
    def counts(asked: Asked, options: Amplitude) -> list[int]:
        return structures.adaptive(asked.scored, asked.sparsity, options.amplitude, asked.calibration)


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
    layers: Sequence[Layer], scores: Mapping[str, Tensor], pattern: Tiles | NM, sparsity: float
) -> dict[str, float]:
    """The sparsities that one threshold over all units' mean scores leaves in each layer."""
    tiles = pattern.tiles
    parts = []
    for layer in layers:
        weights = sizes(tiles, layer.shape)
        means = reduce(scores[layer.name], tiles).cpu() / weights
        parts.append((means.flatten(), weights.flatten()))
    if tiles.single:
        values = torch.cat([v for v, _ in parts])
        drop = smallest(values, round(sparsity * len(values)))
    else:
        drop = cheapest(torch.cat([v for v, _ in parts]), torch.cat([w for _, w in parts]), sparsity)
    found, at = {}, 0
    for layer, (values, weights) in zip(layers, parts, strict=True):
        mine = drop[at : at + len(values)]
        found[layer.name] = float(weights[mine].sum() / weights.sum())
        at += len(values)
    return found
