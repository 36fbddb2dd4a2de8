"""`workbench.subject(...)`: one function that puts anything on the bench."""

from __future__ import annotations

import importlib.util
import math
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
from workbench.subjects import rows as tables
from workbench.subjects import text
from workbench.subjects.changes import restore_changes
from workbench.subjects.checkpoint_files import check_folder, one_line, read_json
from workbench.subjects.checkpoints import class_of, has_class, open_model, open_tokenizer, read_config
from workbench.subjects.classes import Classes
from workbench.subjects.subject import Split, Subject
from workbench.subjects.tasks import TASK, CustomLoss, ModuleTask, Task
from workbench.subjects.text import cut

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
    class_axis: int | None = None,
    ignored: int = -100,
    items: Callable[[dict[str, Tensor]], int] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Subject:
    """Put a model on the bench.

    Parameters
    ----------
    source : a built-in name, a folder written by `save_pretrained` or by the workbench, a hub id ("org/name"
        or "hf:name"), "file.py:function" (a function of no arguments, or a value,
        giving a Subject), or an `nn.Module`.
    data : a CSV / JSONL / Parquet file, a hub data set id ("hf:name"), "random" (token ids or pixels: for
        shape and speed work only), or for a module a dict split -> dict of tensors, or a dict of tensors that
        is split here.
    text_column, label_column, image_column : the columns of `data`.
    task : a name of `workbench.subjects.TASK`; guessed from the checkpoint's class when left out.
    loss : for a module: "cross_entropy", "squared_error" or a function (output, batch)
        -> mean loss over examples, or over `items(batch)` items.
    class_axis, ignored : for a module with cross-entropy: the output's axis of classes (1 in (batch, classes,
        height, width); needed where two axes fit the labels), and the label of what has no target.
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
    folder = Path(source)
    local = folder.is_dir()
    if local:
        check_folder(folder)
        if (folder / "workbench.json").is_file() and data is None:
            return from_saved(folder)
    elif not re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?|[\w-][\w.-]*/[\w.-]+", source):
        raise unknown_name(
            "subject",
            source,
            builtin_names(),
            " (built-in), or a folder, a hub id (org/name or hf:name), or file.py:function",
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
        name or (folder.name if local else source),
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
    new = head is not None and class_of(config, head)[1]
    classes: Classes | None = None
    if rows is not None and guessed in text.CLASSIFIED:
        assert label_column is not None
        rows, hidden = text.visible(rows, label_column)
        classes = text.classes_of(rows, guessed, label_column, config, new)
        notes += [hidden, classes.note]
    names = classes.names if classes is not None else None
    model, said = open_model(source, local=local, head=head, labels=names)
    notes.append(said or "")
    settings = text.Columns(
        text_column or "text", label_column or "label", image_column or "image", classes, max_length, seed
    )
    if guessed != "image-classification" and (limit := text.tokens_wanted(model, settings)) < max_length:
        notes.append(f"texts are cut to {limit} tokens, the model's positions" if data != "random" else "")
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
        data_note="; ".join(note for note in notes if note),
        origin={"source": source if not local else "folder"},
    )
    try_out(made)
    return text.self_targets(made) if guessed == "embedding" else made


@torch.no_grad()
def try_out(on: Subject, tolerance: float = 1e-2) -> None:
    """`BadInput` for a model that cannot compute its first two examples, or whose outputs for one depend on
    how much padding stands behind it.
    """
    split = next(iter(on.splits))
    columns = on.split(split)
    kind = type(on.model).__name__

    def rows(places: list[int]) -> Tensor:
        batch = on.task.trimmed({k: v[places] for k, v in columns.items()})
        output = on.task.output(on.model, batch)
        return on.task.flat(output, batch)[0] if "labels" in columns else output.flatten(1)

    lengths = on.task.lengths({k: v[:64] for k, v in columns.items()})
    short, long = (
        (0, min(1, on.size(split) - 1)) if lengths is None else (int(lengths.argmin()), int(lengths.argmax()))
    )
    try:
        alone, both = rows([short]), rows([short, long])
    except Exception as error:  # another library's code on a stranger's numbers
        raise BadInput(
            f"subject: {kind} fails on its first examples: {one_line(error)}; "
            "compare its config.json with the original, or give another task or another max_length"
        ) from None
    if lengths is None or lengths[short] == lengths[long] or not len(alone):
        return
    moved = (both[: len(alone)] - alone).float().norm(dim=-1) / alone.float().norm(dim=-1).clamp_min(1e-12)
    if bool(moved.median() > tolerance):
        raise BadInput(
            f"subject: what {kind} computes for a text depends on the padding behind it (its outputs move by "
            f"{float(moved.median()):.0%}), so its losses would depend on the batch; give texts of one length"
        )


def guess_task(config: Any, label_column: str | None, image_column: str | None) -> str:
    """The task from the checkpoint's class, else from the columns given."""
    name = (getattr(config, "architectures", None) or [""])[0]
    name = name if isinstance(name, str) else ""
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
    if name and not name.endswith(("Model", "Encoder")):
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


def from_module(
    module: nn.Module,
    data: Any,
    loss: Any,
    name: str,
    seed: int,
    class_axis: int | None = None,
    ignored: int = -100,
    items: Callable[[dict[str, Tensor]], int] | None = None,
) -> Subject:
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
    task: Task = CustomLoss(function=loss, counted=items) if callable(loss) else TASK[kinds[loss]].value()
    made = Subject(name, module.eval(), task, splits, data_note="tensors given in Python")
    try:
        with torch.no_grad():
            batch = next(made.batches(next(iter(splits)), 2))
            if isinstance(task, ModuleTask):
                made.task = declared(task, task.output(module, batch), splits, class_axis, ignored)
            value = made.loss(batch)
    except (RuntimeError, TypeError, IndexError) as error:
        raise BadInput(
            f"data: the module failed on the first two examples: {str(error).splitlines()[0]}"
        ) from None
    if value.ndim != 0:
        raise BadInput(f"loss: must be a scalar mean over examples, got shape {tuple(value.shape)}")
    if callable(loss):
        check_mean(made)
    return made


def declared(
    task: ModuleTask, output: Tensor, splits: dict[str, Split], class_axis: int | None, ignored: int
) -> ModuleTask:
    """The task with its class axis and its ignored label, which the labels of every split must fit."""
    labels = next(iter(splits.values()))["labels"]
    shape, wanted = tuple(output.shape[1:]), tuple(labels.shape[1:])
    axes = {
        axis
        for axis in {1, output.ndim - 1}
        if output.ndim > 1
        and (shape if labels.is_floating_point() else shape[: axis - 1] + shape[axis:]) == wanted
    }
    told = f"class_axis: the output (batch, {', '.join(map(str, shape))}) "
    if class_axis is not None:
        if class_axis % output.ndim not in axes:
            raise BadInput(
                f"{told}does not fit labels (batch, {', '.join(map(str, wanted))}) along axis {class_axis}; "
                f"accepted: {', '.join(map(str, sorted(axes))) or 'none'}"
            )
        axes = {class_axis % output.ndim}
    if len(axes) == 2:
        raise BadInput(
            f"{told}fits the labels (batch, {', '.join(map(str, wanted))}) along axis 1 and axis "
            f"{output.ndim - 1}; give class_axis=1 or class_axis=-1"
        )
    if not axes:
        raise BadInput(
            f"labels: shape (batch, {', '.join(map(str, wanted))}) fits no axis of classes of the output "
            f"(batch, {', '.join(map(str, shape))}); give one label for each item"
        )
    axis = axes.pop()
    classes = output.shape[axis]
    for name, split in splits.items():
        given = split["labels"]
        if given.is_floating_point():
            continue
        wrong = (given != ignored) & ((given < 0) | (given >= classes))
        if wrong.any():
            value = int(given[wrong][0])
            raise BadInput(
                f"labels: {value} is no class of the {classes} (0 to {classes - 1}), in split {name!r}; "
                f"give ignored={value} if it marks what has no label"
            )
    return ModuleTask(class_axis=-1 if axis == output.ndim - 1 else axis, ignored=ignored)


def check_mean(on: Subject, examples: int = 8, tolerance: float = 1e-4) -> None:
    """`BadInput` when a user's loss is no mean over its items: a batch's total is not its parts'."""
    split = next(iter(on.splits))
    whole = next(on.batches(split, examples, examples))
    parts = list(on.batches(split, 1, examples))

    def total(batch: dict[str, Tensor]) -> float:
        count = on.task.items(batch)
        return float(on.loss(batch)) * count if count else 0.0

    with torch.no_grad():
        together, again = total(whole), total(whole)
        apart = sum(total(part) for part in parts)
    close = abs(together - apart) <= tolerance * max(abs(together), abs(apart), 1e-6)
    if math.isfinite(together) and together == again and not close:
        count = on.task.items(whole)
        raise BadInput(
            f"loss: is no mean over examples: {count} items together give {together / count:.6g} and one "
            f"example at a time {apart / count:.6g}; return the mean over the examples, or give "
            "items=function(batch) -> the number of items that it is a mean over"
        )


Result.opens = subject
