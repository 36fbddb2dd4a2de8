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
    upper = torch.zeros(HALF, dtype=torch.int64)
    for part in stream():
        upper += torch.bincount(keys(part) >> 16, minlength=HALF)
    ends = upper.cumsum(0)
    bins = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    lower = {each: torch.zeros(HALF, dtype=torch.int64) for each in bins}
    for part in stream():
        found = keys(part)
        for each, counts in lower.items():
            counts += torch.bincount(found[found >> 16 == each] & (HALF - 1), minlength=HALF)
    result = []
    for rank, each in zip(ranks, bins, strict=True):
        inside = rank - int(ends[each] - upper[each])
        place = int(torch.searchsorted(lower[each].cumsum(0), inside, right=True))
        result.append(value((each << 16) + place))
    return result
