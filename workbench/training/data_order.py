"""The order in which examples are visited: a pure function of (size, seed, position),
so resuming needs no saved generator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from workbench.errors import BadInput


@functools.lru_cache(8)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of one pass over `size` examples: (size,) int64. Never change it in place, it is shared."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator)


def take(size: int, seed: int, position: int, count: int) -> Tensor:
    """Examples number `position` to `position + count` of the endless stream of shuffled passes:
    (count,) int64.

    Passes follow each other without a gap, so any batch size, a changing one included,
    sees every example equally often.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(position, size)
        part = permutation(size, seed, epoch)[offset : offset + count]
        parts.append(part)
        position, count = position + len(part), count - len(part)
    return torch.cat(parts)


class DataOrder(Protocol):
    """Which examples a step takes."""

    def take(self, size: int, position: int, count: int) -> Tensor:
        """Indices (count,) int64 of `count` examples of `size`, after `position` of them were taken."""


@dataclass(frozen=True)
class Stream:
    """Shuffled passes one after the other without a gap: `take`."""

    seed: int = 0

    def take(self, size: int, position: int, count: int) -> Tensor:
        return take(size, self.seed, position, count)


@dataclass
class WholeBatches:
    """Shuffled passes, all drawn from one generator; what is left of a pass below a whole batch is skipped.

    The batch size must stay as it is.
    """

    seed: int = 0
    _passes: list[Tensor] = field(default_factory=list, repr=False)
    _generator: torch.Generator | None = field(default=None, repr=False)

    def take(self, size: int, position: int, count: int) -> Tensor:
        count = min(count, size)
        number, place = divmod(position // count, size // count)
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        while len(self._passes) <= number:
            self._passes.append(torch.randperm(size, generator=self._generator))
        return self._passes[number][place * count : (place + 1) * count]


@dataclass
class Draws:
    """Every batch drawn anew, with replacement, from one generator. The batch size must stay as it is."""

    seed: int = 0
    _drawn: int = 0
    _generator: torch.Generator | None = field(default=None, repr=False)

    def take(self, size: int, position: int, count: int) -> Tensor:
        if self._generator is None or position < self._drawn:
            self._generator, self._drawn = torch.Generator().manual_seed(self.seed), 0
        while self._drawn < position:
            self._drawn += len(torch.randint(size, (count,), generator=self._generator))
        self._drawn += count
        return torch.randint(size, (count,), generator=self._generator)


class StreamBatchSampler(Sampler[list[int]]):
    """The same order for a `torch.utils.data.DataLoader(dataset, batch_sampler=...)` or any other loop.

    `batch_size` may be set between batches (the batch-size rules do); `position` is all the state there is.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, epochs: float = 1.0, position: int = 0
    ) -> None:
        if size < 1 or batch_size < 1:
            raise BadInput(
                f"batch_size: {batch_size} of {size} examples cannot be drawn; both must be at least 1"
            )
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, position
        self.total = round(epochs * size)

    def __iter__(self) -> Iterator[list[int]]:
        while self.position < self.total:
            count = min(self.batch_size, self.total - self.position)
            chosen = take(self.size, self.seed, self.position, count).tolist()
            self.position += count
            yield chosen

    def __len__(self) -> int:
        return -(-(self.total - self.position) // self.batch_size)
