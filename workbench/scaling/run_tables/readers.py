"""Read run tables from files. Nothing is executed, sizes are bounded, and what cannot be read is one line."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput
from workbench.scaling.run_tables.trackers import database, tensorboard_exports, weights_and_biases

SUFFIXES = (
    ".csv, .tsv, .csv.gz, .parquet, .jsonl, .json, .db, .sqlite, .sqlite3, or a folder of TensorBoard exports"
)
#: Bytes of a file, unpacked, and cells of a table: a run table is far below either.
MOST_BYTES = 2**28
MOST_CELLS = 20_000_000


def read(path: str | Path, **options: str) -> pd.DataFrame:
    """A table with one row per run. options: `experiment` (MLflow) or `study` (Optuna)
    by name where a database holds several.

    BadInput for files that are missing, empty, too large, damaged or of an unknown kind.
    """
    path = Path(path)
    try:
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise BadInput(f"runs: {str(path)[:80]!r} is no file name ({error})") from None
    if not there:
        raise BadInput(f"runs: {str(path)!r} does not exist; give a file ({SUFFIXES})")
    name = path.name.lower().removesuffix(".gz")
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": lambda p: weights_and_biases(_separated(p, ","), _texts(p)),
        ".tsv": lambda p: _separated(p, "\t"),
        ".parquet": _parquet,
        ".jsonl": lambda p: _normalised(_json_lines(p)),
        ".json": _json,
        ".db": lambda p: database(p, **options),
        ".sqlite": lambda p: database(p, **options),
        ".sqlite3": lambda p: database(p, **options),
    }
    suffix = "a folder" if folder else next((s for s in readers if name.endswith(s)), "")
    if not suffix:
        raise BadInput(f"runs: {path.name} has an unknown ending; accepted: {SUFFIXES}")
    try:
        table = tensorboard_exports(path) if folder else readers[suffix](path)
    except BadInput:
        raise
    except Exception as error:  # parsers of half a dozen formats, on bytes that anybody may have written
        said = str(error).strip().splitlines()
        raise BadInput(
            f"runs: {path.name} cannot be read as {suffix} "
            f"({said[0][:160] if said else type(error).__name__}); is it complete?"
        ) from None
    if table.size > MOST_CELLS:
        raise BadInput(f"runs: {path.name} has {table.size:,} cells, at most {MOST_CELLS:,} are accepted")
    return table


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise BadInput(f"runs: {path.name} is no regular file")
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        content: bytes = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise BadInput(
            f"runs: {path.name} holds more than {MOST_BYTES // 2**20} MB; a run table is one row a run"
        )
    return content


def _separated(path: Path, separator: str) -> pd.DataFrame:
    content = _bytes(path)
    if content.count(b"\n") * (content.split(b"\n", 1)[0].count(separator.encode()) + 1) > MOST_CELLS:
        raise BadInput(f"runs: {path.name} has more than {MOST_CELLS:,} cells")
    return pd.read_csv(io.BytesIO(content), sep=separator)


def _texts(path: Path) -> pd.DataFrame:
    """The same cells as they are written, so that an empty one can be told from one that says NaN."""
    return pd.read_csv(io.BytesIO(_bytes(path)), dtype=str, keep_default_na=False)


def _parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet  # slow to import

    held = pyarrow.parquet.read_metadata(path)
    if held.num_rows * held.num_columns > MOST_CELLS:
        raise BadInput(
            f"runs: {path.name} has {held.num_rows:,} rows, at most {MOST_CELLS:,} cells are accepted"
        )
    return pd.read_parquet(path)


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_bytes(path).decode("utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", str(error))
                raise BadInput(f"runs: {path.name} line {number} is not JSON ({said})") from None
            if not isinstance(rows[-1], dict):
                raise BadInput(f"runs: {path.name} line {number} is no JSON object; one run a line")
    return rows


def _normalised(rows: list[Any]) -> pd.DataFrame:
    return pd.json_normalize(rows)


def _json(path: Path) -> pd.DataFrame:
    content = json.loads(_bytes(path).decode("utf-8"))
    if isinstance(content, dict):
        return pd.DataFrame(content)
    if isinstance(content, list) and content and all(isinstance(row, list) for row in content):
        last = content[-1]  # TensorBoard's JSON: [wall time, step, value]
        if len(last) == 3:
            loss = float(last[2]) if last[2] is not None else np.nan
            ended = "finished" if np.isfinite(loss) else "diverged"
            return pd.DataFrame([{"run": path.stem, "step": last[1], "loss": loss, "status": ended}])
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise BadInput(
            f"runs: {path.name} is neither a list of runs (objects), nor columns, nor a TensorBoard series"
        )
    return _normalised(content)
