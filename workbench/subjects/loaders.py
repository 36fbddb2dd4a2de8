"""`workbench.subject(...)`: one function that puts anything on the bench."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput, unknown_name
from workbench.families import import_families
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import gguf_files, text
from workbench.subjects.changes import restore_changes
from workbench.subjects.checkpoints import check_folder, open_model, open_tokenizer
from workbench.subjects.subject import Split, Subject
from workbench.subjects.tasks import TASK, CustomLoss, Task
from workbench.subjects.text import cut

HEADS = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "causal-lm": "CausalLM",
    "masked-lm": "MaskedLM",
    "seq2seq-lm": "Seq2SeqLM",
    "image-classification": "ImageClassification",
    "regression": "SequenceClassification",
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
    max_length: int = 128,
    max_examples: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Subject:
    """Put a model on the bench.

    Parameters
    ----------
    source : a built-in name, a folder written by `save_pretrained` or by the workbench, a GGUF file
        ("model.gguf", dequantized), a hub id ("org/name" or "hf:name"),
        "file.py:function" (a function of no arguments, or a value,
        giving a Subject), or an `nn.Module`.
    data : a CSV / JSONL / Parquet file, a hub data set id ("hf:name"), "random" (token ids or pixels: for
        shape and speed work only), or for a module a dict split -> dict of tensors, or a dict of tensors that
        is split here.
    text_column, label_column, image_column : the columns of `data`.
    task : a name of `workbench.subjects.TASK`; guessed from the checkpoint's class when left out.
    loss : for a module: "cross_entropy", "squared_error" or a function (output, batch)
        -> mean loss over examples.
    max_length : tokens per example. max_examples : at most so many rows of `data` are used
        (chosen by `seed`).
    seed : also of a built-in's training, for those that are trained on first use;
        another than 0 is refused by those that ship.

    Raises `BadInput` naming what is wrong before any long computation.
    """
    if max_length < 2 or max_examples < 8:
        raise BadInput(
            f"max_length must be at least 2 and max_examples at least 8, got {max_length} and {max_examples}"
        )
    if isinstance(source, nn.Module):
        return from_module(source, data, loss, name or type(source).__name__, seed)
    source = str(source)
    if source in builtin_names():
        from workbench.subjects.registry import build

        if data is not None:
            raise BadInput(f"data: the built-in subject {source!r} brings its own; leave data out")
        return build(source, progress=progress, **(options | ({"seed": seed} if seed else {})))
    if match := re.fullmatch(r"(.+\.py):(\w+)", source):
        return from_file(Path(match[1]), match[2])
    folder = Path(source)
    local = folder.is_dir() or gguf_files.is_gguf(folder)
    if gguf_files.is_gguf(folder):
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
        data,
        text_column,
        label_column,
        image_column,
        task,
        tokenizer,
        name or ((folder.stem if gguf_files.is_gguf(folder) else folder.name) if local else source),
        max_length,
        max_examples,
        seed,
    )


def from_checkpoint(
    source: str,
    local: bool,
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
    if isinstance(data, str) and data != "random" and not data.startswith("hf:") and not Path(data).is_file():
        raise BadInput(f"data: {data!r} is not a file; give a CSV, JSONL or Parquet file, hf:ID, or random")
    tokenizer = tokenizer or open_tokenizer(source, local)
    rows = None
    if data is None:
        if guessed not in ("causal-lm", "masked-lm", "seq2seq-lm", "embedding") or tokenizer is None:
            missing = "no tokenizer" if tokenizer is None else f"the task {guessed}"
            raise BadInput(
                f"data: {name!r} needs data (it has {missing}); "
                "give --data FILE with the column names, or --data random for shape and speed work"
            )
        rows, note = (
            text.builtin_rows(max_examples),
            "built-in text: Python standard library source and documentation",
        )
    elif data == "random":
        note = "random inputs: for shapes and speed only, losses mean nothing"
    else:
        rows, note = text.read_rows(data, max_examples, seed)
        text.check_columns(rows, guessed, text_column, label_column, image_column)
    names = (
        text.label_names(rows, label_column)
        if rows is not None and guessed in ("sequence-classification", "image-classification")
        else None
    )
    model, head_note = open_model(
        source, local=local, head=HEADS.get(guessed), labels=len(names) if names else None
    )
    settings = text.Columns(
        text_column or "text", label_column or "label", image_column or "image", names, max_length, seed
    )
    if rows is None:
        splits = text.random_splits(model, guessed, settings)
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
        data_note=note + (f"; {head_note}" if head_note else ""),
        origin={"source": source if not local else "folder"},
    )
    return text.self_targets(made) if guessed == "embedding" else made


def read_config(source: str, local: bool) -> Any:
    import transformers

    if gguf_files.is_gguf(source):
        return gguf_files.gguf_config(Path(source))
    try:
        return transformers.AutoConfig.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"subject: {source!r} could not be opened: {str(error).strip().splitlines()[0]}"
        ) from None


def guess_task(config: Any, label_column: str | None, image_column: str | None) -> str:
    """The task from the checkpoint's class, else from the columns given."""
    name = (getattr(config, "architectures", None) or [""])[0]
    for ending, task in (
        ("ForSequenceClassification", "sequence-classification"),
        ("ForTokenClassification", "token-classification"),
        ("ForImageClassification", "image-classification"),
        ("ForMaskedLM", "masked-lm"),
        ("ForPreTraining", "masked-lm"),
        ("ForConditionalGeneration", "seq2seq-lm"),
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
    ):
        if name.endswith(ending):
            kind = getattr(config, "problem_type", None) or (
                "regression" if getattr(config, "num_labels", 2) == 1 else None
            )  # as transformers decides it
            return "regression" if task == "sequence-classification" and kind == "regression" else task
    if image_column or (label_column and hasattr(config, "num_channels")):
        return "image-classification"
    if label_column:
        return "sequence-classification"
    return "embedding"


def from_saved(folder: Path) -> Subject:
    """Open a folder the workbench wrote, with its changes and its splits."""
    from safetensors.torch import load_file, load_model

    note = json.loads((folder / "workbench.json").read_text())
    stored = load_file(folder / "splits.safetensors")
    splits: dict[str, Split] = {}
    for key, value in stored.items():
        split, column = key.split("/", 1)
        splits.setdefault(split, {})[column] = value
    if (folder / "config.json").is_file():
        model, _ = open_model(folder, local=True)
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
        load_model(model, str(folder / "model.safetensors"))
    if note.get("removed"):
        from workbench.subjects.structure.removal import again

        again(model, note["removed"])
    if note["changes"]:
        import_families()  # registers the changes they define
        restore_changes(model, note["changes"], load_file(folder / "changes.safetensors"))
    return Subject(
        note["name"],
        model.eval(),
        TASK[note["task"]].value(),
        splits,
        tokenizer=tokenizer,
        data_note=note["data_note"],
        labels=note["labels"],
        history=note["history"],
        origin=note["origin"],
    )


def from_file(file: Path, attribute: str) -> Subject:
    """Run a Python file of the user's own and take a Subject (or a function giving one) from it."""
    if not file.is_file():
        raise BadInput(f"subject: {str(file)!r} is not a file; give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise BadInput(
            f"subject: {str(file)!r} has no {attribute!r}; it defines "
            f"{', '.join(n for n in vars(module) if not n.startswith('_'))}"
        )
    made = getattr(module, attribute)
    made = made() if callable(made) and not isinstance(made, Subject) else made
    if not isinstance(made, Subject):
        raise BadInput(
            f"subject: {attribute!r} in {str(file)!r} gives {type(made).__name__}, a Subject is needed; "
            "build it with workbench.subject(module, data=...)"
        )
    return made


def from_module(module: nn.Module, data: Any, loss: Any, name: str, seed: int) -> Subject:
    """A plain module called as `module(inputs)`; data holds tensors `inputs` and `labels`."""
    if not isinstance(data, dict) or not data:
        raise BadInput(
            "data: a plain module needs data={'inputs': tensor, 'labels': "
            "tensor}, or one such dict for each split"
        )
    if not any(True for _ in module.parameters()):
        raise BadInput("subject: the module has no parameters; there is nothing to measure or compress")
    splits = data if all(isinstance(v, dict) for v in data.values()) else cut(data, seed)
    first = next(iter(splits.values()))
    if "inputs" not in first or ("labels" not in first and not callable(loss)):
        raise BadInput(f"data: columns are {', '.join(first)}; inputs and labels are needed")
    kinds = {"cross_entropy": "classification", "squared_error": "module-regression"}
    if loss is None:
        loss = "cross_entropy" if not first["labels"].is_floating_point() else "squared_error"
    if not callable(loss) and loss not in kinds:
        raise BadInput(
            f"loss: {loss!r} is unknown; give cross_entropy, squared_error or a function (output, "
            "batch) -> scalar"
        )
    task: Task = CustomLoss(function=loss) if callable(loss) else TASK[kinds[loss]].value()
    made = Subject(name, module.eval(), task, splits, data_note="tensors given in Python")
    try:
        with torch.no_grad():
            value = made.loss(next(made.batches(next(iter(splits)), 2)))
    except (RuntimeError, TypeError, IndexError) as error:
        raise BadInput(
            f"data: the module failed on the first two examples: {str(error).splitlines()[0]}"
        ) from None
    if value.ndim != 0:
        raise BadInput(f"loss: must be a scalar mean over examples, got shape {tuple(value.shape)}")
    return made


Result.opens = subject
