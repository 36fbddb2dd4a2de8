"""Rows of the built-in text, of a file or of a hub data set, as a table of what is written there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.subjects.checkpoint_files import one_line

#: tasks whose targets are a column of the data
LABELLED = (
    "sequence-classification",
    "multi-label-classification",
    "image-classification",
    "token-classification",
    "regression",
    "seq2seq-lm",
)


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


def table(file: Path, separator: str) -> pd.DataFrame:
    """A CSV or TSV file, every field as it is written: None, NA and 007 are texts, nothing is empty."""
    return pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)


def objects(file: Path) -> pd.DataFrame:
    """JSON objects, one a line or in one array, with their values as they are."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        found = json.loads(text)
    else:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise BadInput(
                f"data: {file.name!r}: entry {number + 1} is {type(row).__name__}, an object with the "
                'columns is needed, such as {"text": "...", "label": "..."}'
            )
    return pd.DataFrame(
        {key: [row.get(key) for row in found] for key in dict.fromkeys(k for r in found for k in r)},
        dtype=object,
    )


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda file: table(file, ","),
    ".tsv": lambda file: table(file, "\t"),
    ".jsonl": objects,
    ".json": objects,
    ".parquet": pd.read_parquet,
}


def read_rows(data: str | Path, limit: int, seed: int) -> tuple[pd.DataFrame, str]:
    """A table from a CSV / JSONL / Parquet file or `hf:ID`, at most `limit` rows a split,
    and a note that names it.
    """
    data = str(data)
    if data.startswith("hf:"):
        from datasets import load_dataset

        parts = load_dataset(data.removeprefix("hf:"), trust_remote_code=False)
        frames = [
            named(part.shuffle(seed=seed).select(range(min(limit, len(part))))).assign(split=name)
            for name, part in parts.items()
        ]
        return pd.concat(frames, ignore_index=True), f"hub data set {data.removeprefix('hf:')}"
    file = Path(data)
    if file.suffix not in READERS:
        raise BadInput(f"data: {file.name!r} has the ending {file.suffix!r}; accepted: {', '.join(READERS)}")
    try:
        rows = READERS[file.suffix](file)
    except BadInput:
        raise
    except Exception as error:  # a stranger's file in another library: anything can be raised
        raise BadInput(
            f"data: {file.name!r} could not be read: {one_line(error)}; check the file and its ending"
        ) from None
    if len(rows) > limit:
        rows = rows.sample(limit, random_state=seed)
    return rows.reset_index(drop=True), f"file {file.name}, {len(rows)} rows"


def named(part: Any) -> pd.DataFrame:
    """A part of a hub data set; classes by the names it gives them."""
    rows: pd.DataFrame = part.to_pandas()
    for column, feature in part.features.items():
        names = getattr(feature, "names", None)
        if isinstance(names, list):
            rows[column] = [names[v] if 0 <= v < len(names) else v for v in rows[column]]
    return rows


def check_columns(
    rows: pd.DataFrame, task: str, text: str | None, label: str | None, image: str | None
) -> None:
    """Every column the task needs is there and filled; else an error that lists what the file has."""
    needed: dict[str, str | None] = {}
    if task == "image-classification":
        needed["image-column"] = image
    else:
        needed["text-column"] = text
    if task in LABELLED:
        needed["label-column"] = label
    have = ", ".join(map(str, rows.columns))
    for option, column in needed.items():
        if column is None:
            raise BadInput(f"{option}: is needed for the task {task}; the data has the columns {have}")
        if column not in rows.columns:
            raise BadInput(f"{option}: {column!r} is not in the data; it has the columns {have}")
        values = rows[column]
        blank = np.array([isinstance(v, str) and v == "" for v in values], dtype=bool)
        empty = values.isna().to_numpy(dtype=bool) | blank
        if empty.any():
            raise BadInput(
                f"{option}: row {int(empty.argmax()) + 1} of column {column!r} is empty "
                f"({int(empty.sum())} in all); fill or drop them"
            )
    if len(rows) < 8:
        raise BadInput(f"data: {len(rows)} rows are too few to split; give at least 8")
