"""How a causal language model goes on with a text: greedily, or with random numbers that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.subjects.tasks import first_tensor
from workbench.subjects.vocabulary import wide


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor, steps: int, draws: Tensor | None = None) -> Tensor:
    """(texts, steps) tokens after prompts (texts, length), none of which is padding.

    draws : (texts, steps) numbers from [0, 1): each token is the first at which the cumulated probability,
        words in the vocabulary's order, is above its number, so that two models with the same distribution
        draw the same word; None takes the most probable one
    """
    made = prompts.new_zeros(len(prompts), steps)
    caches = bool(getattr(getattr(model, "config", None), "use_cache", False))
    shown, memory = prompts, None
    for step in range(steps):
        options: dict[str, Any] = {"use_cache": True, "past_key_values": memory} if caches else {}
        output = model(input_ids=shown, **options)
        memory = getattr(output, "past_key_values", None)
        logits = wide(first_tensor(output)[:, -1])
        made[:, step] = next_words(logits, None if draws is None else draws[:, step])
        if caches and memory is not None:
            shown = made[:, step : step + 1]
        else:
            caches = False
            shown = torch.cat([prompts, made[:, : step + 1]], 1)
    return made


def ends_of(model: nn.Module) -> list[int]:
    """The tokens that end a text, by the model's settings."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        said = getattr(settings, "eos_token_id", None)
        if said is not None:
            return list(said) if isinstance(said, (list, tuple)) else [int(said)]
    return []


def until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """(texts, steps) tokens, -1 after the first that ends a text."""
    over = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)).cumsum(-1)
    return tokens.masked_fill(over.roll(1, -1).index_fill(-1, torch.tensor([0]), 0) > 0, -1)


def next_words(logits: Tensor, draws: Tensor | None) -> Tensor:
    """(texts,) words of logits (texts, vocabulary)."""
    if draws is None:
        return logits.argmax(-1)
    sums = logits.double().softmax(-1).cumsum(-1)
    numbers = draws.to(sums)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, numbers, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def last_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(vocabulary,) logits after one text (length,)."""
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return wide(first_tensor(model(input_ids=tokens[None], **options))[0, -1])


def repetition(tokens: list[int], size: int = 4) -> float:
    """Share of the runs of `size` tokens that have occurred before in the same text; 0 for a short one."""
    runs = [tuple(tokens[k : k + size]) for k in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def parting(one: Tensor, two: Tensor) -> int | None:
    """The first place at which two rows of tokens differ; None where they do not."""
    apart = (one != two).nonzero()
    return int(apart[0, 0]) if len(apart) else None
