"""A tokenizer as the metadata of a GGUF file: its words, their kinds, and how they are put together.

Two kinds have a place there that both llama.cpp and `transformers` read: byte-level BPE ("gpt2": merges, and
the name of the rule that cuts a text first) and BPE with byte fall-back, as SentencePiece's models become
("llama": scores, which are the order of the merges). What a file says is read back and compared on texts
before anything large is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import BadInput, notice
from workbench.subjects.checkpoints import open_tokenizer

#: llama.cpp's numbers for kinds of words (`llama_token_type`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Rules that cut a text before byte-level BPE -> llama.cpp's name; those with an expression of their own are
#: looked up in what `transformers` reads.
GPT2, DIGITS = "gpt-2", "smollm"
#: Names that are written where several stand for the same expression.
PREFERRED = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")
#: Texts whose ids have to come back as they are.
TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs, it's 2048.",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 22, 333]}\n\n\n",
    "  two spaces, \ttabs\t\tand   a trailing blank ",
    "na\u00efve caf\u00e9, \u4f60\u597d, \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443, \U0001f600!",
    "UPPER lower MiXeD x1y2z3 3.14159e-10 <tag> https://example.org/a_b?c=d#e",
    "",
)


def knows_words(tokenizer: Any) -> bool:
    """Whether there is a tokenizer: transformers makes an empty one for a folder without its files."""
    try:
        return tokenizer is not None and len(tokenizer("a")["input_ids"]) > 0
    except Exception:  # one that is not transformers' own is asked for its kind next
        return True


def tokenizer_fields(tokenizer: Any, size: int) -> dict[str, Any]:
    """Key (without "tokenizer.") -> value of a tokenizer for a vocabulary of `size` words. `BadInput` for one
    that has no place in a GGUF file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInput(
            f"gguf: the tokenizer is a {type(tokenizer).__name__}, accepted are those of the tokenizers "
            "library (byte-level BPE, BPE with byte fall-back); set subject.tokenizer to None to leave it out"
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    steps = steps_of(parts["pre_tokenizer"])
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        kind: dict[str, Any] = {"ggml.model": "gpt2", "ggml.pre": rule_of(parts, steps)}
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        kind = {"ggml.model": "llama"}
    else:
        raise no_place(f"is {model['type']}")
    if not merges:
        raise no_place("has no merges, of which a GGUF file needs one at least")
    if any(" " in part for pair in merges for part in pair):
        raise no_place("has merges of words with blanks")
    words, kinds = words_of(tokenizer, parts, size)
    found = kind | {"ggml.tokens": words, "ggml.token_type": kinds}
    if kind["ggml.model"] == "llama":
        found["ggml.scores"] = scores(words, merges)
        found["ggml.add_space_prefix"] = adds_a_blank(parts, steps)
    found["ggml.merges"] = [" ".join(pair) for pair in merges]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"ggml.{key}_token_id"] = int(number)
    ids = tokenizer("a")["input_ids"]
    found["ggml.add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    found["ggml.add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["chat_template"] = template
    return found


def no_place(what: str) -> BadInput:
    return BadInput(
        f"gguf: the tokenizer {what}; accepted are byte-level BPE and BPE with byte fall-back, as both "
        "llama.cpp and transformers read them; set subject.tokenizer to None to leave it out"
    )


def steps_of(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a sequence, or the one that stands alone."""
    if part is None:
        return []
    for inner in ("pretokenizers", "normalizers"):
        if part["type"] == "Sequence" and inner in part:
            return list(part[inner])
    return [part]


def rule_of(parts: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """llama.cpp's name for how a text is cut before byte-level BPE."""
    normal = [step["type"] for step in steps_of(parts["normalizer"])]
    if normal == ["NFC"]:
        notice("gguf: the tokenizer's normalizer NFC has no place in the file; give readers composed text")
    elif normal:
        raise no_place(f"changes texts first ({', '.join(normal)})")
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        before = [step["type"] for step in steps[:-1]]
        if not before and last.get("use_regex", True):
            return GPT2
        if before == ["Digits"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return DIGITS
        if before == ["Split"] and not last.get("use_regex", True):
            expression, splits = steps[0]["pattern"].get("Regex"), known_splits()
            names = [*(name for name in PREFERRED if name in splits), *splits]
            found = next((name for name in names if splits[name] == expression), None)
            if found is not None:
                return found
    raise no_place("cuts texts by a rule that has no name there")


def known_splits() -> Mapping[str, str]:
    """llama.cpp's name -> the expression that `transformers` cuts texts by; empty for a version without."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return {}
    found: Mapping[str, str] = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
    return found


def words_of(tokenizer: Any, parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every word by its number, and its kind; numbers without a word are filled up."""
    numbers = tokenizer.get_vocab()
    beyond = max(numbers.values(), default=-1)
    if beyond >= size:
        raise BadInput(
            f"gguf: the tokenizer has the word number {beyond}, the model's vocabulary {size} words; "
            "give the tokenizer that belongs to the model"
        )
    words, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for word, number in numbers.items():
        words[number], kinds[number] = word, NORMAL
    fallback = parts["model"].get("byte_fallback")
    for number, word in enumerate(words):
        if fallback and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[number] = BYTE
    for added in parts["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = parts["model"].get("unk_token")
    if fallback and unknown in numbers:
        kinds[numbers[unknown]] = UNKNOWN
    return words, kinds


def scores(words: Iterable[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """The order of merges as SentencePiece's scores: the pair that is joined first has the largest."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges, 1):
        ranks.setdefault("".join(pair), rank)
    last = float(-len(merges) - 1)
    return [float(-ranks[word]) if word in ranks else last for word in words]


def adds_a_blank(parts: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text is read as if it began with a blank."""
    if any(step["type"] == "Prepend" for step in steps_of(parts["normalizer"])):
        return True
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)


def check_tokenizer(tokenizer: Any, header: Path, more: Sequence[str] = ()) -> None:
    """`BadInput` unless the tokenizer that `transformers` reads from a GGUF file gives the same ids."""
    again = open_tokenizer(header, local=True)
    if again is None:
        raise no_place("is not read back by transformers")
    for text in (*TEXTS, *more):
        want, got = (list(t(text)["input_ids"]) for t in (tokenizer, again))
        if want != got:
            raise no_place(f"comes back with other ids, of {text[:40]!r} {got[:8]} for {want[:8]}")


def add_tokenizer(writer: Any, fields: Mapping[str, Any]) -> None:
    """Put the fields of a tokenizer into a `gguf.GGUFWriter`."""
    from gguf import GGUFValueType

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    for key, value in fields.items():
        kind = GGUFValueType.ARRAY if isinstance(value, list) else kinds[type(value)]
        writer.add_key_value(f"tokenizer.{key}", value, kind)
