"""Rows of a file, a hub data set or the built-in text, encoded into the tensors of a subject's splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.subject import Split, Subject


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and how to encode them."""

    text: str
    label: str
    image: str
    labels: list[str] | None
    max_length: int
    seed: int


def builtin_rows(limit: int, size: int = 2000) -> pd.DataFrame:
    """The built-in text in pieces of `size` characters, evenly spaced through each split
    (a file is in one split only).
    """
    from workbench.subjects.builtin.corpora import standard_library

    pieces: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for document in standard_library():
        pieces[document.split] += chunks(document.text.decode("utf-8", errors="replace"), size)
    wanted = {"train": limit * 7 // 10, "validation": limit // 10, "test": limit // 5}
    rows = []
    for split, found in pieces.items():
        count = min(len(found), max(8, wanted[split]))
        rows.append(
            pd.DataFrame({"text": [found[i * len(found) // count] for i in range(count)], "split": split})
        )
    return pd.concat(rows, ignore_index=True)


def chunks(document: str, size: int) -> list[str]:
    return [document[i : i + size] for i in range(0, len(document), size) if document[i : i + size].strip()]


def read_rows(data: str | Path, limit: int, seed: int) -> tuple[pd.DataFrame, str]:
    """A table from a CSV / JSONL / Parquet file or `hf:ID`, at most `limit` rows a split,
    and a note that names it.
    """
    data = str(data)
    if data.startswith("hf:"):
        from datasets import load_dataset

        parts = load_dataset(data.removeprefix("hf:"), trust_remote_code=False)
        frames = [
            part.shuffle(seed=seed).select(range(min(limit, len(part)))).to_pandas().assign(split=name)
            for name, part in parts.items()
        ]
        return pd.concat(frames, ignore_index=True), f"hub data set {data.removeprefix('hf:')}"
    file = Path(data)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": pd.read_csv,
        ".tsv": lambda f: pd.read_csv(f, sep="\t"),
        ".jsonl": lambda f: pd.read_json(f, lines=True),
        ".json": lambda f: pd.read_json(f, lines=True),
        ".parquet": pd.read_parquet,
    }
    if file.suffix not in readers:
        raise BadInput(f"data: {file.name!r} has the ending {file.suffix!r}; accepted: {', '.join(readers)}")
    try:
        rows = readers[file.suffix](file)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise BadInput(f"data: {file.name!r} could not be read: {str(error).splitlines()[0]}") from None
    if len(rows) > limit:
        rows = rows.sample(limit, random_state=seed)
    return rows.reset_index(drop=True), f"file {file.name}, {len(rows)} rows"


def check_columns(
    rows: pd.DataFrame, task: str, text: str | None, label: str | None, image: str | None
) -> None:
    """Every column the task needs is there and filled; else an error that lists what the file has."""
    needed: dict[str, str | None] = {}
    if task == "image-classification":
        needed["image-column"] = image
    else:
        needed["text-column"] = text
    if task in (
        "sequence-classification",
        "image-classification",
        "token-classification",
        "regression",
        "seq2seq-lm",
    ):
        needed["label-column"] = label
    have = ", ".join(map(str, rows.columns))
    for option, column in needed.items():
        if column is None:
            raise BadInput(f"{option}: is needed for the task {task}; the data has the columns {have}")
        if column not in rows.columns:
            raise BadInput(f"{option}: {column!r} is not in the data; it has the columns {have}")
        empty = rows[column].isna()
        if empty.any():
            raise BadInput(
                f"{option}: row {int(empty.to_numpy().argmax()) + 1} of column {column!r} is empty "
                f"({int(empty.sum())} in all); fill or drop them"
            )
    if len(rows) < 8:
        raise BadInput(f"data: {len(rows)} rows are too few to split; give at least 8")


def label_names(rows: pd.DataFrame, column: str | None) -> list[str]:
    assert column is not None
    names = sorted(rows[column].unique(), key=lambda v: (isinstance(v, str), v))
    if len(names) < 2:
        raise BadInput(
            f"label-column: {column!r} holds one value only ({names[0]!r}); at least two classes are needed"
        )
    return [str(name) for name in names]


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
        renamed = (
            rows["split"]
            .astype(str)
            .replace({"val": "validation", "dev": "validation", "eval": "validation"})
        )
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
    count: int = model.get_input_embeddings().num_embeddings
    return count


def encode_text(rows: pd.DataFrame, task: str, tokenizer: Any, model: nn.Module, columns: Columns) -> Split:
    limit = min(
        columns.max_length, getattr(model.config, "max_position_embeddings", None) or columns.max_length
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    texts = rows[columns.text].astype(str).tolist()
    coded = tokenizer(texts, truncation=True, max_length=limit, padding="max_length", return_tensors="pt")
    highest, size = int(coded["input_ids"].max()), embedding_count(model)
    if highest >= size:
        raise BadInput(
            f"subject: the tokenizer gives id {highest} but the model has {size} embeddings; "
            "use the tokenizer the model was trained with"
        )
    made: Split = {"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"]}
    if task == "sequence-classification":
        assert columns.labels is not None
        place = {name: i for i, name in enumerate(columns.labels)}
        known = getattr(model.config, "label2id", None) or {}
        if set(columns.labels) == set(known):
            place = dict(known)
        made["labels"] = torch.tensor([place[str(v)] for v in rows[columns.label]])
    elif task == "regression":
        try:
            made["labels"] = torch.tensor(rows[columns.label].to_numpy(dtype="float32"))
        except (TypeError, ValueError):
            raise BadInput(
                f"label-column: {columns.label!r} must hold numbers, because the model predicts one; "
                "give numbers, or a checkpoint with classes"
            ) from None
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
        target = tokenizer(
            targets, truncation=True, max_length=limit, padding="max_length", return_tensors="pt"
        )
        made["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    elif task == "token-classification":
        raise BadInput(
            "task: token-classification from a file needs token labels; "
            "build the tensors and pass a data dict in Python"
        )
    return made


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

    assert columns.labels is not None
    pixels = []
    for number, path in enumerate(rows[columns.image]):
        try:
            pixels.append(processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0])
        except OSError as error:
            raise BadInput(f"image-column: row {number + 1}: {error}") from None
    place = {name: i for i, name in enumerate(columns.labels)}
    return {
        "pixel_values": torch.stack(pixels),
        "labels": torch.tensor([place[str(v)] for v in rows[columns.label]]),
    }


def random_splits(model: nn.Module, task: str, columns: Columns, examples: int = 96) -> dict[str, Split]:
    """Token ids or pixels drawn by the seed: exact shapes, no meaning."""

    config: Any = model.config
    draw = torch.Generator().manual_seed(columns.seed)
    if task == "image-classification":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        made: Split = {"pixel_values": torch.randn(examples, config.num_channels, size, size, generator=draw)}
        made["labels"] = torch.randint(config.num_labels, (examples,), generator=draw)
        return cut(made, columns.seed)
    length = min(
        columns.max_length, getattr(config, "max_position_embeddings", None) or columns.max_length, 64
    )
    vocabulary = embedding_count(model)
    made = {
        "input_ids": torch.randint(vocabulary, (examples, length), generator=draw),
        "attention_mask": torch.ones(examples, length, dtype=torch.long),
    }
    if task == "sequence-classification":
        made["labels"] = torch.randint(config.num_labels, (examples,), generator=draw)
    elif task == "token-classification":
        made["labels"] = torch.randint(config.num_labels, (examples, length), generator=draw)
    elif task == "regression":
        made["labels"] = torch.randn(examples, generator=draw)
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
