"""What a language model thinks of continuations: sum of log p of their tokens after a context.

    ln p(c | x) = sum_t ln p(c_t | x, c_<t)      in nats

Batches hold a fixed number of tokens, and (tokens, vocabulary) never exists: the head is applied to the rows
that are asked for, a chunk at a time. The choices of an item have one context, often of many more tokens;
where that saves enough it is read once, and its keys and values are kept for all of them. A model has to give
the same answers both ways on the first such context, else it reads everything whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.kernels.sequence.unpadded import unpadded
from workbench.measures.language import chunk_length
from workbench.storage.resident import disk, trim
from workbench.subjects import Subject
from workbench.subjects.changes import computed_once
from workbench.subjects.layers import block_after_block
from workbench.subjects.tasks import first_tensor
from workbench.subjects.text import positions
from workbench.subjects.vocabulary import unspoken, wide

LONGEST = 2048  # tokens that are read of a model which does not say how many positions it has

#: A context and the continuation whose probability is asked for, as token ids; neither is empty.
Pair = tuple[Sequence[int], Sequence[int]]
#: ln p of the continuation in nats, and whether each of its tokens was the most probable one.
Answer = tuple[float, bool]
#: An answer and its place among the pairs.
Placed = tuple[int, Answer]
Measure = Callable[[], list[Placed]]


@dataclass(frozen=True)
class Asked:
    """A text that is read once, and the continuations that are asked of it: those that differ in their last
    token only read the same.

    read : the context and the continuation without its last token
    wanted : (place among the pairs, tokens of the continuation)
    context : what others may be asked after as well; empty where it was cut
    """

    read: tuple[int, ...]
    wanted: list[tuple[int, Sequence[int]]]
    context: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Positions whose next token is asked for: the last ones."""
        return max(len(tokens) for _, tokens in self.wanted)


@dataclass(frozen=True)
class Batch:
    """Texts that are read together; the first `shared` tokens are those of all of them."""

    texts: list[Asked]
    shared: int = 0


@dataclass
class Trust:
    """Whether a model has given the same answers after a context that was kept; None before it was tried."""

    earned: bool | None = None


def longest(on: Subject) -> int:
    """Tokens that the model reads at most."""
    return positions(on.model) or LONGEST


def asked_of(pairs: Sequence[Pair], length: int) -> list[Asked]:
    """Texts of at most `length` tokens, cut on the left, the longest first."""
    found: dict[tuple[int, ...], Asked] = {}
    for place, (context, tokens) in enumerate(pairs):
        if not tokens:
            raise BadInput("tasks: a continuation is empty, and has no probability; give each choice a text")
        if len(tokens) > length:
            raise BadInput(
                f"tasks: a continuation has {len(tokens)} tokens and the model reads {length}; leave the "
                "item out, or take a model that reads more"
            )
        read = (*context, *tokens)[-(length + 1) : -1]
        whole = tuple(context) if len(context) + len(tokens) <= length + 1 else ()
        found.setdefault(read, Asked(read, [], whole)).wanted.append((place, tokens))
    return sorted(found.values(), key=lambda text: -len(text.read))


def batches(texts: Iterable[Asked], tokens: int) -> Iterator[list[Asked]]:
    """Texts whose number times the longest is at most `tokens`; one longer than that comes alone."""
    batch = list[Asked]()
    for text in texts:
        if batch and (len(batch) + 1) * len(batch[0].read) > tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def planned(texts: Sequence[Asked], tokens: int, least: int) -> list[Batch]:
    """Batches; the texts after one context together where at least so many tokens are not read again."""
    families: dict[tuple[int, ...], list[Asked]] = {}
    for text in texts:
        families.setdefault(text.context, []).append(text)
    found, others = list[Batch](), list[Asked]()
    for context, family in families.items():
        shared = min(len(context), *(len(text.read) - text.rows + 1 for text in family)) - 1
        rest = max(len(text.read) for text in family) - shared
        if shared > 0 and (len(family) - 1) * shared >= least and len(family) * rest <= tokens:
            found.append(Batch(family, shared))
        else:
            others += family
    others.sort(key=lambda text: -len(text.read))
    return found + [Batch(texts) for texts in batches(others, tokens)]


def least_shared(on: Subject) -> int:
    """Tokens that are worth another call of the model, fewer where each takes long; of a model that lies in
    files none are.
    """
    if disk() is not None:
        return 10**9
    return 2048 if on.device.type == "cuda" else 64


@torch.no_grad()
def answered(
    on: Subject,
    pairs: Sequence[Pair],
    tokens: int = 2048,
    track: Callable[[list[Batch]], Iterable[Batch]] = iter,
    remembered: Callable[[int, Measure], list[Placed]] = lambda batch, measure: measure(),
) -> list[Answer | None]:
    """The answer to each pair, in their order; None for those that `track` did not come to.

    tokens : of a batch, padding included
    remembered : gives the answers of the n-th batch, measured or known from before
    """
    found: list[Answer | None] = [None] * len(pairs)
    trust = Trust()
    work = planned(asked_of(pairs, longest(on)), tokens, least_shared(on))
    on.model.eval()
    trim()
    with computed_once(on.model), unpadded(on.model), block_after_block(on.model):
        for number, batch in enumerate(track(work)):
            for place, answer in remembered(number, functools.partial(answers, on, batch, tokens, trust)):
                found[place] = answer
    return found


def answers(on: Subject, batch: Batch, tokens: int, trust: Trust) -> list[Placed]:
    """For a batch, its context read once where the model is trusted with that."""
    if not batch.shared:
        return asked_together(on, batch.texts)
    kept = None if trust.earned is False else after_context(on, batch)
    if kept is not None and trust.earned:
        return kept
    whole = [each for texts in batches(batch.texts, tokens) for each in asked_together(on, texts)]
    trust.earned = kept is not None and alike(kept, whole, on)
    return whole


def alike(one: list[Placed], two: list[Placed], on: Subject) -> bool:
    """Equal but for the rounding of the dtype that the model computes in."""
    parameter = next(on.model.parameters(), None)
    wide_enough = parameter is None or parameter.dtype in (torch.float32, torch.float64)
    near = 1e-4 if wide_enough else 3e-2
    known = dict(two)
    return all(abs(log_p - known[place][0]) <= near * (1 + abs(log_p)) for place, (log_p, _) in one)


def after_context(on: Subject, batch: Batch) -> list[Placed] | None:
    """For texts after one context, whose keys and values are computed once; None for a model that cannot."""
    from transformers import DynamicCache

    config: Any = getattr(on.model, "config", None)
    if not hasattr(config, "use_cache"):
        return None
    ids = torch.tensor([batch.texts[0].read[: batch.shared]], device=on.device)
    try:
        cache = DynamicCache(config=config)
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        nothing = torch.zeros(0, dtype=torch.long, device=on.device)
        read = unspoken(
            on.model,
            call | {"past_key_values": cache, "use_cache": True},
            lambda hidden: (hidden.flatten(0, 1)[:0], nothing),
            first_tensor,
        )
        if read is None or any(cache.is_sliding) or cache.get_seq_length() != batch.shared:
            return None
        cache.batch_repeat_interleave(len(batch.texts))
        return asked_together(on, batch.texts, batch.shared, cache)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ):  # of an architecture that keeps something else; what is wrong with all of it is seen whole
        return None


def asked_together(on: Subject, texts: Sequence[Asked], shared: int = 0, cache: Any = None) -> list[Placed]:
    """The answers to texts, without their first `shared` tokens where these are in the cache."""
    width = max(len(text.read) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask, kept = torch.zeros_like(ids), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        end = len(text.read)
        ids[row, :end], mask[row, :end] = torch.tensor(text.read), 1
        kept[row, end - text.rows : end] = True
    row_of: list[int] = []
    token_of: list[int] = []
    ends = list(itertools.accumulate(text.rows for text in texts))
    for text, end in zip(texts, ends, strict=True):
        for _, tokens in text.wanted:
            row_of += range(end - len(tokens), end)
            token_of += tokens
    call: dict[str, Any] = {"input_ids": ids[:, shared:].to(on.device), "attention_mask": mask.to(on.device)}
    if cache is not None:
        call |= {"past_key_values": cache, "use_cache": True}
    elif hasattr(getattr(on.model, "config", None), "use_cache"):
        call["use_cache"] = False
    kept = kept[:, shared:].to(on.device)
    log_p, greedy = scored(on, call, kept, torch.tensor(row_of), torch.tensor(token_of))
    found, first = list[Placed](), 0
    for text in texts:
        for place, tokens in text.wanted:
            part = slice(first, first + len(tokens))
            found.append((place, (float(log_p[part].sum()), bool(greedy[part].all()))))
            first += len(tokens)
    return found


def scored(
    on: Subject, call: dict[str, Any], kept: Tensor, row_of: Tensor, token_of: Tensor
) -> tuple[Tensor, Tensor]:
    """ln p of tokens in double precision, and whether each is the most probable one.

    call : the model's arguments
    kept : (texts, length) of what is read, whose next token is asked for
    row_of, token_of : (tokens,), the kept position that each token follows, and the token
    """

    def flat(hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden[kept]
        return rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    before_head = unspoken(on.model, call, flat, first_tensor)
    if before_head is None and "past_key_values" in call:
        raise RuntimeError("the cache may have been written to")
    if before_head is None:
        rows = flat(first_tensor(on.model(**call)))[0]
        head: Callable[[Tensor], Tensor] = wide
        vocabulary = rows.shape[-1]
    else:
        rows, head, vocabulary = (
            before_head.rows[before_head.targets != -100],
            before_head.head,
            before_head.vocabulary,
        )
    if int(token_of.max()) >= vocabulary:
        raise BadInput(
            f"subject: the tokenizer gives id {int(token_of.max())} and the model says {vocabulary} words; "
            "use the tokenizer that the model was trained with"
        )
    log_p, greedy = torch.empty(len(row_of), dtype=torch.double), torch.empty(len(row_of), dtype=torch.bool)
    for first in range(0, len(rows), chunk_length(vocabulary)):
        part = rows[first : first + chunk_length(vocabulary)]
        logits = wide(head(part))
        mine = ((row_of >= first) & (row_of < first + len(part))).nonzero()[:, 0]
        places, wanted = (row_of[mine] - first).to(logits.device), token_of[mine].to(logits.device)
        total, best = logits.logsumexp(-1), logits.argmax(-1)
        log_p[mine] = (logits[places, wanted] - total[places]).double().cpu()
        greedy[mine] = (best[places] == wanted).cpu()
    return log_p, greedy
