"""Examples of the same form that mean nothing: the floor of what data can give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.subjects.columns import SOURCE
from workbench.subjects.examples.card import Marks, holds_tokens, source_tokens
from workbench.subjects.tasks import Task
from workbench.subjects.text import embedding_count


def randomised(
    task: Task, columns: Mapping[str, Tensor], model: Any, tokenizer: Any, seed: int
) -> dict[str, Tensor]:
    """Texts of as many tokens, each drawn from the whole vocabulary with equal chances; special tokens and
    padding stay where they are, and targets that repeat the text repeat the new one. Of other inputs, each
    example's own values in another order.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = {name: value.cpu().clone() for name, value in columns.items()}
    ids = source_tokens(task, rows)
    if ids is None:
        for name, value in rows.items():
            if name != task.targets and value.is_floating_point() and value[0].numel() > 1:
                flat = value.flatten(1)
                order = torch.rand(flat.shape, generator=draw).argsort(1)
                rows[name] = flat.gather(1, order).view(value.shape)
        return rows
    marks = Marks(tokenizer, getattr(model, "config", None)).every
    known = torch.ones(embedding_count(model), dtype=torch.bool)
    known[[mark for mark in marks if mark < len(known)]] = False
    words = known.nonzero()[:, 0]
    drawn = words[torch.randint(len(words), ids.shape, generator=draw)]
    kept = torch.isin(ids, torch.tensor(sorted(marks), dtype=torch.long))
    real = task.real(rows).get(SOURCE)
    if real is not None:
        kept |= ~real
    fresh = torch.where(kept, ids, drawn)
    targets = rows.get(task.targets)
    if targets is not None and targets.shape == ids.shape:
        repeated = (targets == ids) | (targets == task.missing)
        if bool(repeated.all()):
            rows[task.targets] = torch.where(targets == task.missing, targets, fresh)
    name = next(n for n, value in rows.items() if holds_tokens(task, n) and value is ids)
    return rows | {name: fresh}
