"""Runs: a table of finished training runs with fixed column names and units,
checked before anything is fitted.

>>> runs = Runs.from_table({"N": [1e7, 1e8], "D": [1e9, 1e9], "val_loss": [4.0, 3.2]})
>>> list(runs.table.columns)
['params', 'tokens', 'loss', 'flops']
>>> runs.table.flops.tolist()
[6e+16, 6e+17]
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import BadInput, unknown_name
from workbench.scaling.formulas.formula import Graph, parse
from workbench.scaling.formulas.laws import KNOWN_COLUMNS
from workbench.scaling.formulas.program import Program

Array = np.ndarray
OWN_SWEEP = "scaling-sweep"


@dataclass(frozen=True)
class Column:
    """One column of the schema: meaning, unit, accepted range, and other names it is known by
    (lower case).
    """

    meaning: str
    unit: str = ""
    low: float = 0.0
    high: float = np.inf
    strict: bool = True
    other_names: tuple[str, ...] = ()

    def bad(self, values: Array) -> Array:
        """Which values lie outside the range."""
        return (
            ~np.isfinite(values)
            | (values <= self.low if self.strict else values < self.low)
            | (values > self.high)
        )

    @property
    def accepted(self) -> str:
        upper = "" if np.isinf(self.high) else f" and at most {self.high:g}"
        return (
            "a number"
            if np.isinf(self.low)
            else f"a number {'above' if self.strict else 'of at least'} {self.low:g}"
        ) + upper


SCHEMA: dict[str, Column] = {
    "params": Column(
        "parameters of the model",
        "parameters",
        other_names=(
            "n",
            "n_params",
            "num_params",
            "parameters",
            "model_size",
            "model size",
            "params_total",
            "total_params",
            "num_parameters",
        ),
    ),
    "non_embedding_params": Column(
        "parameters without embeddings",
        "parameters",
        other_names=("params_no_embed", "n_non_embedding", "non_embedding", "non-embedding params"),
    ),
    "active_params": Column(
        "parameters used per token (mixture of experts)", "parameters", other_names=("na", "activated_params")
    ),
    "average_params": Column("active parameters averaged over training (sparse pre-training)", "parameters"),
    "tokens": Column(
        "training tokens",
        "tokens",
        other_names=(
            "d",
            "n_tokens",
            "num_tokens",
            "training_tokens",
            "train_tokens",
            "training tokens",
            "total_tokens",
        ),
    ),
    "unique_tokens": Column("distinct training tokens", "tokens", other_names=("u", "unique tokens")),
    "flops": Column(
        "training compute",
        "FLOPs",
        other_names=(
            "c",
            "compute",
            "training flop",
            "training_flops",
            "train_flops",
            "model_flops",
            "total_flops",
            "budget",
        ),
    ),
    "loss": Column(
        "final validation loss",
        "nats per token",
        other_names=(
            "val_loss",
            "valid_loss",
            "validation_loss",
            "eval_loss",
            "eval/loss",
            "val/loss",
            "validation loss",
            "final_loss",
            "test_loss",
            "loss_validation",
        ),
    ),
    "learning_rate": Column(
        "peak learning rate", "", other_names=("lr", "learning rate", "peak_lr", "max_lr")
    ),
    "batch_tokens": Column(
        "batch size", "tokens", other_names=("batch_size_tokens", "tokens_per_batch", "global_batch_tokens")
    ),
    "batch_size": Column(
        "batch size in the run's own unit",
        "examples",
        other_names=("bs", "batch", "batch size", "global_bs", "global_batch"),
    ),
    "steps": Column("optimizer steps", "steps", other_names=("n_steps", "num_steps", "train_steps")),
    "step": Column(
        "optimizer step of a logged value", "steps", low=-1.0, other_names=("_step", "global_step")
    ),
    "bits": Column("weight precision", "bits", high=64.0, other_names=("weight_bits", "w_bits")),
    "activation_bits": Column("activation precision", "bits", high=64.0, other_names=("a_bits",)),
    "kv_bits": Column("key-value cache precision", "bits", high=64.0),
    "post_bits": Column("post-training precision", "bits", high=64.0),
    "exponent_bits": Column("exponent bits", "bits", strict=False, high=11.0),
    "mantissa_bits": Column("mantissa bits", "bits", strict=False, high=52.0),
    "block_size": Column("elements sharing one scale", "elements"),
    "sparsity": Column("share of zero weights", "", strict=False, high=1.0),
    "qat_fraction": Column("share of tokens in quantization-aware training", "", strict=False, high=1.0),
    "experts": Column(
        "experts per routed layer", "experts", other_names=("num_experts", "n_experts", "nume")
    ),
    "members": Column("ensemble members", "models"),
    "epochs": Column("passes over the data", "epochs"),
    "multiplier": Column("tokens per parameter over 20", ""),
    "width": Column("hidden width", "", other_names=("d_model", "hidden_size", "n_embd")),
    "depth": Column("layers", "", other_names=("n_layers", "num_layers", "n_layer", "num_blocks")),
    "seed": Column("random seed", "", low=-np.inf, strict=False),
    "distance": Column(
        "distance of the weights from their start", "", strict=False, other_names=("weight_distance",)
    ),
    "loss_increase": Column(
        "loss increase from quantization",
        "nats per token",
        low=-np.inf,
        strict=False,
        other_names=("delta_loss", "delta"),
    ),
}
assert set(KNOWN_COLUMNS) <= set(SCHEMA)


@dataclass
class Runs:
    """Finished runs. `table`: schema columns plus whatever else came along.
    `notes`: what was assumed, filled or dropped.
    """

    table: pd.DataFrame
    name: str = "runs"
    notes: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Runs({self.name}: {len(self)} runs, {', '.join(c for c in self.table if c in SCHEMA)})"

    def _repr_html_(self) -> str:
        import html

        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes)
        table = self.table.head(20).to_html(index=False, border=0)
        return f"<p>{html.escape(repr(self))}</p><ul>{notes}</ul>{table}"

    @property
    def fingerprint(self) -> str:
        """Hash of the numbers: the same runs give the same cached results."""
        numeric = self.table.select_dtypes("number")
        text = (
            ",".join(map(str, numeric.columns)).encode()
            + np.ascontiguousarray(numeric.to_numpy(dtype=np.float64)).tobytes()
        )
        return "runs-" + hashlib.sha256(text).hexdigest()[:20]

    @property
    def data_note(self) -> str:
        return "; ".join(self.notes)

    def where(self, keep: Array, note: str = "") -> Runs:
        """The rows selected by a boolean mask, index reset."""
        return Runs(
            self.table[np.asarray(keep)].reset_index(drop=True),
            self.name,
            [*self.notes, *([note] if note else [])],
            self.history,
        )

    @classmethod
    def open(cls, source: Any, columns: str | Mapping[str, str] | None = None, **reader: Any) -> Runs:
        """Runs from a file (CSV, Parquet, JSON lines, W&B or TensorBoard export, MLflow or Optuna SQLite),
        a DataFrame or a mapping.

        The project's own tables are found from anywhere: "scaling-sweep" (byte-level models of 20 thousand to
        half a million parameters), "training-lr-batch", and "drawn/LAW" for laws that need further columns.
        """
        from workbench.scaling.run_readers import read

        if isinstance(source, Runs):
            return source
        if isinstance(source, str):
            source = shipped(source) or source
        if isinstance(source, str | Path):
            return cls.from_table(read(source, **reader), columns, name=Path(source).name)
        return cls.from_table(source, columns)

    @classmethod
    def from_table(
        cls,
        table: Any,
        columns: str | Mapping[str, str] | None = None,
        name: str = "runs",
        target: str = "loss",
    ) -> Runs:
        """Map names, check every number, fill `flops`. See :func:`mapping` for `columns`.

        Warns about and drops rows without a finite loss and exact duplicates.
        BadInput names row and column of anything else.
        """
        frame = (
            table.copy()
            if isinstance(table, pd.DataFrame)
            else pd.DataFrame({k: np.asarray(v) for k, v in table.items()})
        )
        if not len(frame):
            raise BadInput("runs: the table has no rows")
        notes: list[str] = []
        frame = _rename(frame, mapping(columns), notes)
        frame = frame.reset_index(drop=True)
        frame = _drop(frame, target, notes)
        for column in [c for c in frame if c in SCHEMA]:
            frame[column] = _checked(frame[column], SCHEMA[column], str(column))
        frame = frame.reset_index(drop=True)
        _fill(frame, notes)
        _plausible(frame, notes)
        for note in notes:
            if note.startswith("warning: "):
                warnings.warn(note.removeprefix("warning: "), stacklevel=3)
        return cls(frame, name, notes)


def shipped(name: str) -> Path | None:
    """The file of one of the project's own tables, by its name in `data/runs`."""
    from workbench.storage import data_folder

    folder = data_folder() / "runs"
    own = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in (*folder.glob("*.csv"), *folder.glob("drawn/*.csv"))
    }
    return own.get(name) or own.get(name.replace("-", "_"))


def mapping(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """``"params=Model Size, tokens=D*1e9"`` -> ``{"params": "Model Size", "tokens": "D*1e9"}``."""
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    result: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise BadInput(
                f"columns: {part!r} is not accepted, write 'params=Model Size, "
                "tokens=D*1e9' (our name = your column or a formula of columns)"
            )
        result[name.strip()] = value.strip()
    return result


def _rename(frame: pd.DataFrame, wanted: dict[str, str], notes: list[str]) -> pd.DataFrame:
    unknown = [n for n in wanted if n not in SCHEMA]
    if unknown:
        raise unknown_name("columns", unknown[0], SCHEMA)
    made: dict[Any, Any] = {}
    for name, source in wanted.items():
        made[name] = frame[source] if source in frame else _formula(frame, name, source)
    lower = {str(c).strip().lower(): c for c in reversed(list(frame.columns))}
    used = set(wanted.values())
    for name, column in SCHEMA.items():
        if name in made or name in frame:
            continue
        for other in column.other_names:
            if other in lower and lower[other] not in used:
                made[name] = frame[lower[other]]
                used.add(lower[other])
                notes.append(f"{name} read from column {lower[other]!r}")
                break
    rest = {c: frame[c] for c in frame if c not in made and c not in used}
    return pd.DataFrame({**made, **rest})


def _formula(frame: pd.DataFrame, name: str, text: str) -> pd.Series:
    graph = Graph()
    known = [str(c) for c in frame if str(c).isidentifier()]
    try:
        node = parse(text, graph, known)
    except BadInput as error:
        raise BadInput(
            f"columns: {name}={text!r} is neither a column ({', '.join(map(str, frame))}) nor a formula of "
            f"columns: {error}"
        ) from None
    if graph.parameters_in(node):
        raise BadInput(
            f"columns: {name}={text!r} names {', '.join(sorted(graph.parameters_in(node)))}, "
            f"not among the columns {', '.join(map(str, frame))}"
        )
    data = {
        c: _checked(frame[c], Column("", low=-np.inf, strict=False), c).to_numpy()
        for c in graph.columns_in(node)
    }
    value = Program(graph, [node], []).bind(data)(np.zeros((1, 0)))[0]
    return pd.Series(np.broadcast_to(value, (1, len(frame)))[0], index=frame.index)


def _drop(frame: pd.DataFrame, target: str, notes: list[str]) -> pd.DataFrame:
    if target in frame:
        loss = pd.to_numeric(frame[target], errors="coerce")
        empty = frame[target].isna() | (loss.notna() & ~np.isfinite(loss))
        if empty.all():
            raise BadInput(f"{target}: no row has a finite value")
        if empty.any():
            notes.append(
                f"warning: {int(empty.sum())} rows without a finite {target} dropped (unfinished or "
                f"diverged): rows {_list(np.flatnonzero(empty))}"
            )
            frame = frame[~empty]
    double = frame.duplicated()
    if double.any():
        notes.append(
            f"warning: {int(double.sum())} exact duplicate rows dropped: rows "
            f"{_list(np.flatnonzero(frame.index.isin(frame.index[double])))}"
        )
        frame = frame[~double]
    return frame


def _list(rows: Array) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")


def _checked(series: pd.Series, column: Column, name: str) -> pd.Series:
    numbers = pd.to_numeric(series, errors="coerce")
    text = numbers.isna() & series.notna()
    if text.any():
        row = int(np.flatnonzero(text)[0])
        raise BadInput(
            f"{name}: row {series.index[row]} is {series.iloc[row]!r}, expected "
            f"{column.accepted}{f' ({column.unit})' if column.unit else ''}"
        )
    values = numbers.to_numpy(dtype=np.float64)
    bad = column.bad(values)
    if bad.any():
        row = series.index[int(np.flatnonzero(bad)[0])]
        raise BadInput(
            f"{name}: row {row} is {numbers[row]}, expected "
            f"{column.accepted}{f' ({column.unit})' if column.unit else ''}; "
            "correct or drop the row"
        )
    return pd.Series(values, index=series.index)


def _fill(frame: pd.DataFrame, notes: list[str]) -> None:
    if "flops" not in frame and {"params", "tokens"} <= set(frame):
        frame["flops"] = 6.0 * frame.params * frame.tokens
        notes.append("flops filled with 6 x params x tokens")
    elif "tokens" not in frame and {"params", "flops"} <= set(frame):
        frame["tokens"] = frame.flops / (6.0 * frame.params)
        notes.append("tokens filled with flops / (6 x params)")
    elif "params" not in frame and {"tokens", "flops"} <= set(frame):
        frame["params"] = frame.flops / (6.0 * frame.tokens)
        notes.append("params filled with flops / (6 x tokens)")


def _plausible(frame: pd.DataFrame, notes: list[str]) -> None:
    """Units that cannot be right are said, not silently fitted."""
    for name, small in (("params", 1000.0), ("tokens", 1000.0)):
        if name in frame and frame[name].max() < small:
            notes.append(
                f"warning: {name} is at most {frame[name].max():g}: "
                f"in millions or billions? the schema counts {SCHEMA[name].unit} one by one; "
                f"map it with columns='{name}={name}*1e6' (or 1e9)"
            )
    if {"params", "tokens", "flops"} <= set(frame):
        ratio = frame.flops / (6.0 * frame.params * frame.tokens)
        if not 0.1 < ratio.median() < 10:
            notes.append(
                f"warning: flops are {ratio.median():.3g} times 6 x params x tokens in the median: "
                "one of the three has another unit"
            )
    if "loss" in frame and frame.loss.median() > 20:
        notes.append(
            f"warning: loss has median {frame.loss.median():.3g}: "
            "a perplexity? the schema wants nats per token, map it with columns='loss=log(loss)'"
        )
    if "params" in frame and frame.params.nunique() == 1 and len(frame) > 1:
        notes.append(
            f"warning: every run has {frame.params.iloc[0]:.4g} params: "
            "nothing can be learned about model size"
        )


def transformer_flops(
    tokens: Array,
    depth: Array,
    width: Array,
    sequence: Array,
    vocabulary: Array,
    feed_forward: Array | None = None,
    gated: bool = True,
    causal: bool = True,
) -> Array:
    """Training FLOPs of a decoder from its shape: 3 x forward, every matrix product counted
    (2 per multiply-add).

    Per token and layer 8 w^2 for attention projections, 4 or 6 w f for the (gated) feed-forward, 4 s w for
    scores and values (half with a causal mask, s being the sequence length); 2 w v for the head.
    Embedding look-ups cost nothing.
    """
    width, depth, sequence = (np.asarray(a, dtype=np.float64) for a in (width, depth, sequence))
    hidden = (
        (8.0 / 3.0 if gated else 4.0) * width
        if feed_forward is None
        else np.asarray(feed_forward, dtype=np.float64)
    )
    layer = (
        8.0 * width**2
        + (6.0 if gated else 4.0) * width * hidden
        + 4.0 * sequence * width * (0.5 if causal else 1.0)
    )
    return (
        3.0
        * np.asarray(tokens, dtype=np.float64)
        * (depth * layer + 2.0 * width * np.asarray(vocabulary, dtype=np.float64))
    )
