"""The texts of a calibration study: what examples are drawn from, and two domains to measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import BadInput
from workbench.subjects import Split, Subject
from workbench.subjects.examples.random_values import randomised
from workbench.subjects.rows import READERS, read_rows
from workbench.subjects.text import Columns, encode_text

#: What is measured on; the first is the domain of the calibration split.
SAME, OTHER = "same", "other"
AUTO, RANDOM, SECOND = "auto", "random", "second"
USUAL = "other-domain"  # where a subject has a second domain of its own


def rows_of(columns: Mapping[str, Tensor], rows: Tensor) -> Split:
    return {name: value[rows.to(value.device)] for name, value in columns.items()}


def size_of(columns: Mapping[str, Tensor]) -> int:
    return len(next(iter(columns.values())))


@dataclass(frozen=True)
class SecondDomain:
    """name : for people;  tested : examples to measure on;  left : others, to calibrate on"""

    name: str
    tested: Split
    left: Split


def second_domain(on: Subject, asked: str, split: str, count: int, seed: int) -> SecondDomain:
    """Texts of another kind than the split's: a split of the subject, a file of texts, or random tokens in
    place of the split's own. A half at most is measured on. `BadInput` where there is none of that name.
    """
    if asked == AUTO:
        asked = USUAL if USUAL in on.splits else RANDOM
    if asked == RANDOM:
        rows = torch.arange(min(count, on.size(split)))
        made = randomised(on.task, rows_of(on.split(split), rows), on.model, on.tokenizer, seed)
        other = randomised(on.task, on.split(split), on.model, on.tokenizer, seed + 1)
        return SecondDomain("random tokens", made, other)
    if asked in on.splits:
        if asked == split:
            raise BadInput(
                f"second: {asked!r} is the split that the first domain is measured on; give another"
            )
        columns = on.split(asked)
    else:
        columns = from_file(on, asked, split, seed)
    tested = min(count, max(size_of(columns) // 2, 1))
    order = torch.arange(size_of(columns))
    name = asked if asked in on.splits else Path(asked).name
    left = order[tested:] if len(order) > tested else order
    return SecondDomain(name, rows_of(columns, order[:tested]), rows_of(columns, left))


def from_file(on: Subject, path: str, split: str, seed: int) -> Split:
    """A file's texts, cut to the length of the split's own."""
    file = Path(path)
    if file.suffix not in READERS or not file.is_file():
        raise BadInput(
            f"second: {path!r} is neither a split ({', '.join(on.splits)}) nor a file "
            f"({', '.join(READERS)}); give one of them, {RANDOM}, or {AUTO}"
        )
    if on.task.name not in ("causal-lm", "masked-lm") or on.tokenizer is None:
        raise BadInput(
            f"second: a file is only read for language models with a tokenizer, not for {on.task.name}; "
            f"give a split ({', '.join(on.splits)}) or {RANDOM}"
        )
    rows, _ = read_rows(path, 4096, seed)
    if "text" not in rows.columns:
        have = ", ".join(map(str, rows.columns))
        raise BadInput(f"second: {file.name!r} has no column text but {have}; name the column of texts so")
    length = on.split(split)["input_ids"].shape[1]
    settings = Columns("text", "label", "image", None, length, seed)
    return encode_text(rows, on.task.name, on.tokenizer, on.model, settings)


def pool(on: Subject, source: str, split: str, second: SecondDomain, seed: int) -> Split:
    """What calibration examples are drawn from: a split, what the second domain has left, or random tokens
    in place of the split's.
    """
    if source == SECOND:
        return second.left
    if source == RANDOM:
        return randomised(on.task, on.split(split), on.model, on.tokenizer, seed + 2)
    if source in (split, second.name) and source in on.splits:
        instead = (
            f"give {SECOND}, which leaves out what is" if source == second.name else "give another split"
        )
        raise BadInput(f"sources: {source!r} is measured on, so nothing may be calibrated on it; {instead}")
    if source not in on.splits:
        raise BadInput(
            f"sources: {source!r} is no split; accepted: {', '.join(on.splits)}, {SECOND} (of the second "
            f"domain what is not measured on), {RANDOM}"
        )
    return on.split(source)


def drawn(columns: Mapping[str, Tensor], amount: int, seed: int) -> Split:
    """The first `amount` examples in an order that the seed decides: a larger amount holds a smaller one."""
    order = torch.randperm(size_of(columns), generator=torch.Generator().manual_seed(seed))
    return rows_of(columns, order[:amount])
