"""Values as people type them: JSON's numbers, words, lists and mappings, with quotes left out.

    read("[0.5, 1e-3]", list[float])        [0.5, 0.001]
    read("0.5, 1e-3", list[float])          the same
    read("{*.q_proj: 4}", dict[str, int])   {"*.q_proj": 4}

A number is one of JSON's, or it is text: `1:30`, `0b11`, `1_000` and `007` mean nothing here, though YAML
1.1 reads numbers in them, and where a number is asked for they are refused, as `1e400` is everywhere. There
are no tags, anchors or aliases, so a file of parameters is data and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from workbench.errors import BadInput

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "~": None}
#: Brackets in brackets; deeper is no value that anything here takes.
DEEPEST = 20
#: Digits of a whole number; floats end long before.
LONGEST = 400
#: Bytes of a file of parameters.
LARGEST = 2**20


def read(text: str, annotation: Any = object, field: str = "value") -> Any:
    """`text` as a value of this type: as it stands for text, else a number, a word (true, false, null), a
    list `[a, b]` or `a, b`, a mapping `{a: 1}` or `a: 1`. `BadInput` names the field.
    """
    return converted(parsed(text, annotation, field), annotation, field)


def parsed(text: str, annotation: Any, field: str) -> Any:
    """Lists, dicts, quoted texts (`Quoted`) and what is none of them, as it was typed."""
    if textual(annotation):
        return text
    reader = Reader(text, field)
    stripped = text.strip()
    if listed(annotation) is not None and not stripped.startswith("["):
        return reader.items("")
    if mapped(annotation) is not None and not stripped.startswith("{") and ":" in stripped:
        return reader.pairs("")
    found = reader.value(stops="")
    reader.end()
    return found


class Quoted(str):
    """Text that was in quotes, so it is no number."""


class Reader:
    """A text, read once from left to right."""

    def __init__(self, text: str, field: str) -> None:
        self.text, self.field, self.at, self.depth = text, field, 0, 0

    def wrong(self, why: str) -> BadInput:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return BadInput(f"{self.field}: {shown!r} is not a value: {why}")

    def skip(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def end(self) -> None:
        if self.skip():
            raise self.wrong(f"{self.text[self.at :][:20]!r} is left over; put text with brackets in quotes")

    def value(self, stops: str) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.wrong("it has too many brackets in brackets")
        first = self.skip()
        if first == "[":
            self.at += 1
            found: Any = self.items("]")
        elif first == "{":
            self.at += 1
            found = self.pairs("}")
        elif first in ('"', "'"):
            found = self.quoted(first)
        else:
            found = self.bare(stops)
        self.depth -= 1
        return found

    def items(self, close: str) -> list[Any]:
        found: list[Any] = []
        while True:
            if self.closed(close):
                return found
            found.append(self.value("," + close))
            self.separated(close)

    def pairs(self, close: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while True:
            if self.closed(close):
                return found
            if self.skip() in ('"', "'"):
                key = str(self.quoted(self.text[self.at]))
                if self.skip() != ":":
                    raise self.wrong(f"after {key!r} comes a colon and a value")
                self.at += 1
            else:
                sign = re.compile(r":(?=\s)|:(?=[^:,{}\[\]]*([,}\]]|$))").search(self.text, self.at)
                if sign is None:
                    raise self.wrong("a mapping is written {name: value}")
                key = self.text[self.at : sign.start()].strip()
                self.at = sign.end()
            if not key or key in found:
                raise self.wrong(f"the name {key!r} is there twice" if key else "a name is missing")
            found[key] = self.value("," + close)
            self.separated(close)

    def closed(self, close: str) -> bool:
        following = self.skip()
        if not following and close:
            raise self.wrong(f"a {close!r} is missing")
        if following != close:
            return False
        self.at += 1
        return True

    def separated(self, close: str) -> None:
        following = self.skip()
        if following == ",":
            self.at += 1
        elif following != close:
            raise self.wrong(f"a {(close or ',')!r} is missing")

    def quoted(self, sign: str) -> Quoted:
        if sign == '"':
            try:
                text, length = json.JSONDecoder().raw_decode(self.text[self.at :])
            except ValueError:
                raise self.wrong("a quote is not closed") from None
            self.at += length
            return Quoted(text)
        found = re.compile(r"'((?:[^']|'')*)'").match(self.text, self.at)
        if found is None:
            raise self.wrong("a quote is not closed")
        self.at = found.end()
        return Quoted(found[1].replace("''", "'"))

    def bare(self, stops: str) -> str:
        """Up to a separator; brackets within, as of a pattern `a.[0-3].b`, have to be closed."""
        start, open_ = self.at, ""
        while self.at < len(self.text):
            sign = self.text[self.at]
            if not open_ and sign in stops:
                break
            if sign in "[{":
                open_ += "]" if sign == "[" else "}"
            elif open_ and sign == open_[-1]:
                open_ = open_[:-1]
            self.at += 1
        if open_:
            raise self.wrong(f"a {open_[-1]!r} is missing")
        return self.text[start : self.at].strip()


def converted(found: Any, annotation: Any, field: str) -> Any:
    """What `parsed` found, with numbers and words where the type takes others than text."""
    if isinstance(found, list):
        inner = listed(annotation)
        return [converted(item, object if inner is None else inner, field) for item in found]
    if isinstance(found, dict):
        inner = mapped(annotation)
        return {k: converted(v, object if inner is None else inner, field) for k, v in found.items()}
    if isinstance(found, Quoted) or textual(annotation):
        return str(found)
    return scalar(found, annotation, field)


def scalar(text: str, annotation: Any, field: str) -> Any:
    if text in WORDS and not (numeric(annotation) and isinstance(WORDS[text], bool)):
        return WORDS[text]
    number = number_of(text, field)
    if number is None:
        if numeric(annotation):
            raise BadInput(
                f"{field}: {text!r} is not a number; write it in digits, as 90, 0.5 or 1e-3"
                + (", or true or false" if bool in kinds(annotation) else "")
            )
        return text
    return number


def number_of(text: str, field: str = "value") -> int | float | None:
    """One of JSON's numbers (a plus, `.5` and `5.` too); None for any other text."""
    if not NUMBER.fullmatch(text) or re.match(r"[-+]?0\d", text):
        return None
    if INTEGER.fullmatch(text):
        if len(text) > LONGEST:
            raise BadInput(f"{field}: a number of {len(text)} digits is not accepted")
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise BadInput(f"{field}: {text!r} is too large for a number; the largest is 1.8e308")
    return value


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def check_numbers(found: Any, annotation: Any, field: str) -> None:
    """Raise `BadInput` where a number is asked for and true, false or text that is no number is given."""
    if isinstance(found, bool | str) and numeric(annotation):
        if isinstance(found, bool) or number_of(found, field) is None:
            raise BadInput(f"{field}: {found!r} is not a number; give one such as 90, 0.5 or 1e-3")
    elif isinstance(found, list | tuple) and listed(annotation) is not None:
        for item, kind in zip(found, members(annotation, len(found)), strict=False):
            check_numbers(item, kind, field)
    elif isinstance(found, dict) and mapped(annotation) is not None:
        for name, item in found.items():
            check_numbers(item, mapped(annotation), f"{field}.{name}")


def members(annotation: Any, count: int) -> list[Any]:
    """The type of each of so many items; a tuple may have one for each place."""
    for kind in kinds(annotation):
        places = get_args(kind)
        if get_origin(kind) is tuple and places and places[-1] is not Ellipsis:
            return list(places)
    return [listed(annotation)] * count


def textual(annotation: Any) -> bool:
    """Whether a type takes any text as it stands: `str`, or a choice of texts."""
    return all(
        kind is str or (bool(get_args(kind)) and all(isinstance(k, str) for k in get_args(kind)))
        for kind in kinds(annotation)
    )


def numeric(annotation: Any) -> bool:
    numbers = [k for k in kinds(annotation) if k is not type(None)]
    return bool(numbers) and all(k in (int, float) for k in numbers)


def listed(annotation: Any) -> Any:
    """The type of a list's items; None when it is no list."""
    for kind in kinds(annotation):
        if get_origin(kind) in (list, tuple):
            return get_args(kind)[0]
        if kind in (list, tuple):
            return object
    return None


def mapped(annotation: Any) -> Any:
    """The type of a mapping's values; None when it is no mapping."""
    for kind in kinds(annotation):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if kind is dict:
            return object
    return None


class Parameters(yaml.SafeLoader):
    """YAML and JSON without what makes surprises of texts: numbers, true, false and null are JSON's."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  # as the base declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases mean nothing here", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"the tag {event.tag} means nothing here", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [str(name) for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is there twice", problem_mark=node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _plain(loader: Parameters, node: Any) -> Any:
    """A scalar: in quotes it is text, else what the command line would read."""
    if node.style is not None:
        return node.value
    if node.value == "":
        return None
    if node.value in WORDS:
        return WORDS[node.value]
    number = number_of(node.value)
    return node.value if number is None else number


def reads_otherwise(text: str) -> bool:
    """Whether a text without quotes is a number or a word that stands for another value."""
    try:
        return text in WORDS or number_of(text) is not None
    except BadInput:  # a number that is none, as 1e400
        return True


Parameters.add_constructor("tag:yaml.org,2002:str", _plain)


def read_file(file: str | os.PathLike[str], field: str = "parameters") -> dict[str, Any]:
    """Names and values from a YAML or JSON file; `BadInput` for anything else."""
    path = Path(file)
    if not os.path.isfile(path):  # which is False, and no error, for a name that no file can have
        raise BadInput(f"{field}: {str(file)!r} is not a file")
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(
                f"{field}: {str(file)!r} is larger than {LARGEST} bytes, so it holds no parameters"
            )
        found = yaml.load(path.read_text(encoding="utf-8"), Parameters)  # a loader of plain data
    except (yaml.YAMLError, OSError, ValueError, RecursionError, TypeError) as error:
        if isinstance(error, BadInput):
            raise BadInput(f"{field}: {str(file)!r}: {str(error).removeprefix('value: ')}") from None
        raise BadInput(f"{field}: {str(file)!r} is not YAML or JSON: {told(error)}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise BadInput(f"{field}: {str(file)!r} must hold names and values")
    return found


def told(error: Exception) -> str:
    """A parser's error as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())}"
    if isinstance(error, RecursionError):
        return "it has too many brackets in brackets"
    return " ".join(str(error).split())[:200]
