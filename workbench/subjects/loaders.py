"""`workbench.subject(...)`: one function that puts anything on the bench."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput, notice, unknown_name
from workbench.families import import_families, of_own_code
from workbench.progress import Progress
from workbench.results import Result
from workbench.storage import cache_folder
from workbench.storage.forecast import bytes_of
from workbench.storage.resident import on_disk
from workbench.subjects import gguf_files, text
from workbench.subjects import rows as tables
from workbench.subjects.changes import restore_changes
from workbench.subjects.checkpoint_files import check_folder, one_line, read_json
from workbench.subjects.checkpoints import (
    TRUNKS,
    architecture,
    class_of,
    has_class,
    open_model,
    open_tokenizer,
    read_config,
)
from workbench.subjects.classes import Classes
from workbench.subjects.modules import from_module
from workbench.subjects.subject import Split, Subject
from workbench.subjects.tasks import TASK, Task
from workbench.subjects.trial import try_out

HEADS = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "causal-lm": "CausalLM",
    "masked-lm": "MaskedLM",
    "seq2seq-lm": "Seq2SeqLM",
    "image-classification": "ImageClassification",
    "regression": "SequenceClassification",
    "multi-label-classification": "SequenceClassification",
    "semantic-segmentation": "SemanticSegmentation",
    "embedding": "",
}


def builtin_names() -> list[str]:
    from workbench.subjects.registry import BUILTINS

    return sorted(BUILTINS)


def subject(
    source: str | Path | nn.Module,
    *,
    data: str | Path | dict[str, Any] | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    task: str | None = None,
    loss: str | Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    max_length: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    class_axis: int | None = None,
    ignored: int = -100,
    items: Callable[[dict[str, Tensor]], int] | None = None,
    progress: Progress | None = None,
    memory: int | str | None = None,
    **options: Any,
) -> Subject:
    """Put a model on the bench.

    Parameters
    ----------
    source : a built-in name, a folder written by `save_pretrained` or by the workbench, a GGUF file
        ("model.gguf", dequantized), a hub id ("org/name" or "hf:name"), "file.py:function" (a function of
        no arguments, or a value, giving a Subject), or an `nn.Module`.
    data : a CSV / JSONL / Parquet file, a hub data set id ("hf:name"), "random" (token ids or pixels: for
        shape and speed work only), or for a module a dict split -> dict of tensors, or a dict of tensors that
        is split here.
    text_column, label_column, image_column : the columns of `data`.
    task : a name of `workbench.subjects.TASK`; guessed from the checkpoint's class when left out.
    loss : for a module: "cross_entropy", "squared_error" or a function (output, batch)
        -> mean loss over examples, or over `items(batch)` items.
    class_axis, ignored : for a module with cross-entropy: the output's axis of classes (1 in (batch, classes,
        height, width); needed where two axes fit the labels), and the label of what has no target.
    max_length : tokens per example (128, of random inputs 64). max_examples : at most so many rows of `data`
        are used (4096, chosen by `seed`), or so many random ones drawn (96).
    seed : also of a built-in's training, for those that are trained on first use;
        another than 0 is refused by those that ship.
    memory : bytes that what runs on it may hold ("2GB"): the weights of a checkpoint that is narrower than
        float32 then lie in files under the cache, until the subject goes.

    Raises `BadInput` naming what is wrong before any long computation.
    """
    if memory is not None:
        bytes_of(memory)  # refused at once where it is none
    usual_length, usual_examples = (64, 96) if isinstance(data, str) and data == "random" else (128, 4096)
    max_length = usual_length if max_length is None else max_length
    max_examples = usual_examples if max_examples is None else max_examples
    if max_length < 2 or max_examples < 8:
        raise BadInput(
            f"max_length must be at least 2 and max_examples at least 8, got {max_length} and {max_examples}"
        )
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed: {seed} is out of range; accepted: 0 to {2**32 - 1}")
    if isinstance(source, nn.Module):
        return from_module(
            source, data, loss, name or type(source).__name__, seed, class_axis, ignored, items
        )
    source = str(source)
    if source in builtin_names():
        from workbench.subjects.registry import build

        if data is not None:
            raise BadInput(f"data: the built-in subject {source!r} brings its own; leave data out")
        return build(source, progress=progress, **(options | ({"seed": seed} if seed else {})))
    if match := re.fullmatch(r"(.+\.py):(\w+)", source):
        return from_file(Path(match[1]), match[2])
    where = contextlib.nullcontext() if memory is None else on_disk(cache_folder())
    with where:
        return from_place(
            source,
            data=data,
            text_column=text_column,
            label_column=label_column,
            image_column=image_column,
            task=task,
            tokenizer=tokenizer,
            name=name,
            max_length=max_length,
            max_examples=max_examples,
            seed=seed,
        )


def from_place(source: str, *, data: Any, name: str | None, **told: Any) -> Subject:
    """A subject from a folder, a GGUF file or a hub id."""
    folder = Path(source)
    packed = gguf_files.is_gguf(folder)
    local = os.path.isdir(folder) or packed
    if packed:
        gguf_files.check_gguf(folder)
    elif local:
        check_folder(folder)
        if (folder / "workbench.json").is_file() and data is None:
            return from_saved(folder)
    elif not re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?|[\w-][\w.-]*/[\w.-]+", source):
        raise unknown_name(
            "subject",
            source,
            builtin_names(),
            " (built-in), or a folder, a GGUF file, a hub id (org/name or hf:name), or file.py:function",
        )
    return from_checkpoint(
        source if local else source.removeprefix("hf:"),
        local,
        data=data,
        name=name or ((folder.stem if packed else folder.name) if local else source),
        **told,
    )


def from_checkpoint(
    source: str,
    local: bool,
    *,
    data: Any,
    text_column: str | None,
    label_column: str | None,
    image_column: str | None,
    task: str | None,
    tokenizer: Any,
    name: str,
    max_length: int,
    max_examples: int,
    seed: int,
) -> Subject:
    config = read_config(source, local)
    guessed = task or guess_task(config, label_column, image_column)
    kind = TASK.chosen(guessed).value
    if isinstance(data, str) and data != "random" and not data.startswith("hf:") and not os.path.isfile(data):
        raise BadInput(f"data: {data!r} is not a file; give a CSV, JSONL or Parquet file, hf:ID, or random")
    tokenizer = tokenizer or open_tokenizer(source, local, needed=data != "random")
    rows, notes = None, []
    if data is None:
        if guessed not in ("causal-lm", "masked-lm", "seq2seq-lm", "embedding") or tokenizer is None:
            missing = "no tokenizer" if tokenizer is None else f"the task {guessed}"
            raise BadInput(
                f"data: {name!r} needs data (it has {missing}); "
                "give --data FILE with the column names, or --data random for shape and speed work"
            )
        rows = tables.builtin_rows(max_examples)
        notes.append("built-in text: Python standard library source and documentation")
    elif data == "random":
        notes.append("random inputs: for shapes and speed only, losses mean nothing")
    else:
        rows, note = tables.read_rows(data, max_examples, seed)
        tables.check_columns(rows, guessed, text_column, label_column, image_column)
        notes.append(note)
    head = HEADS.get(guessed)
    new = bool(head) and class_of(config, head)[1]
    classes: Classes | None = None
    if rows is not None and guessed in text.CLASSIFIED:
        assert label_column is not None
        rows, hidden = text.visible(rows, label_column)
        classes = text.classes_of(rows, guessed, label_column, config, new)
        notes += [hidden, classes.note]
        tell([hidden, classes.note])
    outputs = None
    if new and guessed == "regression":
        wanted = torch.ones(1) if rows is None else text.numbers(rows[label_column], str(label_column))
        outputs = wanted.shape[1] if wanted.ndim > 1 else 1
    if rows is not None and (instead := text.stand_in(rows)):
        notes.append(instead)
        tell([instead])
    names = classes.names if classes is not None else None
    model, said = open_model(source, local=local, head=head, labels=names, outputs=outputs)
    notes += said
    tell(said)
    settings = text.Columns(
        text_column or "text", label_column or "label", image_column or "image", classes, max_length, seed
    )
    if guessed != "image-classification" and (limit := text.tokens_wanted(model, settings)) < max_length:
        notes.append(f"texts are cut to {limit} tokens, the model's positions")
    if rows is None:
        try:
            splits = text.random_splits(model, guessed, settings, max_examples)
        except BadInput:
            raise
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:
            raise BadInput(
                f"subject: config.json gives no shape for random inputs: {one_line(error)}; "
                "compare it with the original"
            ) from None
    else:
        splits = text.encode(rows, guessed, tokenizer, model, settings)
    built: Task = kind()
    made = Subject(
        name,
        model,
        built,
        splits,
        tokenizer=tokenizer,
        labels=names,
        data_note="; ".join(note for note in notes if note),
        origin={"source": source if not local else "folder"},
    )
    try_out(made)
    return text.self_targets(made) if guessed == "embedding" else made


def tell(notes: list[str]) -> None:
    """What whoever opens a model should not miss, a line each."""
    for note in notes:
        if note:
            notice(f"subject: {note}")


def guess_task(config: Any, label_column: str | None, image_column: str | None) -> str:
    """The task from the checkpoint's class, else from the columns given."""
    name = architecture(config)
    for head, task in (
        ("Seq2SeqLM", "seq2seq-lm"),
        ("SequenceClassification", "sequence-classification"),
        ("TokenClassification", "token-classification"),
        ("ImageClassification", "image-classification"),
        ("SemanticSegmentation", "semantic-segmentation"),
        ("MaskedLM", "masked-lm"),
        ("CausalLM", "causal-lm"),
    ):
        if has_class(name, head) or name.endswith(f"For{head}"):
            return of_problem(config) if task == "sequence-classification" else task
    if name.endswith("ForPreTraining"):
        return "masked-lm"
    if name.endswith("LMHeadModel"):
        return "causal-lm"
    if image_column or (label_column and hasattr(config, "num_channels")):
        return "image-classification"
    if label_column:
        return "sequence-classification"
    if name and not name.endswith(TRUNKS):
        raise BadInput(
            f"task: {name[:80]} is none of the classes that the bench has a task for; accepted: "
            "task=embedding for its hidden states, or a label column for a new head"
        )
    return "embedding"


def of_problem(config: Any) -> str:
    """The task of a classifier of texts, as transformers decides it."""
    kind = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else "")
    return {
        "regression": "regression",
        "multi_label_classification": "multi-label-classification",
    }.get(str(kind), "sequence-classification")


def from_saved(folder: Path) -> Subject:
    """Open a folder the workbench wrote, with its changes and its splits."""
    from safetensors.torch import load_file, load_model

    note = saved_note(folder)
    stored = load_file(folder / "splits.safetensors")
    splits: dict[str, Split] = {}
    for key, value in stored.items():
        split, slash, column = key.partition("/")
        if not slash:
            raise BadInput(
                f"subject: splits.safetensors: {key[:60]!r} is no split/column; copy or save it again"
            )
        splits.setdefault(split, {})[column] = value
    check_alike(splits)
    if (folder / "config.json").is_file():
        model, said = open_model(folder, local=True)
        tell(said)
        tokenizer = open_tokenizer(folder, True)
    else:
        from workbench.subjects.registry import skeleton

        built = skeleton(note["origin"].get("builtin", ""))
        if built is None:
            raise BadInput(
                f"subject: {str(folder)!r} was saved from a plain module, whose code is not in the folder; "
                "build the module and pass it to workbench.subject"
            )
        model, tokenizer = built, None
        try:
            load_model(model, str(folder / "model.safetensors"))
        except (RuntimeError, OSError) as error:
            raise BadInput(
                f"subject: model.safetensors does not fit the built-in: {one_line(error)}; save it again"
            ) from None
    changes, frozen = note["changes"], note.get("frozen", [])
    if not isinstance(frozen, list):
        raise BadInput("subject: workbench.json: frozen is no list of names; save the subject again")
    try:
        if note.get("removed"):
            from workbench.subjects.structure.removal import again

            again(model, note["removed"])
        if changes:
            import_families()  # registers the changes they define
            restore_changes(model, changes, load_file(folder / "changes.safetensors"))
    except BadInput:
        raise
    except Exception as error:  # what a damaged file makes of a change
        raise BadInput(
            f"subject: workbench.json and changes.safetensors do not fit the model: {one_line(error)}; "
            "copy or save the subject again"
        ) from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    made = Subject(
        note["name"],
        model.eval(),
        TASK.chosen(note["task"]).value(),
        splits,
        tokenizer=tokenizer,
        data_note=note["data_note"],
        labels=note["labels"],
        history=note["history"],
        origin=note["origin"],
    )
    try_out(made, padding=False)
    return made


def check_alike(splits: dict[str, Split]) -> None:
    """`BadInput` unless every split of a saved subject has the columns of the first, in its types and with as
    many rows each.
    """
    wanted = {c: (v.dtype, v.shape[1:]) for split in list(splits.values())[:1] for c, v in split.items()}
    for name, split in splits.items():
        held = {c: (v.dtype, v.shape[1:]) for c, v in split.items()}
        rows = {len(v) if v.ndim else 0 for v in split.values()}
        if held.keys() != wanted.keys():
            wrong = f"has the columns {', '.join(sorted(held))}, not {', '.join(sorted(wanted))}"
        elif other := [
            c for c in wanted if held[c][0] != wanted[c][0] or len(held[c][1]) != len(wanted[c][1])
        ]:
            wrong = f"has another type or other dimensions of {other[0]}"
        elif len(rows) != 1 or 0 in rows:
            wrong = f"has columns of {', '.join(map(str, sorted(rows)))} rows"
        else:
            continue
        raise BadInput(
            f"subject: splits.safetensors: the split {name[:40]!r} {wrong[:200]}; "
            "copy or save the subject again"
        )


NOTED: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "task": str,
    "data_note": str,
    "labels": (list, type(None)),
    "history": list,
    "origin": dict,
    "changes": (list, dict),
}


def saved_note(folder: Path) -> dict[str, Any]:
    """What `workbench.json` says of a saved subject, checked field by field."""
    note = read_json(folder / "workbench.json")
    for field, kind in NOTED.items():
        if field not in note or not isinstance(note[field], kind):
            raise BadInput(
                f"subject: workbench.json: {field} is {str(note.get(field, 'missing'))[:60]!r}; "
                "copy or save the subject again"
            )
    if not (folder / "splits.safetensors").is_file():
        raise BadInput(f"subject: {str(folder)!r} lacks splits.safetensors; copy or save the subject again")
    if note["changes"] and not (folder / "changes.safetensors").is_file():
        raise BadInput(f"subject: {str(folder)!r} lacks changes.safetensors; copy or save the subject again")
    return note


def from_file(file: Path, attribute: str) -> Subject:
    """Run a Python file of the user's own and take a Subject (or a function giving one) from it."""
    if not os.path.isfile(file):
        raise BadInput(f"subject: {str(file)!r} is not a file; give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, attribute):
            raise BadInput(
                f"subject: {str(file)!r} has no {attribute!r}; it defines "
                f"{', '.join(n for n in vars(module) if not n.startswith('_'))}"
            )
        made = getattr(module, attribute)
        made = made() if callable(made) and not isinstance(made, Subject) else made
    except BadInput:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise BadInput(f"subject: {str(file)!r} failed: {of_own_code(error, file)}") from error
    if not isinstance(made, Subject):
        raise BadInput(
            f"subject: {attribute!r} in {str(file)!r} gives {type(made).__name__}, a Subject is needed; "
            "build it with workbench.subject(module, data=...)"
        )
    return made


Result.opens = subject
