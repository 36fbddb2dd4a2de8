"""What the examples are that something was calibrated on: how many, how long, with which marks, and a hash of
the very tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.subjects.columns import SOURCE
from workbench.subjects.tasks import Task

#: Names of tokens that end a text, beside what the tokenizer and the config say.
ENDS = frozenset({"<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>"})
NUMBER = float("nan")  # where nobody says which tokens are marks


def card(
    task: Task, columns: Mapping[str, Tensor], limit: int, tokenizer: Any = None, config: Any = None
) -> dict[str, Any]:
    """The first `limit` examples of a split, as one row of a table.

    examples; tokens : positions that hold no padding, of all sequences
    shortest, median, longest : tokens of an example
    layout : padded; packed (windows of one text, none padded); cut (none padded, each from the beginning of
        its text: all begin with the same mark); "" where an example is not a sequence
    end_of_text, template, other_marks : special tokens among them that end a text, that the chat template
        writes, and the rest; NaN where neither tokenizer nor config names any
    sha256 : see `digest`
    """
    rows = {name: value[:limit].cpu() for name, value in columns.items()}
    examples = len(next(iter(rows.values())))
    found: dict[str, Any] = {"examples": examples}
    lengths = lengths_of(task, rows)
    if lengths is not None:
        found |= {
            "tokens": int(lengths.sum()),
            "shortest": int(lengths.min()),
            "median": float(lengths.double().quantile(0.5)),
            "longest": int(lengths.max()),
        }
    ids = source_tokens(task, rows)
    marks = Marks(tokenizer, config)
    found["layout"] = "" if ids is None else layout(ids, lengths, marks)
    if ids is not None:
        found |= marks.counted(torch.cat([part[1] for part in texts(task, rows)]))
    return found | {"sha256": digest(task, rows)}


def lengths_of(task: Task, rows: Mapping[str, Tensor]) -> Tensor | None:
    """(examples,) positions without padding, over all sequences; None where examples are no sequences."""
    known = task.lengths(dict(rows))
    if known is not None:
        return known
    whole = [value for name, value in rows.items() if holds_tokens(task, name) and value.ndim == 2]
    return torch.full((len(whole[0]),), sum(v.shape[1] for v in whole)) if whole else None


def holds_tokens(task: Task, name: str) -> bool:
    return name in task.columns and task.columns[name].role == "tokens"


def source_tokens(task: Task, rows: Mapping[str, Tensor]) -> Tensor | None:
    """(examples, positions) ids of the sequence that is read first."""
    for name, value in rows.items():
        if holds_tokens(task, name) and value.ndim == 2 and task.columns[name].sequence == SOURCE:
            return value
    return None


def texts(task: Task, rows: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """(column, real ids (n,)) of every example, example after example."""
    real = task.real(dict(rows))
    names = [name for name, value in rows.items() if holds_tokens(task, name) and value.ndim == 2]
    for index in range(len(next(iter(rows.values())))):
        for name in sorted(names):
            keep = real.get(task.columns[name].sequence)
            ids = rows[name][index]
            fits = keep is not None and keep.shape == rows[name].shape
            yield name, ids[keep[index]] if fits and keep is not None else ids


def digest(task: Task, rows: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is read, 64 hexadecimal digits. Of texts: for each example in the order of the split,
    the number of its tokens without padding and then these, all as little-endian int64. Of other inputs: each
    column's name and its values as they lie in memory.
    """
    state = hashlib.sha256()
    if any(holds_tokens(task, name) and value.ndim == 2 for name, value in rows.items()):
        for _, ids in texts(task, rows):
            state.update(len(ids).to_bytes(8, "little"))
            state.update(ids.long().numpy().astype("<i8").tobytes())
        return state.hexdigest()
    for name, value in sorted(rows.items()):
        if name != task.targets:
            state.update(name.encode() + b"\0")
            state.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return state.hexdigest()


def layout(ids: Tensor, lengths: Tensor | None, marks: Marks) -> str:
    if lengths is not None and int(lengths.min()) < ids.shape[1]:
        return "padded"
    first = ids[:, 0]
    alike = len(ids) > 1 and bool((first == first[0]).all())
    return "cut" if alike and int(first[0]) in marks.every else "packed"


class Marks:
    """Special tokens by what they stand for, as far as tokenizer and config name them."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        ends = set(whole_numbers(getattr(config, "eos_token_id", None)))
        self.known = bool(ends) or tokenizer is not None
        names = special_names(tokenizer)
        template = getattr(tokenizer, "chat_template", None) or ""
        wording = template if isinstance(template, str) else " ".join(map(str, dict(template).values()))
        self.template = {number for number, name in names.items() if name and name in wording}
        ends |= set(whole_numbers(getattr(tokenizer, "eos_token_id", None)))
        ends |= {number for number, name in names.items() if name in ENDS}
        self.ends = ends - self.template
        self.every = set(names) | ends | self.template

    def counted(self, ids: Tensor) -> dict[str, float]:
        parts = {"end_of_text": self.ends, "template": self.template}
        parts["other_marks"] = self.every - self.ends - self.template
        if not self.known:
            return dict.fromkeys(parts, NUMBER)
        return {name: float(torch.isin(ids, torch.tensor(sorted(m))).sum()) for name, m in parts.items()}


def special_names(tokenizer: Any) -> dict[int, str]:
    """id -> text of the special tokens of a tokenizer."""
    found = {
        int(number): str(token)
        for number, token in dict(getattr(tokenizer, "added_tokens_decoder", None) or {}).items()
        if getattr(token, "special", False)
    }
    numbers = getattr(tokenizer, "all_special_ids", None) or ()
    names = getattr(tokenizer, "all_special_tokens", None) or ()
    return found | {int(i): str(name) for i, name in zip(numbers, names, strict=False)}


def whole_numbers(value: Any) -> list[int]:
    """The ids in what a config calls one or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in values if isinstance(v, int) and not isinstance(v, bool)]
