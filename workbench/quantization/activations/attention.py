"""Attention, seen and changed where a stock transformers model multiplies:
queries, keys, values and maps, whatever the architecture.

The library's models hand their queries (after rotary positions), keys and values to a function that is chosen
by name. The one registered here calls the model's own plain ("eager") function, records the call for whoever
is `watching`, and lets an `AttentionChange` act on it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.quantization.activations.activations import (
    ActivationQuant,
    activation_format,
    quantize_activations,
)
from workbench.quantization.activations.token_importance import (
    important_tokens,
    remember_importance,
    rounded_tokens,
)
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Change, stacks_of

NAME = "workbench_plain"


@dataclass(frozen=True)
class AttentionCall:
    """One attention of a forward pass. query (batch, heads, tokens, dim), key and value (batch, key heads,
    keys, dim), maps (batch, heads, tokens, keys); keep (batch,
    tokens) False at padding, None where there is none.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    maps: Tensor
    keep: Tensor | None


#: What a forward pass inside `watching` went through, in order:
#: attentions, and with `order_of` the layers before and between them.
_seen: ContextVar[list[AttentionCall | Layer] | None] = ContextVar("seen", default=None)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The attention interface of transformers: (output (batch, tokens, heads, dim), maps (batch, heads,
    tokens, keys)).
    """
    eager = eager_of(type(module))
    change, keep = change_inside(module), kept_tokens(attention_mask)
    if change is not None:
        query, key = change.operands(query, key)
    remember_importance(query, key, keep)
    if change is None:
        output, maps = eager(module, query, key, value, attention_mask, **options)
    else:
        residual = change.residual_scores()
        if residual is not None:
            scaled = residual * (
                options["scaling"] if options.get("scaling") is not None else query.shape[-1] ** -0.5
            )
            attention_mask = scaled if attention_mask is None else attention_mask + scaled
        _, maps = eager(module, query, key, value, attention_mask, **options)
        maps, value = change.weighed(maps, value)
        output = (
            (maps @ value.repeat_interleave(maps.shape[1] // value.shape[1], 1)).transpose(1, 2).contiguous()
        )
    seen = _seen.get()
    if seen is not None:
        seen.append(AttentionCall(module, query, key, value, maps, keep))
    return output, maps


def eager_of(kind: type[nn.Module]) -> Any:
    """The plain attention function of the file that defines this module's class,
    or one that it derives from.
    """
    for parent in kind.__mro__:
        if (found := getattr(sys.modules[parent.__module__], "eager_attention_forward", None)) is not None:
            return found
    raise BadInput(
        f"subject: {kind.__name__} has no plain attention function beside it, "
        "through which its attention could be seen"
    )


def kept_tokens(mask: Tensor | None) -> Tensor | None:
    """(batch, keys) True where some query may look: everywhere but at padding.
    mask (batch, 1, queries, keys), added to scores.
    """
    return None if mask is None else (mask[:, 0] == 0).any(-2)


def change_inside(module: nn.Module) -> AttentionChange | None:
    for inner in module.modules():
        for stack in stacks_of(inner).values():
            for change in stack:
                if isinstance(change, AttentionChange):
                    return change
    return None


@functools.lru_cache(maxsize=1)
def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def configurations(model: nn.Module) -> list[Any]:
    return list(
        {
            id(m.config): m.config
            for m in model.modules()
            if hasattr(getattr(m, "config", None), "_attn_implementation")
        }.values()
    )


def use_plain_attention(model: nn.Module) -> None:
    """Let the model multiply in `plain_attention` from now on
    (also after a deep copy; a saved subject asks for it again).
    """
    register()
    for config in configurations(model):
        config._attn_implementation = NAME


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[list[AttentionCall | Layer]]:
    """The attentions of the forward passes inside, in order, with their graphs;
    the model's own implementation is back afterwards.
    """
    configs = configurations(model)
    before = [config._attn_implementation for config in configs]
    use_plain_attention(model)
    found: list[AttentionCall | Layer] = []
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


@torch.no_grad()
def order_of(on: Subject, layers: Sequence[Layer], examples: int = 1) -> list[AttentionCall | Layer]:
    """The way of a few examples through the model: these layers and the attentions,
    in the order they are called.

    `BadInput` when the model computes attention by itself
    (an own module, or an architecture outside the library's attention interface).
    """

    def note(layer: Layer) -> Any:
        return layer.module.register_forward_pre_hook(lambda module, args: found.append(layer))

    with watching(on.model) as found:
        handles = [note(layer) for layer in layers]
        try:
            on.task.output(on.model, next(on.batches("train", examples)))
        finally:
            for handle in handles:
                handle.remove()
    if not any(isinstance(step, AttentionCall) for step in found):
        raise BadInput(
            f"subject: {type(on.model).__name__} computes attention by itself; "
            "this needs a model that goes through transformers' attention interface"
        )
    return found


def attention_sites(order: Sequence[AttentionCall | Layer]) -> dict[str, AttentionCall]:
    """For every attention the name of the first of the layers inside it that is called before it multiplies:
    where its `AttentionChange` is kept.
    """
    sites: dict[str, AttentionCall] = {}
    for position, call in enumerate(order):
        if isinstance(call, AttentionCall):
            inside = {id(m) for m in call.module.modules()}
            before = [
                step for step in order[:position] if isinstance(step, Layer) and id(step.module) in inside
            ]
            if before:
                sites.setdefault(before[0].name, call)
    return sites


class AttentionChange(Change):
    """Acts on the attention whose projection it is attached to; the weight itself is left alone."""

    order = 85

    def change(self, weight: Tensor) -> Tensor:
        return weight

    def restored(self, model: nn.Module) -> None:
        use_plain_attention(model)

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are multiplied."""
        return query, key

    def residual_scores(self) -> Tensor | None:
        """What is added to query key^T before it is scaled, (batch, 1 or heads, tokens, keys), or None."""
        return None

    def weighed(self, maps: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (batch, heads, tokens, keys) and values as they are multiplied."""
        return maps, value


class AttentionQuant(AttentionChange):
    """Rounds queries, keys and values (a scale for every token and head) and maps (one for every row),
    straight through.

    With a `share` below 1 only that share of the tokens is in `wide_format` and the others are in `format`:
    queries and keys by the attention before this one, values by this one; maps are wide (Shen et al. 2024).
    `first`: no attention comes before.
    """

    def __init__(self, *, format: str, wide_format: str, share: float, first: bool) -> None:
        super().__init__()
        self.format, self.wide_format, self.share, self.first = format, wide_format, share, first

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.round(query, self.first), self.round(key, self.first)

    def weighed(self, maps: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_tokens(maps, self.format, self.wide_format, None), self.round(value, False)

    def round(self, x: Tensor, all_wide: bool) -> Tensor:
        return rounded_tokens(
            x,
            self.format,
            self.wide_format,
            None if all_wide or self.share == 1 else important_tokens(x.shape[0], x.shape[2], self.share),
        )

    def config(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "wide_format": self.wide_format,
            "share": self.share,
            "first": self.first,
        }


def round_activations(
    on: Subject, layers: Sequence[Layer], bits: int, wide_share: float, attention: bool
) -> None:
    """Inputs of these layers in `bits` bits, a scale for every token; 8 bits for the `wide_share` of tokens
    that attention finds important. With `attention` its operands and maps as well.
    Gradients pass straight through.
    """
    narrow, wide = (activation_format("int", width).name for width in (bits, 8 if wide_share else bits))
    order = order_of(on, layers) if wide_share or attention else []
    first = next((i for i, step in enumerate(order) if isinstance(step, AttentionCall)), 0)
    early = {step.name for step in order[:first] if isinstance(step, Layer)}
    for layer in layers:
        if wide_share:
            layer.attach(
                TokenQuant(
                    format=narrow, wide_format=wide, share=wide_share, before_attention=layer.name in early
                )
            )
        else:
            quantize_activations(layer, None, narrow, "token")
    if attention:
        sites = attention_sites(order)
        for layer in layers:
            if layer.name in sites:
                layer.attach(
                    AttentionQuant(
                        format=narrow, wide_format=wide, share=wide_share or 1.0, first=layer.name in early
                    )
                )
    if order:
        use_plain_attention(on.model)


class TokenQuant(ActivationQuant):
    """Inputs of a linear layer in `wide_format` for the `share` of tokens that matter most to the attention
    before it, in `format` for the others.

    A layer `before_attention` comes before the first one, where nothing is known yet: all its tokens are
    wide, as are inputs that are not (batch, tokens, features).
    """

    def __init__(self, *, format: str, wide_format: str, share: float, before_attention: bool) -> None:
        super().__init__(format=format, wide_format=wide_format)
        self.share, self.before_attention = share, before_attention

    def round(self, x: Tensor) -> Tensor:
        wide = (
            important_tokens(x.shape[0], x.shape[1], self.share)
            if x.ndim == 3 and not self.before_attention
            else None
        )
        return rounded_tokens(x, self.format, self.wide_format, wide)

    def restored(self, model: nn.Module) -> None:

        use_plain_attention(model)

    def config(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "wide_format": self.wide_format,
            "share": self.share,
            "before_attention": self.before_attention,
        }
