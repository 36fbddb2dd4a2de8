"""Terms that stand beside a sparse weight, after its mask: W' = W * M + term.
The sparse weight and the term are stored apart.

A low-rank term *under* the mask (`LowRank`) is merged without losing a zero; the terms here are not merged:
they keep a few dense or scattered parameters next to a matrix whose zeros stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.pruning.pattern import smallest
from workbench.subjects import Change, Layer
from workbench.subjects.changes import LowRank


class SideLowRank(LowRank):
    """Adds up @ down after the mask; `blend` 0 keeps it out and still, 1 lets it in
    (SLoPe's lazy adapters, Mozaffari et al. 2024).
    """

    order = 95
    blend: Tensor

    def __init__(self, up: Tensor, down: Tensor, blend: Tensor | None = None, scale: float = 1.0) -> None:
        super().__init__(up, down, scale)
        self.register_buffer("blend", torch.ones((), device=up.device) if blend is None else blend)

    def change(self, weight: Tensor) -> Tensor:
        return weight + self.blend * self.scale * (self.up @ self.down).to(weight.dtype)


class SideBlocks(Change):
    """SLoRB of AST (Huang et al. 2024): Y += (X P) S^T with P fixed,
    the sum over every `group` consecutive inputs; S is (..., out, groups).

    On the weight: every input of a group gets its output's S.
    """

    order = 95

    def __init__(self, sums: Tensor, group: int) -> None:
        super().__init__()
        self.sums, self.group = nn.Parameter(sums), group

    def change(self, weight: Tensor) -> Tensor:
        return weight + self.sums.repeat_interleave(self.group, -1)[..., : weight.shape[-1]].to(weight.dtype)

    def config(self) -> dict[str, Any]:
        return {"group": self.group}


def block_means(weight: Tensor, mask: Tensor, group: int) -> Tensor:
    """SLoRB's start: the mean over each group of inputs of what the mask removes,
    (..., out, ceil(in / group)).

    Of all constants added to a group this one is the nearest to the removed weights in the least squares
    of the dense weight, counting the kept ones as zeros.
    """
    lost = torch.where(mask, 0.0, weight)
    padded = nn.functional.pad(lost, (0, -weight.shape[-1] % group))
    sums = padded.unflatten(-1, (-1, group)).sum(-1)
    ones = nn.functional.pad(
        torch.ones(weight.shape[-1], device=weight.device), (0, -weight.shape[-1] % group)
    ).unflatten(0, (-1, group))
    return sums / ones.sum(-1)


class SideEntries(Change):
    """DSEE's S2 (Chen et al. 2021): a few free entries on a fixed support.
    `places` (entries,) count through the flattened matrix.
    """

    order = 94
    places: Tensor

    def __init__(self, places: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places)
        self.values = nn.Parameter(values)  # (entries,)

    def change(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_add(0, self.places, self.values.to(weight.dtype)).reshape(weight.shape)


def low_rank_plus_sparse(
    matrix: Tensor, rank: int, entries: int, rounds: int = 20
) -> tuple[Tensor, Tensor, list[float]]:
    """matrix = low rank + sparse + rest: the best rank-`rank` part of what is not in S,
    then the `entries` largest of the rest, in turns.

    GoDec's alternation (Zhou and Tao 2011), which DSEE's greedy variant approximates; both steps are exact
    minimisers, so the squared rest never rises. Returns low (out, in), places (entries,) of the support,
    and the squared rest after each round.
    """
    sparse = torch.zeros_like(matrix)
    low, rests = sparse, []
    places = torch.arange(entries, device=matrix.device)
    for _ in range(rounds):
        u, s, v = torch.linalg.svd(matrix - sparse, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ v[:rank]
        rest = matrix - low
        places = rest.flatten().abs().topk(entries).indices
        sparse = (
            torch.zeros_like(matrix)
            .flatten()
            .index_copy(0, places, rest.flatten()[places])
            .reshape(matrix.shape)
        )
        rests.append(float((matrix - low - sparse).square().sum()))
        if len(rests) > 1 and rests[-2] - rests[-1] <= 1e-6 * rests[-2]:
            break
    return low, places, rests


def add_low_rank(
    layers: Sequence[Layer], rank: int, beside: bool, generator: torch.Generator, off: bool = False
) -> None:
    """Adapters on every layer: `up` zero, `down` normal / sqrt(in);
    under the mask, or beside it (`off`: not yet let in).
    """
    for layer in layers:
        *stack, out, width = layer.shape
        size, device = min(rank, out, width), layer.original.device
        down = (torch.randn(*stack, size, width, generator=generator) / width**0.5).to(device)
        up = torch.zeros(*stack, out, size, device=device)
        layer.attach(
            SideLowRank(up, down, torch.zeros((), device=device) if off else None)
            if beside
            else LowRank(up, down)
        )


def lazy_share(done: int, steps: int, lazy: float) -> float:
    """Share of the lazy adapters' own steps, the last `lazy` of all, that is ahead after `done` of `steps`:
    1 when they enter, 0 before.
    """
    ahead = 1 - done / steps
    return min(ahead / lazy, 1.0) if 0 < ahead <= lazy + 1e-9 else 0.0


def let_in(layers: Sequence[Layer]) -> None:
    """Switch on the lazy adapters."""
    for layer in layers:
        for change in layer.changes:
            if isinstance(change, SideLowRank):
                change.blend.fill_(1.0)


def side_parameters(layers: Sequence[Layer]) -> int:
    """Numbers stored beside the sparse weights."""
    return sum(p.numel() for layer in layers for c in layer.changes if c.order > 90 for p in c.parameters())


def add_blocks(layer: Layer, mask: Tensor, weight: Tensor, group: int) -> None:
    layer.attach(SideBlocks(block_means(weight, mask, group), group))


def add_entries(layer: Layer, rank: int, entries: int, support: str, generator: torch.Generator) -> None:
    """S2 at zero, on the support of the frozen weight's own decomposition or on a random one."""
    weight = layer.weight.detach()
    count = min(entries, weight.numel())
    if support == "random":
        keys = torch.rand(weight.numel(), generator=generator)
        places = smallest(keys, count).nonzero().flatten().to(weight.device)
    else:
        places = low_rank_plus_sparse(weight, min(rank, *weight.shape), count)[1]
    layer.attach(SideEntries(places, torch.zeros(count, device=weight.device)))
