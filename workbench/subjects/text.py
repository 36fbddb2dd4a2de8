"""Rows encoded into the tensors of a subject's splits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.checkpoint_files import one_line
from workbench.subjects.classes import Classes, float_of, number_of, trained, untrained, written
from workbench.subjects.subject import Split, Subject

#: tasks whose targets are classes that the data names
CLASSIFIED = (
    "sequence-classification",
    "multi-label-classification",
    "image-classification",
    "token-classification",
)
#: tasks for which decoders look at the last token that is not their padding id
POOLED = ("sequence-classification", "multi-label-classification", "regression")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and how to encode them."""

    text: str
    label: str
    image: str
    classes: Classes | None
    max_length: int
    seed: int


def encode(
    rows: pd.DataFrame, task: str, tokenizer: Any, model: nn.Module, columns: Columns
) -> dict[str, Split]:
    """Rows to tensors, split by the `split` column when there is one,
    else 60 / 10 / 10 / 20 % by the seed.
    """
    if tokenizer is None:
        raise BadInput(
            "subject: the checkpoint has no tokenizer (or image processor); "
            "put its files in the folder, or use --data random"
        )
    if task == "image-classification":
        made = encode_images(rows, tokenizer, columns)
    else:
        made = encode_text(rows, task, tokenizer, model, columns)
    splits: dict[str, Split] = {}
    if "split" in rows.columns:
        renamed = rows["split"].astype(str).replace(RENAMED)
        for name in renamed.unique():
            keep = torch.tensor((renamed == name).to_numpy())
            splits[name] = {k: v[keep] for k, v in made.items()}
        if "train" not in splits or len(splits) < 2:
            raise BadInput(f"data: the split column holds {', '.join(splits)}; train and test are needed")
        splits.setdefault("test", splits.get("validation", splits["train"]))
        splits.setdefault("validation", splits["test"])
        splits.setdefault("calibration", {k: v[:256] for k, v in splits["train"].items()})
        return splits

    return cut(made, columns.seed)


def embedding_count(model: Any) -> int:
    """How many token ids a transformers model embeds."""
    try:
        count: int = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        raise BadInput(
            f"subject: {type(model).__name__} has no one table of tokens, so the ids that it reads are not "
            "known; give a checkpoint of a text model with one, or build the module and its data in Python"
        ) from None
    return count


def positions(model: nn.Module) -> int | None:
    """How many tokens a model has positions for, by its config and its tables of positions; None: any."""
    config: Any = getattr(model, "config", None)
    said = getattr(config, "max_position_embeddings", None)
    found = [said] if isinstance(said, int) and said > 0 else []
    for name, module in model.named_modules():
        ending = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ending in POSITIONS:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - max(first, int(getattr(module, "offset", 0) or 0)))
    return min(found) if found else None


POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def tokens_wanted(model: nn.Module, columns: Columns) -> int:
    """Tokens of a text: as many as asked for, as far as the model has positions."""
    return min(columns.max_length, positions(model) or columns.max_length)


def settle_padding(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The ids with padding that the model knows as such: decoders with a head for the whole text look at the
    last token that is not `pad_token_id`. One without it gets an id that no text uses.
    """
    config: Any = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, pad = embedding_count(model), getattr(inner, "pad_token_id", None)
    if not isinstance(pad, int) or not 0 <= pad < size:
        used = torch.zeros(size, dtype=torch.bool)
        used[ids[mask != 0]] = True
        free = (~used).nonzero()
        if not len(free):
            raise BadInput(
                "subject: config.json has no pad_token_id and the texts use every id of the vocabulary; "
                "set pad_token_id to one that they do not use"
            )
        pad = int(free[-1])
        config.pad_token_id = inner.pad_token_id = pad
    return ids.masked_fill(mask == 0, pad)


def encode_text(rows: pd.DataFrame, task: str, tokenizer: Any, model: nn.Module, columns: Columns) -> Split:
    if not hasattr(tokenizer, "pad_token_id"):
        raise BadInput(
            f"subject: the checkpoint has {type(tokenizer).__name__} and no tokenizer, and the task {task} "
            "reads texts; put the tokenizer's files in the folder, or use --data random"
        )
    limit = tokens_wanted(model, columns)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    options = {"truncation": True, "max_length": limit, "padding": "max_length", "return_tensors": "pt"}
    if task == "token-classification":
        return encode_tokens(rows, tokenizer, columns, options)
    texts = rows[columns.text].astype(str).tolist()
    coded = coded_by(tokenizer, texts, **options)
    check_ids(coded["input_ids"], model)
    made: Split = {"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"]}
    if task in POOLED:
        made["input_ids"] = settle_padding(model, made["input_ids"], made["attention_mask"])
    if task == "sequence-classification":
        assert columns.classes is not None
        made["labels"] = torch.tensor([columns.classes.of(v) for v in rows[columns.label]])
    elif task == "multi-label-classification":
        assert columns.classes is not None
        made["labels"] = several(rows[columns.label], columns.classes)
    elif task == "regression":
        made["labels"] = numbers(rows[columns.label], columns.label)
    elif task == "causal-lm":
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    elif task == "masked-lm":
        made |= masked(made["input_ids"], made["attention_mask"], tokenizer, columns.seed)
    elif task == "seq2seq-lm":
        targets = (
            rows[columns.label].astype(str).tolist()
            if columns.label in rows.columns
            else [t[len(t) // 2 :] for t in texts]
        )
        target = coded_by(tokenizer, text_target=targets, **options)
        check_ids(target["input_ids"], model)
        made["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return made


def coded_by(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """What a tokenizer gives; `BadInput` where it fails, as one does whose files contradict each other."""
    try:
        return tokenizer(*texts, **options)
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"  # of a library in Rust, no Exception
        if not panic and not isinstance(error, Exception):
            raise
        raise BadInput(
            f"subject: its tokenizer fails on the texts: {one_line(error)}; copy or save the tokenizer again"
        ) from None


def check_ids(ids: Tensor, model: nn.Module) -> None:
    highest, size = int(ids.max()), embedding_count(model)
    if highest >= size:
        raise BadInput(
            f"subject: the tokenizer gives id {highest} but the model has {size} embeddings; "
            "use the tokenizer the model was trained with"
        )


def numbers(values: pd.Series, column: str) -> Tensor:
    """(rows,) or (rows, outputs) numbers to predict."""
    try:
        found = torch.tensor([[*map(float_of, v)] if several_of(v) else float_of(v) for v in values])
    except (TypeError, ValueError):
        raise BadInput(
            f"label-column: {column!r} must hold numbers, because the model predicts one; "
            "give numbers, or a checkpoint with classes"
        ) from None
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).reshape(len(found), -1).any(1).nonzero()[0]) + 1
        raise BadInput(f"label-column: row {row} of column {column!r} is no finite number; give one")
    return found


def several_of(value: Any) -> bool:
    """Whether a field of a table holds several values."""
    return not isinstance(value, str) and hasattr(value, "__len__")


def labels_in(value: Any) -> list[Any]:
    """The labels of one text: a list, or a text with | , or ; between them."""
    if several_of(value):
        return list(value)
    if isinstance(value, str):
        return [part.strip() for part in re.split(r"[|,;]", value) if part.strip()]
    return [value]


def several(values: pd.Series, classes: Classes) -> Tensor:
    """(rows, classes) 1 where a class holds: lists of labels, or of a 0 or 1 for every class."""
    rows = [labels_in(value) for value in values]
    width = len(classes.names)
    if all(len(row) == width and all(number_of(v) in (0, 1) for v in row) for row in rows):
        return torch.tensor([[number_of(v) for v in row] for row in rows])
    found = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        found[index, [classes.of(label) for label in row]] = 1
    return found


def encode_tokens(rows: pd.DataFrame, tokenizer: Any, columns: Columns, options: dict[str, Any]) -> Split:
    """Lists of words with a label for each; a word's first token carries its label, the others none."""
    assert columns.classes is not None
    words, tags = rows[columns.text].tolist(), rows[columns.label].tolist()
    for number, (row, labels) in enumerate(zip(words, tags, strict=True)):
        if not several_of(row) or not several_of(labels) or len(row) != len(labels):
            raise BadInput(
                f"label-column: row {number + 1} of {columns.text!r} and {columns.label!r} must be two lists "
                "of one length, words and their labels; give a JSONL or Parquet file"
            )
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "subject: token-classification from a file needs the tokenizer's tokenizer.json; "
            "save the tokenizer with transformers' fast class"
        )
    coded = coded_by(tokenizer, [list(map(str, row)) for row in words], is_split_into_words=True, **options)
    labels = torch.full(coded["input_ids"].shape, -100)
    for index, row in enumerate(tags):
        before = None
        for place, word in enumerate(coded.word_ids(index)):
            if word is not None and word != before:
                labels[index, place] = columns.classes.of(row[word])
            before = word
    return {"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"], "labels": labels}


def classes_of(rows: pd.DataFrame, task: str, column: str, config: Any, new: bool) -> Classes:
    """The classes that the label column names, matched to the checkpoint's unless its head is new."""
    values = rows[column].tolist()
    if task == "token-classification":
        values = [label for row in values for label in (row if several_of(row) else [row])]
    elif task == "multi-label-classification":
        held = [labels_in(value) for value in values]
        if not new and all(
            len(r) == len(config.id2label) and {number_of(v) for v in r} <= {0, 1} for r in held
        ):
            names = [str(config.id2label[key]) for key in sorted(config.id2label, key=int)]
            return Classes(names, {})
        values = [label for row in held for label in row]
    else:
        check_single(values, column)
    return untrained(values, column) if new else trained(values, column, config.id2label)


def check_single(values: list[Any], column: str) -> None:
    """`BadInput` for lists of labels where one is needed."""
    if row := next((number for number, value in enumerate(values, 1) if several_of(value)), 0):
        raise BadInput(
            f"label-column: row {row} of column {column!r} holds a list; "
            "give task=multi-label-classification for several classes of one text, "
            "task=token-classification for one label a word, task=regression for numbers, or one label a row"
        )


def stand_in(rows: pd.DataFrame) -> str:
    """A note on the split whose rows another one shows, where the data has no such split itself."""
    if "split" not in rows.columns:
        return ""
    held = set(rows["split"].astype(str).replace(RENAMED))
    if "test" not in held:
        return f"no rows are of test: test is the {'validation' if 'validation' in held else 'train'} split"
    return "" if "validation" in held else "no rows are of validation: validation is the test split"


#: other names of the validation split
RENAMED = {"val": "validation", "dev": "validation", "eval": "validation"}
#: what stands for a label that is hidden, where train has no such label
HIDDEN = ("-1", "?", "unlabelled", "unlabeled", "nan", "<na>", "n/a", "null", "hidden")


def visible(rows: pd.DataFrame, column: str) -> tuple[pd.DataFrame, str]:
    """The rows whose label is known, and a note on the others: -100, or a word of `HIDDEN` outside train,
    where train has no such label.
    """
    labels = rows[column].map(lambda value: "" if several_of(value) else written(value))
    hidden = labels == "-100"
    if "split" in rows.columns:
        train = rows["split"].astype(str) == "train"
        lower = labels.str.casefold()
        hidden |= ~train & lower.isin(set(HIDDEN) - set(lower[train]))
    if not hidden.any():
        return rows, ""
    note = f"{int(hidden.sum())} rows without a label ({labels[hidden].iloc[0]}) are left out"
    if "split" in rows.columns:
        lost = sorted(set(rows["split"].astype(str)) - set(rows["split"][~hidden].astype(str)))
        note += f", all of {', '.join(lost)}" if lost else ""
    return rows[~hidden].reset_index(drop=True), note


def masked(ids: Tensor, attention: Tensor, tokenizer: Any, seed: int, share: float = 0.15) -> Split:
    """BERT masking with every chosen token replaced by [MASK] (Devlin et al. 2019 replace 80 %),
    fixed by the seed.
    """
    if tokenizer.mask_token_id is None:
        raise BadInput("task: masked-lm needs a tokenizer with a mask token")
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (
        (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share)
        & attention.bool()
        & ~special
    )
    return {
        "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~chosen, -100),
    }


def encode_images(rows: pd.DataFrame, processor: Any, columns: Columns) -> Split:
    from PIL import Image

    assert columns.classes is not None
    pixels = []
    for number, path in enumerate(rows[columns.image]):
        try:
            pixels.append(processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0])
        except OSError as error:
            raise BadInput(f"image-column: row {number + 1}: {error}") from None
    return {
        "pixel_values": torch.stack(pixels),
        "labels": torch.tensor([columns.classes.of(v) for v in rows[columns.label]]),
    }


def random_splits(model: nn.Module, task: str, columns: Columns, examples: int) -> dict[str, Split]:
    """Token ids or pixels drawn by the seed: exact shapes, no meaning."""

    config: Any = model.config
    draw = torch.Generator().manual_seed(columns.seed)
    if task in ("image-classification", "semantic-segmentation"):
        height, width = image_size(config)
        channels = getattr(config, "num_channels", None)
        shape = (examples, channels if isinstance(channels, int) else 3, height, width)
        made: Split = {"pixel_values": torch.randn(shape, generator=draw)}
        size = (examples,) if task == "image-classification" else (examples, height, width)
        made["labels"] = torch.randint(config.num_labels, size, generator=draw)
        return cut(made, columns.seed)
    length = tokens_wanted(model, columns)
    vocabulary = embedding_count(model)
    free = 0
    if task in POOLED:
        pad = getattr(config, "pad_token_id", None)
        free = 0 if isinstance(pad, int) and 0 <= pad < vocabulary else 1  # an id that is padding alone
    made = {
        "input_ids": torch.randint(vocabulary - free, (examples, length), generator=draw),
        "attention_mask": torch.ones(examples, length, dtype=torch.long),
    }
    if task in POOLED:
        made["input_ids"] = settle_padding(model, made["input_ids"], made["attention_mask"])
    if task == "sequence-classification":
        made["labels"] = torch.randint(config.num_labels, (examples,), generator=draw)
    elif task == "token-classification":
        made["labels"] = torch.randint(config.num_labels, (examples, length), generator=draw)
    elif task == "regression":
        outputs = () if config.num_labels == 1 else (config.num_labels,)
        made["labels"] = torch.randn(examples, *outputs, generator=draw)
    elif task == "multi-label-classification":
        made["labels"] = torch.randint(2, (examples, config.num_labels), generator=draw)
    elif task == "masked-lm":
        keep = torch.rand(examples, length, generator=draw) < 0.15
        made["labels"] = made["input_ids"].masked_fill(~keep, -100)
    elif task != "embedding":
        made["labels"] = (
            made["input_ids"].clone()
            if task == "causal-lm"
            else torch.randint(vocabulary, (examples, length // 2), generator=draw)
        )
    return cut(made, columns.seed)


def image_size(config: Any, usual: int = 224) -> tuple[int, int]:
    """(height, width) of the images that a model takes; networks without a fixed size get the usual one."""
    said = getattr(config, "image_size", None)
    if isinstance(said, dict):
        said = [said.get("height"), said.get("width")]
    sides: list[Any] = list(said) if isinstance(said, (list, tuple)) else [said, said]
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return usual, usual
    return int(sides[0]), int(sides[1])


@torch.no_grad()
def self_targets(subject: Subject) -> Subject:
    """Give an embedding subject its own dense outputs as targets:
    its loss measures how far a change moves them.
    """
    for name, split in subject.splits.items():
        outputs = [subject.task.output(subject.model, batch).cpu() for batch in subject.batches(name, 64)]
        split["labels"] = torch.cat(outputs)
    subject.data_note += "; targets are the dense model's own embeddings"
    return subject


def cut(columns: dict[str, Tensor], seed: int) -> dict[str, Split]:
    """One table into train / calibration / validation / test (60 / 10 / 10 / 20 %), shuffled by `seed`."""
    total = len(next(iter(columns.values())))
    if total < 8:
        raise BadInput(f"data: {total} examples are too few to split; give at least 8, or your own splits")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    sizes = [max(1, int(total * share)) for share in (0.1, 0.1, 0.2)]
    bounds = [0, total - sum(sizes), total - sizes[1] - sizes[2], total - sizes[2], total]
    return {
        split: {k: v[order[bounds[i] : bounds[i + 1]]] for k, v in columns.items()}
        for i, split in enumerate(("train", "calibration", "validation", "test"))
    }
