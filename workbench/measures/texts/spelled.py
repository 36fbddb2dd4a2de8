"""Tokens and classes as a reader sees them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from workbench.subjects import Subject

META_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


class Words:
    """Ids of tokens as text, each by itself: leading spaces kept, `#17` where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer if hasattr(tokenizer, "convert_ids_to_tokens") else None
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self._of(token)
        return self.known[token]

    def _of(self, token: int) -> str:
        if token < 0:
            return ""  # after the end of a text
        if self.tokenizer is None:
            return f"#{token}"
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"#{token}"
        if META_SPACE in piece:
            return str(piece.replace(META_SPACE, " "))
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def text(self, tokens: Sequence[int]) -> str:
        """Several tokens as one text on one line, without the tokenizer's own signs."""
        if self.tokenizer is None:
            return " ".join(map(self, tokens))
        return " ".join(str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).split())


def class_name(on: Subject, number: int) -> str:
    labels = on.labels or getattr(getattr(on.model, "config", None), "id2label", None) or {}
    known = labels if isinstance(labels, dict) else dict(enumerate(labels))
    return str(known.get(number, number))


def visible(word: str, most: int = 24) -> str:
    """A token with what has no ink made visible, except for spaces inside; long ones cut."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    shown = "".join(signs.get(c, c if c.isprintable() else "·") for c in word)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def columns_of(text: str) -> int:
    """Columns of a fixed-width font that a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def laid_out(words: Sequence[str], width: int) -> list[tuple[int, int, int]]:
    """(line, first column, columns) of each word, in lines of at most `width` columns; what follows a line
    break of the text begins a line.
    """
    places = []
    line = column = 0
    for word in words:
        size = max(1, columns_of(visible(word)))
        if column and column + size > width:
            line, column = line + 1, 0
        places.append((line, column, size))
        column += size
        if "\n" in word:
            line, column = line + 1, 0
    return places
