"""What a language model thinks of continuations: sum of log p of their tokens after a context.

    ln p(c | x) = sum_t ln p(c_t | x, c_<t)      in nats

Batches hold a fixed number of tokens, and (tokens, vocabulary) never exists: the head is applied to the rows
that are asked for, a chunk at a time.
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
from workbench.storage.resident import trim
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
    """

    read: tuple[int, ...]
    wanted: list[tuple[int, Sequence[int]]]

    @property
    def rows(self) -> int:
        """Positions whose next token is asked for: the last ones."""
        return max(len(tokens) for _, tokens in self.wanted)


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
        found.setdefault(read, Asked(read, [])).wanted.append((place, tokens))
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


@torch.no_grad()
def answered(
    on: Subject,
    pairs: Sequence[Pair],
    tokens: int = 2048,
    track: Callable[[list[list[Asked]]], Iterable[list[Asked]]] = iter,
    remembered: Callable[[int, Measure], list[Placed]] = lambda batch, measure: measure(),
) -> list[Answer | None]:
    """The answer to each pair, in their order; None for those that `track` did not come to.

    tokens : of a batch, padding included
    remembered : gives the answers of the n-th batch, measured or known from before
    """
    found: list[Answer | None] = [None] * len(pairs)
    work = list(batches(asked_of(pairs, longest(on)), tokens))
    on.model.eval()
    trim()
    with computed_once(on.model), unpadded(on.model), block_after_block(on.model):
        for batch, texts in enumerate(track(work)):
            for place, answer in remembered(batch, functools.partial(answers, on, texts)):
                found[place] = answer
    return found


def answers(on: Subject, texts: Sequence[Asked]) -> list[Placed]:
    """For a batch."""
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
    log_p, greedy = scored(
        on,
        ids.to(on.device),
        mask.to(on.device),
        kept.to(on.device),
        torch.tensor(row_of),
        torch.tensor(token_of),
    )
    found, first = list[Placed](), 0
    for text in texts:
        for place, tokens in text.wanted:
            part = slice(first, first + len(tokens))
            found.append((place, (float(log_p[part].sum()), bool(greedy[part].all()))))
            first += len(tokens)
    return found


def scored(
    on: Subject, ids: Tensor, mask: Tensor, kept: Tensor, row_of: Tensor, token_of: Tensor
) -> tuple[Tensor, Tensor]:
    """ln p of tokens in double precision, and whether each is the most probable one.

    ids, mask, kept : (texts, length), what is read, where it is no padding, and whose next token is asked for
    row_of, token_of : (tokens,), the kept position that each token follows, and the token
    """

    def flat(hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden[kept]
        return rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if hasattr(getattr(on.model, "config", None), "use_cache"):
        call["use_cache"] = False
    before_head = unspoken(on.model, call, flat, first_tensor)
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
