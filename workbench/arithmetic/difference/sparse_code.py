"""Which entries of a long row are kept, in a Golomb-Rice code of the gaps between them.

A gap g is written as the number g >> b in unary and its last b bits; b is the one that takes the fewest
bits, about log2 of the mean gap. Unary numbers and last bits lie in streams of their own, so that reading
needs no loop over entries; together they take what the code of Golomb (1966) and Rice (1979) takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.quantization.number.packing import pack, unpack


def places_coded(kept: Tensor) -> dict[str, Tensor]:
    """kept : (n,) bool -> `unary`, `rest` (bytes) and `count` (entries, b)."""
    places = kept.flatten().nonzero().flatten()
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    width = best_width(gaps)
    quotients = gaps >> width
    ends = (quotients + 1).cumsum(0) - 1
    unary = torch.ones(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.bool)
    unary[ends] = False
    rest = pack(gaps & ((1 << width) - 1), width) if width else torch.empty(0, dtype=torch.uint8)
    return {"unary": pack(unary, 1), "rest": rest, "count": torch.tensor([len(places), width])}


def best_width(gaps: Tensor) -> int:
    """The b with the fewest bits."""
    if not len(gaps):
        return 0
    sizes = [int((gaps >> b).sum()) + len(gaps) * (1 + b) for b in range(32)]
    return min(range(32), key=sizes.__getitem__)


def places_read(coded: dict[str, Tensor]) -> Tensor:
    """The places (entries,) of what is kept, in order."""
    count, width = coded["count"].tolist()
    bits = unpack(coded["unary"], 1, 8 * coded["unary"].numel())
    ends = (bits == 0).nonzero().flatten()[:count]
    quotients = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
    rest = unpack(coded["rest"], width, count) if width else torch.zeros_like(quotients)
    return ((quotients << width) + rest + 1).cumsum(0) - 1
