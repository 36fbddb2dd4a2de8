"""Prune and regrow at a constant budget: masks that move while a sparse model trains.

Every `period` steps a share of the kept weights with the smallest magnitudes is given up and as many others
come back at zero, chosen by the size of the dense gradient (Evci et al. 2020; DSL, Wang et al. 2024) or at
random (Mocanu et al. 2018). The share falls as alpha/2 (1 + cos(pi t / T)). Every matrix keeps its own number
of weights, as in all three: compared over all layers, a few of them would lose nearly everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from workbench.pruning.pattern import smallest
from workbench.pruning.sparse_training.trained_masks import mask_in_force
from workbench.subjects import Batch, Layer, Mask, Subject


def exchanged_share(first: float, step: int, steps: int) -> float:
    """Share of the kept weights exchanged at `step`: first/2 (1 + cos(pi step / steps))
    (Evci et al. 2020, eq. 3).
    """
    return first / 2 * (1 + math.cos(math.pi * min(step, steps) / steps))


def dense_gradients(on: Subject, layers: Sequence[Layer], batch: Batch) -> dict[str, Tensor]:
    """Gradient of the batch's loss by every weight as the forward pass sees it, the pruned ones included:
    name -> (..., out, in).
    """
    with torch.enable_grad(), parametrize.cached():
        seen = [getattr(layer.module, layer.tensor) for layer in layers]
        found = torch.autograd.grad(on.loss(batch), seen)
    return {layer.name: (g.mT if layer.transposed else g) for layer, g in zip(layers, found, strict=True)}


@torch.no_grad()
def exchange(
    layers: Sequence[Layer],
    wanted: dict[str, Tensor],
    share: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """In each layer give up round(share x kept) weights, the smallest, and bring back as many of the pruned
    ones with the largest `wanted`.

    What was given up does not come back in the same exchange. What comes back starts at zero with empty
    optimizer moments. Returns the number exchanged: every layer's budget is the same before and after.
    """
    exchanged = 0
    for layer in layers:
        before = mask_in_force(layer)
        assert before is not None, "prune and regrow needs a mask on every layer"
        kept = before.flatten()
        sizes = layer.weight.detach().abs().flatten()
        scores = wanted[layer.name].flatten().float()
        count = min(round(share * int(kept.sum())), int((~kept).sum()))
        dropped = smallest(sizes.masked_fill(~kept, math.inf), count)
        grown = smallest((-scores).masked_fill(kept, math.inf), count)
        exchanged += count
        moved = (dropped | grown).reshape(before.shape)
        moved = moved.mT if layer.transposed else moved
        layer.original.masked_fill_(moved, 0.0)
        for value in (optimizer.state.get(layer.original, {}) if optimizer is not None else {}).values():
            if isinstance(value, Tensor) and value.shape == layer.original.shape:
                value.masked_fill_(moved, 0.0)
        layer.attach(Mask(((kept & ~dropped) | grown).reshape(before.shape)))
    return exchanged
