"""Norms over some of the channels: what a LayerNorm or RMSNorm computes once the other channels are removed.

Removing a channel changes a norm's statistics by definition. A model whose norms are restricted to the kept
channels is therefore the masked model that a physically smaller one has to equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

EPSILON = ("eps", "variance_epsilon", "epsilon")


def channel_norms(model: nn.Module, size: int) -> list[nn.Module]:
    """Modules with one scale for each of `size` channels and nothing else but a shift:
    LayerNorm, RMSNorm and their kin.
    """
    found = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if (
            set(own) in ({"weight"}, {"weight", "bias"})
            and own["weight"].shape == (size,)
            and "norm" in type(module).__name__.lower()
        ):
            found.append(module)
    return found


def restricted(module: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """The norm of x (..., channels) over the channels weighted by keep (channels,), zero outside them.

    keep may lie between 0 and 1; with zeros and ones the kept channels hold exactly what the smaller norm
    computes.
    """
    count, scale, bias = keep.sum(), module.weight, getattr(module, "bias", None)
    assert isinstance(scale, Tensor)  # `channel_norms` finds no norm without one
    if isinstance(module, nn.LayerNorm):
        x = x - (x * keep).sum(-1, keepdim=True) / count
    epsilon = next(float(getattr(module, name)) for name in EPSILON if hasattr(module, name))
    x = x * torch.rsqrt((x.square() * keep).sum(-1, keepdim=True) / count + epsilon) * scale
    return (x if bias is None else x + bias) * keep


@contextmanager
def restrict(model: nn.Module, keep: Callable[[], Tensor]) -> Iterator[None]:
    """While entered, every norm over the channels computes over `keep()` alone;
    keep() is asked at every call.
    """
    handles = []
    for module in channel_norms(model, len(keep())):
        handles.append(
            module.register_forward_hook(lambda norm, inputs, output: restricted(norm, inputs[0], keep()))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
