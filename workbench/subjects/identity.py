"""What names a subject's state: contents of its tensors, how its modules are put together and set, the code
of those that are the user's, its task, its data, its tokenizer.

Hashing everything takes a moment for each hundred megabytes, so it is done when something has changed. What
torch counts (`_version`) is not enough to tell: writes through `.data`, NumPy or another process's shared
memory are not counted, and a layer that was replaced brings counters of its own. So a state is recognised
by identity and counters of all tensors, by the text of everything that is no tensor, and by `glance`, sums of
all bytes at the speed of memory.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.keys.live_code import PLAIN, Reader, computes_something, counts, owner
from workbench.storage.resident import let_go
from workbench.subjects.changes import describe_changes

#: What `torch.nn.Module` itself keeps on every module.
KEPT_BY_TORCH = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Where a checkpoint lies and what wrote it; set by transformers, and without effect on a number.
PLACES = frozenset({"_name_or_path", "name_or_path", "transformers_version", "architectures"})
#: Attributes that modules of transformers write while they compute.
WRITTEN_BY_USE = frozenset({"warnings_issued", "max_seq_len_cached", "name_or_path"})
Splits = Mapping[str, Mapping[str, Tensor]]
SMALL = 1 << 16
ROW = 1024


@dataclass(frozen=True)
class Seen:
    """What a state is recognised by: (model, counters, structure, glance) and
    (counters, glance, settings); of a model that was not made yet, nothing.
    """

    model: tuple[Any, ...]
    data: tuple[Any, ...]

    def counted(self, model: nn.Module | None, splits: Splits) -> bool:
        """True while nothing that torch counts has changed."""
        if counters(named_tensors(None, splits)) != self.data[0]:
            return False
        return model is None or (id(model), counters(named_tensors(model, {}))) == self.model[:2]


def look(model: nn.Module | None, splits: Splits, settings: str) -> Seen:
    state, data = list(named_tensors(model, {})), list(named_tensors(None, splits))
    built = structure(model) if model is not None else ""
    return Seen(
        (id(model), counters(state), built, glance(state)),
        (counters(data), glance(data), settings),
    )


def content(model: nn.Module, splits: Splits, settings: str) -> str:
    """Hash of everything that a number measured on a subject depends on."""
    total = hashlib.sha256()
    total.update(structure(model).encode())
    total.update(json.dumps(describe_changes(model)[0], sort_keys=True).encode())
    total.update(settings.encode())
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in sorted(named_tensors(model, splits), key=lambda pair: pair[0]):
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        total.update(f"{name} {tuple(value.shape)} {value.dtype} {seen.get(place, '')}".encode())
        if seen.setdefault(place, name) == name:
            total.update(memory_of(value))
            let_go([value])
    return total.hexdigest()[:24]


def named_tensors(model: nn.Module | None, splits: Splits) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, buffer (kept in checkpoints or not) and column of the data, with a name."""
    for path, module in model.named_modules(remove_duplicate=False) if model is not None else ():
        for group in (module._parameters, module._buffers):
            yield from ((f"{path}.{key}", value) for key, value in group.items() if value is not None)
    for split, columns in splits.items():
        yield from ((f"data {split}/{column}", value) for column, value in columns.items())


def memory_of(value: Tensor) -> memoryview | bytes:
    """The bytes of a tensor, where they are."""
    if not value.numel():
        return b""
    raw: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def structure(model: nn.Module) -> str:
    """Modules by path: class (and its code where it is the user's), settings, hooks; the configuration."""
    reader = Reader()
    lines = [configuration(getattr(model, "config", None))]
    known: dict[type, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in known:
            known[kind] = reader.text(kind) if has_user_code(kind) else f"{kind.__module__}.{kind.__name__}"
        hooks = [list(vars(module).get(name, {}).values()) for name in HOOKS]
        told = reader.text(hooks) if any(hooks) else ""
        lines.append(f"{path} {known[kind]} {settings_of(module, reader)} {told}{learning(module, reader)}")
    return "\n".join(lines)


def learning(module: nn.Module, reader: Reader) -> str:
    """What decides over gradients: parameters that are frozen, hooks on the others; most have neither."""
    told = []
    for name, value in module._parameters.items():
        if value is not None and not value.requires_grad:
            told.append(f" {name} is frozen")
        elif value is not None and value._backward_hooks:
            told.append(f" {name} {reader.text(list(value._backward_hooks.values()))}")
    return "".join(told)


def has_user_code(kind: type) -> bool:
    return any(owner(base) != "library" for base in kind.__mro__)


def settings_of(module: nn.Module, reader: Reader) -> str:
    """Numbers, texts and functions that a module holds: an epsilon, a scale, an activation; of a user's
    module whatever its code may read, a namespace or an object of the user's own class among it.
    """
    whose = owner(type(module))
    reads, told = counts if whose == "user" else computes_something, whose != "library"
    found = []
    for name, value in vars(module).items():
        if name in KEPT_BY_TORCH or name in WRITTEN_BY_USE or (name.startswith("_") and not told):
            continue
        if type(value) in PLAIN:
            found.append(f"{name}={value!r}")
        elif reads(value):
            found.append(f"{name}={reader.text(value)}")
    return "; ".join(sorted(found))


def configuration(config: Any) -> str:
    if config is None or not hasattr(config, "to_dict"):
        return ""
    kept = {key: value for key, value in config.to_dict().items() if key not in PLACES}
    kernel = getattr(config, "_attn_implementation", "")
    return json.dumps(kept, sort_keys=True, default=repr) + str(kernel)


def settings(task: Any, labels: Any, tokenizer: Any) -> str:
    """Of what is neither model nor data: the task with its numbers and the user's code in it, the names
    of the classes, the tokenizer.
    """
    kind = type(task)
    reader = Reader()
    code = reader.text(kind) if has_user_code(kind) and owner(kind) != "package" else kind.__qualname__
    return f"{task.name} {code} {reader.text(vars(task))} {labels} {tokenizer_text(tokenizer)}"


def tokenizer_text(tokenizer: Any) -> str:
    """How a tokenizer cuts text: its class, vocabulary, rules, special tokens and sides.

    What a call sets for itself (truncation, padding) and where it was read from are left out.
    """
    if tokenizer is None:
        return ""
    names = (
        "padding_side",
        "truncation_side",
        "model_max_length",
        "chat_template",
        "clean_up_tokenization_spaces",
    )
    told = [f"{name}={getattr(tokenizer, name, None)!r}" for name in names]
    told.append(repr(sorted(map(str, getattr(tokenizer, "all_special_tokens", ())))))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = backend.to_str().partition('"added_tokens"')[2]
        told.append(hashlib.sha256(rules.encode()).hexdigest())
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True, default=repr)
        told.append(hashlib.sha256(vocabulary.encode()).hexdigest())
    else:
        told.append(Reader().text(vars(tokenizer) if hasattr(tokenizer, "__dict__") else repr(tokenizer)))
    return f"{type(tokenizer).__name__} {' '.join(told)}"


def counters(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...]:
    """Identity and version of tensors: what torch notices of a change, at no cost."""
    return tuple((name, id(value), value._version, value.data_ptr()) for name, value in tensors)


def glance(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """A checksum of all contents, to see writes that torch does not count: of small tensors their CRC, of
    large ones sums of their bytes along both sides of a matrix.
    """
    total = 0
    for _, value in tensors:
        flat = value.detach().contiguous().view(-1)
        if not flat.numel() or flat.is_meta:
            continue
        raw = flat.view(torch.uint8)
        if raw.numel() > SMALL and raw.data_ptr() % 8 == 0:
            whole = raw.numel() // (8 * ROW) * 8 * ROW
            rows = raw[:whole].view(torch.int64).view(-1, ROW)
            total = zlib.crc32(memory_of(torch.cat((rows.sum(0), rows.sum(1)))), total)
            raw = raw[whole:]
        total = zlib.crc32(memory_of(raw), total)
        let_go([value])
    return total


def files_in(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of the files in a folder."""
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}


def sha256_of(file: Path) -> str:
    """Of a file of any size: a part of it is held at a time."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def saved_as(folder: Path) -> str:
    """The fingerprint of the subject that a folder was written from; empty when the folder does not tell,
    or when a file is not as it was written.
    """
    note = folder / "workbench.json"
    if not note.is_file():
        return ""
    told = json.loads(note.read_text())
    files = told.get("files", {})
    found = files_in(folder)
    kept = bool(files) and all(found.get(name) == value for name, value in files.items())
    return str(told.get("fingerprint", "")) if kept else ""
