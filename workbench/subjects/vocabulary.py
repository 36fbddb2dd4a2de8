"""The last product of a language model, done a chunk of tokens at a time: (tokens, vocabulary) never exists.

Logits of a vocabulary are the largest tensor of a small model by far: 8,192 tokens times 128,256 words are
4 GB. What a loss or a metric needs of them is a number a token, so they are formed for a few tokens, used and
dropped; `kernels.training.linear_cross_entropy` does it for the cross-entropy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from workbench.kernels.training.linear_cross_entropy import (
    chunk_of,
    linear_cross_entropy,
    linear_cross_entropy_and_hits,
)


@dataclass(frozen=True)
class Unspoken:
    """What a language model says before its last product, one row a token.

    rows : (tokens, width) what the head multiplies;  targets : (tokens,), -100 where there is none
    head : (n, width) -> (n, vocabulary) logits, softcaps and scales of the architecture included
    weight, bias : (vocabulary, width) and (vocabulary,) or None, when the logits are rows W^T + b;
        else weight is None
    """

    rows: Tensor
    targets: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def items(self) -> Tensor:
        return (self.targets != -100).sum()

    def loss(self) -> Tensor:
        """Mean cross-entropy over the items, twice differentiable."""
        if self.weight is not None:
            return linear_cross_entropy(self.rows, self.weight, self.targets, self.bias)

        def total(logits: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(wide(logits), targets, reduction="sum")

        return self.total(total) / self.items

    @torch.no_grad()
    def measured(self) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy, number of targets that have the largest logit)."""
        if self.weight is not None:
            return linear_cross_entropy_and_hits(self.rows, self.weight, self.targets, self.bias)

        def both(logits: Tensor, targets: Tensor) -> Tensor:
            loss = nn.functional.cross_entropy(wide(logits), targets, reduction="sum")
            return torch.stack([loss, (logits.argmax(-1) == targets).sum().to(loss)])

        loss, hits = self.total(both).unbind()
        return loss / self.items, hits

    def total(self, function: Callable[..., Tensor], *others: Unspoken) -> Tensor:
        """The sum over chunks of `function(logits, targets, *logits of the others)`, which gets the rows that
        have a target; a chunk's logits are formed again for its gradient. No gradient goes to the others.
        """
        chunk = chunk_of(self.rows, self.vocabulary)
        sums: Tensor | None = None
        for first in range(0, max(len(self.rows), 1), chunk):
            part = slice(first, first + chunk)
            kept = self.targets[part] != -100

            def one(rows: Tensor, part: slice = part, kept: Tensor = kept) -> Tensor:
                with torch.no_grad():
                    against = [other.head(other.rows[part])[kept] for other in others]
                return function(self.head(rows)[kept], self.targets[part][kept], *against)

            rows = self.rows[part]
            found = checkpoint(one, rows, use_reentrant=False) if torch.is_grad_enabled() else one(rows)
            sums = found if sums is None else sums + found
        assert sums is not None
        return sums

    def logits(self) -> Tensor:
        """(items, vocabulary), whole: for who needs every number of them at once."""
        return self.head(self.rows[self.targets != -100])


def wide(values: Tensor) -> Tensor:
    """16-bit numbers in float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def unspoken(
    model: nn.Module,
    call: dict[str, Any],
    flat: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits_of: Callable[[Any], Tensor],
) -> Unspoken | None:
    """Run `model(**call)` up to its output embeddings; None when there are none that can be left out: no
    transformers model, somebody watches or changes the head's product, the head is called more than once, or
    what the architecture does to the logits cannot be told apart from its trunk.

    flat : (batch, length, features) -> rows (items, features) and targets (items,)
    logits_of : the logits in what the model returns

    The head gets no token, and the model carries on with logits of none. Logits that come back as they left
    are the head's product; otherwise the architecture does something to them (Gemma's softcap, Cohere's
    scale, Bart's bias), and its own code does that to every chunk, with the trunk's answer at hand.
    """
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    base = getattr(inner, "base_model", None)
    if not isinstance(head, nn.Module) or base is None or watched(head):
        return None
    plain, seen, answers = head.forward, list[Tensor](), list[Any]()
    empty: list[Tensor] = []

    def leave_out(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        empty.append(plain(hidden[..., :0, :]))
        return empty[-1]

    watch = base.register_forward_hook(lambda module, inputs, output: answers.append(output))
    try:
        with forwarding(head, leave_out):
            returned = logits_of(model(**call))
    finally:
        watch.remove()
    told_apart = base is not inner and bool(answers) and "last_hidden_state" in answers[-1]
    if len(seen) != 1 or seen[0].ndim != 3 or (returned is not empty[0] and not told_apart):
        return None
    rows, targets = rows_of(seen[0], flat)
    vocabulary = empty[0].shape[-1]
    if returned is not empty[0]:
        return Unspoken(
            rows, targets, finisher(inner, head, plain, base, answers, call, logits_of), vocabulary
        )
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return Unspoken(rows, targets, plain, vocabulary)
    linear: Any = head
    return Unspoken(rows, targets, plain, vocabulary, linear.weight, linear.bias)


def rows_of(hidden: Tensor, flat: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """hidden (batch, length, width) as rows, and their targets: all of them when most have a target,
    else the ones that do.
    """
    rows = hidden.flatten(0, 1)
    places, targets = flat(torch.arange(len(rows), device=rows.device).view(*hidden.shape[:2], 1))
    places = places[:, 0]
    if 2 * len(places) < len(rows):
        return rows[places], targets
    return rows, torch.full((len(rows),), -100, device=rows.device).index_put((places,), targets)


def watched(head: nn.Module) -> bool:
    """Whether a hook sees what the head gives, or a mode (`statistics.WeightCalls`) sees its product."""
    modes = [getattr(mode, "found", None) for mode in _get_current_function_mode_stack()]
    return bool(head._forward_hooks) or any(
        found(getattr(head, "weight", None)) is not None for found in modes if found
    )


def finisher(
    model: nn.Module,
    head: nn.Module,
    plain: Callable[[Tensor], Tensor],
    base: nn.Module,
    answers: list[Any],
    call: dict[str, Any],
    logits_of: Callable[[Any], Tensor],
) -> Callable[[Tensor], Tensor]:
    """(n, width) -> (n, vocabulary): the head's product and what the architecture does to it afterwards."""
    answer = copy.copy(answers[-1])
    answer["last_hidden_state"] = answer["last_hidden_state"][:1, :1]  # the head does not look at it

    def finished(rows: Tensor) -> Tensor:
        product = plain(rows)[None]
        with forwarding(base, lambda *_, **__: answer), forwarding(head, lambda *_, **__: product):
            return logits_of(model(**call))[0]

    return finished


@contextlib.contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes this instead."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
