"""Tokens that matter keep more bits: which ones the last attention singled out,
and inputs rounded by that.
"""

from __future__ import annotations

import math
from contextvars import ContextVar

import torch
from torch import Tensor

from workbench.quantization.activations.activations import rounded_inputs
from workbench.quantization.number.formats import named

#: Scores (batch, tokens) of the attention that came last in this forward pass, -inf at padding;
#: its shape says which tokens it speaks of.
_importance: ContextVar[Tensor | None] = ContextVar("importance", default=None)


def remember_importance(query: Tensor, key: Tensor, keep: Tensor | None) -> None:
    """How much each token attends to the first one, before the softmax and on average over heads
    (Shen et al. 2024, EdgeQAT, section 4.4).

    query (batch, heads, tokens, dim), key (batch, key heads, keys, dim). The published code averages over
    the batch as well, which would let one example change the bits of another;
    here each example has its own order.
    """
    first = key[:, :, :1].repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = (query * first).sum(-1).mean(1).detach()
    if keep is not None and keep.shape == score.shape:
        score = score.masked_fill(~keep, -math.inf)
    _importance.set(score)


def important_tokens(batch: int, tokens: int, share: float) -> Tensor | None:
    """(batch, tokens) True for the `share` that the last attention found most important, all but floor((1 -
    share) tokens) of those that are no padding; None (all of them) when it spoke of other tokens."""
    score = _importance.get()
    if score is None or score.shape != (batch, tokens):
        return None
    real = score > -math.inf
    narrow = ((1 - share) * real.sum(-1, keepdim=True)).floor()
    place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return place < real.sum(-1, keepdim=True) - narrow


def rounded_tokens(x: Tensor, format: str, wide_format: str, wide: Tensor | None) -> Tensor:
    """x (batch, ..., tokens, features) on a grid for every token:
    `wide_format` where `wide` (batch, tokens) is True or None, else `format`.
    """
    work = x.float()
    fine = rounded_inputs(work, named(wide_format), None, None)
    if wide is None:
        return fine.to(x.dtype)
    chosen = wide.reshape(len(wide), *[1] * (x.ndim - 3), -1, 1)
    return torch.where(chosen, fine, rounded_inputs(work, named(format), None, None)).to(x.dtype)
