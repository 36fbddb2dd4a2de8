"""Damage to bytes, texts and JSON values, drawn from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

#: Texts that readers take for something else than they are, or choke on.
TOKENS = (
    *("1:30", "0b11", "1_000", "1e400", "-1e400", "0x1F", "007", "+5", ".5", "5.", "1e-400", "١٢"),
    *("NaN", "nan", "Infinity", "-inf", "null", "None", "true", "True", "~", "on", "yes", ""),
    *("2147483648", "-9223372036854775809", "9" * 30, "9" * 500, "1" + "0" * 5000, "-0", "-1", "0", "0.0"),
    *("'", '"', "\\", "\0", "\ufeff", "\u202e", "é", "😀", "\ud83d", "a" * 3000, " ", "\t", "\r\n", "\n"),
    *("[" * 30, "{" * 30, "[" * 5000, '{"a":' * 2000, "]", "}", ",", ":", "=", "#", "%", "&", "*", "|", ">"),
    *("../../etc/passwd", "/dev/zero", "/", ".", "..", "~root", "$HOME", "`id`", "%s%n", "{0}", "<b>"),
    *("!!python/object/apply:os.system", "&a [*a]", "<<: *a", "? x", "- x", "---", "...", "!!int 3"),
)
#: Values that are not what a field holds.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, 2**63, -(10**9), 10**400, 0.0, 0.5, -1.5, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "1", "1e400", "NaN", "a" * 500, "\0", "../x"),
    *([], [1], [0, -1], [[]], [None], {}, {"a": 1}, {"": None}, "tensor:", "tensor:0tensor:x", ["x"] * 50),
)


def value(draw: random.Random, before: Any, depth: int = 0) -> Any:
    """Another value in the place of one: nearby, inside it, or of another kind."""
    if isinstance(before, dict) and before and draw.random() < 0.75 and depth < 12:
        key = draw.choice(list(before))
        what = draw.random()
        if what < 0.1:
            return {k: v for k, v in before.items() if k != key}
        if what < 0.2:
            return {(draw.choice(TOKENS) if k == key else k): v for k, v in before.items()}
        if what < 0.28 and len(before) > 1:
            other = draw.choice(list(before))
            return before | {key: before[other], other: before[key]}
        return before | {key: value(draw, before[key], depth + 1)}
    if isinstance(before, list) and before and draw.random() < 0.75 and depth < 12:
        place = draw.randrange(len(before))
        what = draw.random()
        if what < 0.1:
            return before[:place]
        if what < 0.2:
            return before + before[place:]
        return [*before[:place], value(draw, before[place], depth + 1), *before[place + 1 :]]
    if isinstance(before, (int, float)) and not isinstance(before, bool) and draw.random() < 0.5:
        return draw.choice([-before, before + 1, before - 1, before * 1000, str(before), [before]])
    if isinstance(before, str) and before and draw.random() < 0.4:
        return text(draw, before)
    return draw.choice(VALUES)


def nested(draw: random.Random) -> Any:
    """A value in brackets in brackets."""
    found: Any = draw.choice(VALUES)
    for _ in range(draw.choice([5, 50, 200])):
        found = [found] if draw.random() < 0.5 else {"a": found}
    return found


def as_json(draw: random.Random, content: Any) -> str:
    """The content with a few values changed, mostly still JSON."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        content = value(draw, content)
    if draw.random() < 0.03:
        content = nested(draw)
    try:
        written = json.dumps(content)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        written = "[" * 20_000
    return text(draw, written) if draw.random() < 0.15 else written


def text(draw: random.Random, before: str, tokens: tuple[str, ...] = TOKENS) -> str:
    """Cut, doubled, shuffled, or with a strange piece in it."""
    found = before
    for _ in range(draw.choice([1, 1, 2, 3])):
        if not found:
            return draw.choice(tokens)
        place, length = draw.randrange(len(found)), draw.choice([1, 1, 2, 5, 20])
        what = draw.randrange(7)
        if what == 0:
            found = found[:place]
        elif what == 1:
            found = found[:place] + found[place + length :]
        elif what == 2:
            found = found[:place] + draw.choice(tokens) + found[place:]
        elif what == 3:
            found = found[:place] + draw.choice(tokens) + found[place + length :]
        elif what == 4:
            found = found[:place] + found[place : place + length] * draw.choice([2, 3, 40]) + found[place:]
        elif what == 5:
            lines = found.splitlines(keepends=True)
            draw.shuffle(lines)
            found = "".join(lines)
        else:
            found = found[:place] + chr(draw.randrange(0x250)) + found[place + 1 :]
    return found


def encoded(written: str) -> bytes:
    """UTF-8, lone surrogates too."""
    return written.encode("utf-8", "surrogatepass")


def json_header(draw: random.Random, file: Path) -> None:
    """The JSON at the front of a safetensors file changed, its length told right."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = encoded(as_json(draw, json.loads(data[8 : 8 + length])))
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def damaged(draw: random.Random, content: bytes, first: int = 0) -> bytes:
    """Bits turned, pieces cut out, doubled or overwritten; `first`: mostly within so many bytes."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if not found:
            break
        near = first if first and draw.random() < 0.8 else len(found)
        place, length = draw.randrange(min(near, len(found))), draw.choice([1, 2, 4, 8, 100])
        what = draw.randrange(7)
        if what == 0:
            del found[place:]
        elif what == 1:
            del found[place : place + length]
        elif what == 2:
            found[place : place + length] = draw.randbytes(length)
        elif what == 3:
            found[place:place] = found[place : place + length]
        elif what == 4:
            found[place] ^= 1 << draw.randrange(8)
        elif what == 5:
            odd = draw.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1, 10**6])
            found[place : place + 8] = odd.to_bytes(8, "little")
        else:
            found[place : place + length] = bytes([draw.choice([0, 255, 10, 34, 91, 123])]) * length
    return bytes(found)
