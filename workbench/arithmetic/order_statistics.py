"""Exact order statistics of numbers that are never held together: two passes over a stream.

float32 numbers, read as integers, are in the order of their values once the bits of negative ones are turned.
The first pass counts upper halves of these integers, the second the lower halves of those that hold a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

HALF = 1 << 16
SIGN = 1 << 31


def keys(values: Tensor) -> Tensor:
    """Integers in [0, 2^32) in the order of the float32 values; -0 lies below 0."""
    bits = values.detach().to(torch.float32).contiguous().view(-1).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - bits, bits + SIGN)


def value(key: int) -> float:
    """The number of a key."""
    bits = key - SIGN if key >= SIGN else -1 - key
    return float(torch.tensor([bits]).to(torch.int32).view(torch.float32))


def ranked(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[float]:
    """The numbers at these places (0: the least) of everything in the stream, which is read twice."""
    return ranked_rows(lambda: (part.reshape(1, -1) for part in stream()), ranks)[0]


def ranked_rows(stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[list[float]]:
    """The same of each row of a stream of (rows, ...) tensors, all rows in the same two readings."""
    upper: list[Tensor] = []
    for part in stream():
        upper = upper or [torch.zeros(HALF, dtype=torch.int64) for _ in part]
        for counts, row in zip(upper, part, strict=True):
            counts += torch.bincount(keys(row) >> 16, minlength=HALF)
    ends = [counts.cumsum(0) for counts in upper]
    bins = [[int(torch.searchsorted(end, rank, right=True)) for rank in ranks] for end in ends]
    lower = [{each: torch.zeros(HALF, dtype=torch.int64) for each in row} for row in bins]
    for part in stream():
        for held, row in zip(lower, part, strict=True):
            found = keys(row)
            for each, counts in held.items():
                counts += torch.bincount(found[found >> 16 == each] & (HALF - 1), minlength=HALF)
    return [
        [
            placed(rank, each, upper[i], ends[i], lower[i][each])
            for rank, each in zip(ranks, bins[i], strict=True)
        ]
        for i in range(len(upper))
    ]


def placed(rank: int, which: int, upper: Tensor, ends: Tensor, lower: Tensor) -> float:
    """The number of a rank whose key's upper half is `which`."""
    inside = rank - int(ends[which] - upper[which])
    return value((which << 16) + int(torch.searchsorted(lower.cumsum(0), inside, right=True)))
