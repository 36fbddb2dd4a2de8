"""How far a model's answers are from the dense model's, item by item, asked many times for the same items.

With p the dense model's distribution and q another's,

    KL(p || q) = D(q) - D(p),   D(q) = -sum_v p_v ln q_v

so p is formed once and kept (tokens x vocabulary, on disk), and another model costs its head, one softmax and
one product a token. The dense model itself gives exactly 0: both terms are the same numbers, computed
alike.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.measures.embedding import VectorPairs
from workbench.measures.language import chunk_length
from workbench.measures.reference import Answer, answer_of, kind_of
from workbench.storage import cache_folder
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import Batch
from workbench.subjects.vocabulary import wide


class ItemDistances:
    """Distances of an answer to the dense one's: KL in nats where there are distributions, else 1 - cosine of
    embeddings, or squared change as a share of the variance of outputs.

    answers : the dense model's, one a batch
    disk : megabytes of distributions that may be kept; beyond it they are formed anew for every model
    """

    def __init__(self, on: Subject, answers: Sequence[Answer], disk: float = 2048.0) -> None:
        self.on, self.kind, self.answers = on, kind_of(on.task), list(answers)
        self.known: list[Tensor] | None = None
        self.file: mmap.mmap | None = None  # what `known` lies in
        self.spread = 1.0
        if self.kind in ("language", "classification"):
            items = sum(len(a.rows) for a in self.answers)
            width = self.answers[0].outputs if self.answers else 0
            own_code = any(
                a.spoken and not a.plain for a in self.answers
            )  # of the model, which will be changed
            if 4 * items * width <= disk * 1e6 or own_code:
                self.own = self._keep(items, width)
            else:
                self.own = [self.costs(index, answer) for index, answer in enumerate(self.answers)]
        elif self.kind == "output":
            spoken = torch.cat([a.known() for a in self.answers]).double()
            self.spread = max(float(spoken.var(0, correction=0).mean()), np.finfo(float).tiny)

    @property
    def example(self) -> NDArray[np.int64]:
        """(items,) the row of the split that each is of: the blocks of an interval."""
        return torch.cat([a.example for a in self.answers]).cpu().numpy()

    @torch.no_grad()
    def of(self, index: int, output: Any, batch: Batch) -> NDArray[np.float64]:
        """(items of the batch,) distances of what the task's `deferred` gave for batch number `index`."""
        dense = self.answers[index]
        answer = answer_of(self.on.task, output, batch, torch.arange(len(batch[next(iter(batch))])))
        if self.kind in ("language", "classification"):
            return (self.costs(index, answer) - self.own[index]).cpu().numpy()
        one, two = (a.known().double().cpu().numpy() for a in (dense, answer))
        if self.kind == "embedding":
            return 1 - VectorPairs(one, two).cosine
        return np.asarray(np.square(two - one).mean(-1) / self.spread)

    @torch.no_grad()
    def costs(self, index: int, answer: Answer) -> Tensor:
        """(items,) cross-entropy of the answer under the dense distribution, D(q) above, in double."""
        found = []
        step = chunk_length(answer.outputs)
        for first in range(0, len(answer.rows), step):
            part = slice(first, first + step)
            found.append(cross_entropy(self.chances(index, part), self.logits(answer, part)))
            self.let_go()
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.double)

    def chances(self, index: int, part: slice) -> Tensor:
        """(n, outputs) the dense model's probabilities of some items of a batch."""
        if self.known is not None:
            return self.known[index][part].to(self.answers[index].rows.device)
        return self.logits(self.answers[index], part).softmax(-1)

    def logits(self, answer: Answer, part: slice) -> Tensor:
        """(n, outputs) of some items; of classifiers, which have few, in double."""
        values = wide(answer.head(answer.rows[part]))
        return values if self.kind == "language" else values.double()

    @torch.no_grad()
    def _keep(self, items: int, width: int) -> list[Tensor]:
        """Write all probabilities to a file without a name, which goes when nobody reads it any more; what
        `costs` says of the dense model itself.
        """
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        dtype = self.logits(self.answers[0], slice(1)).dtype
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(1, items * width * dtype.itemsize))
            self.file = mmap.mmap(file.fileno(), 0)
        held = torch.frombuffer(self.file, dtype=dtype, count=items * width).view(items, width)
        parts = list(held.split([len(a.rows) for a in self.answers]))
        step, own = chunk_length(width), []
        for index, kept in enumerate(parts):
            costs = [torch.zeros(0, dtype=torch.double)]
            for first in range(0, len(kept), step):
                part = slice(first, first + step)
                logits = self.logits(self.answers[index], part)
                chances = logits.softmax(-1)
                costs.append(cross_entropy(chances, logits))
                kept[part] = chances.cpu()
                self.let_go()
            own.append(torch.cat([each.to(costs[-1].device) for each in costs]))
        self.known = parts
        return own

    def let_go(self) -> None:
        """Pages of the file that were read stay with the system, which may need their place, not with us."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)


def cross_entropy(chances: Tensor, logits: Tensor) -> Tensor:
    """(n,) -sum_v p_v ln q_v of probabilities p and logits of q, both (n, outputs), in double."""
    product = logits.log_softmax(-1).mul_(chances)
    kept = product.sum(-1)
    if not kept.isfinite().all():  # a word that neither can say has chance 0 and ln 0, and adds nothing
        kept = torch.where(chances == 0, 0.0, product).sum(-1)
    return -kept.double()


@torch.no_grad()
def dense_answers(on: Subject, index_rows: Sequence[Tensor], batches: Sequence[Batch]) -> list[Answer]:
    """What a model answers to these batches, whose examples are these rows of the split."""
    return [
        answer_of(on.task, on.task.deferred(on.model, batch), batch, rows)
        for rows, batch in zip(index_rows, batches, strict=True)
    ]
