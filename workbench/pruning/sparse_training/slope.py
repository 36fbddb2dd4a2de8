"""SLoPe's double-pruned backward pass (Mozaffari et al. 2024): both products of training see an N:M matrix.

    Y = X W_R^T          W_R: N:M along the inputs
    dX = dY W_RC         W_RC: W_R with N:M along the outputs as well, so that the transposed product is
                         sparse too
    dW = dY^T X * mask

The forward pass is exact; the gradient that goes on to earlier layers misses the entries W_R has and W_RC has
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from workbench.pruning.pattern import NM, nm_mask
from workbench.statistics.inputs import WeightCalls
from workbench.subjects import Layer, Mask


def extra_zero_share(keep: int, of: int) -> float:
    """Expected share of all weights that pruning a random N:M matrix once more along the other side removes
    (the paper's lemma 2.1).

    A group of M along the other side holds j non-zeros with probability C(M, j) s^j (1 - s)^(M - j),
    s = N / M, and loses j - N of them when j > N. 0.09375 for 2:4.
    """
    s = keep / of
    return sum(
        math.comb(of, j) * s**j * (1 - s) ** (of - j) * (j - keep) / of for j in range(keep + 1, of + 1)
    )


def second_mask(weight: Tensor, keep: int, of: int) -> Tensor:
    """Where a row-pruned weight (..., out, in) stays non-zero when its columns are pruned to N:M as well,
    by magnitude.
    """
    return nm_mask(weight.abs(), NM(keep, of, -2)) & (weight != 0)


class BackwardWeight(Function):
    """x (..., in), weight (out, in), back (out, in) -> x weight^T (..., out),
    whose gradient by x is dY back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, back)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,) = upstream
        x, back = ctx.saved_tensors
        return dy @ back, dy.flatten(0, -2).mT @ x.flatten(0, -2), None


class DoublePruned(WeightCalls):
    """While entered, every product with a layer's weight has the backward pass above.
    The second masks are chosen once, when made.

    Terms beside a sparse weight (adapters) go back in full: only the sparse part is pruned twice.
    """

    def __init__(self, layers: Sequence[Layer], keep: int, of: int) -> None:
        super().__init__(layers)
        self.dropped = {}
        for layer in layers:
            sparse = sparse_part(layer)
            self.dropped[layer.name] = (sparse != 0) & ~second_mask(sparse, keep, of)

    def seen(self, layer: Layer, value: Tensor) -> Tensor:
        return layer.weight.detach() - torch.where(self.dropped[layer.name], sparse_part(layer), 0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if (back := self.found(given["weight"])) is not None:
                product: Tensor = BackwardWeight.apply(given["input"], given["weight"], back)
                return product if given.get("bias") is None else product + given["bias"]
        elif name == "addmm" and len(args) == 3 and (back := self.found(args[2])) is not None:
            return BackwardWeight.apply(args[1], args[2].mT, back) + args[0]
        return func(*args, **kwargs)


def sparse_part(layer: Layer) -> Tensor:
    """The weight (out, in) after its mask and before the terms beside it."""
    stored = layer.original.detach()
    weight = stored.mT if layer.transposed else stored
    for change in layer.changes:
        if change.order > Mask.order:
            break
        weight = change.change(weight)
    return weight.detach()
