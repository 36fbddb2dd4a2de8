"""Comparing many runs on one subject: a tidy table of their facts,
computed in parallel through the result cache, and their figures.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.axis import Choice
from workbench.errors import BadInput
from workbench.figures import figure, line, looks, points, rule
from workbench.instruments import Instrument
from workbench.overview import WholeTable
from workbench.progress import Progress, TextProgress
from workbench.results import Result, format_fact
from workbench.storage import evidence_record, measured_methods, verdict
from workbench.storage.together import pool
from workbench.storage.writing import scratch
from workbench.subjects import Subject, subject
from workbench.version import threads

Chain = tuple[Instrument, ...]  # run one after the other, each on the subject the one before returned


def sweep(
    on: Subject,
    runs: Mapping[str, Sequence[Instrument | Chain]],
    progress: Progress | None = None,
    jobs: int = 0,
    beside: Sequence[Instrument] = (),
) -> pd.DataFrame:
    """Run every instrument (or chain of them) on one subject; one row a run: `series` (its key), the last
    instrument's fields, its facts, and `size`, the bytes of the compressed layers
    (values, scales, and what says where they are).

    A series is dealt out to the workers, and each keeps the statistics it measured for the runs that share
    them; chains of any series that begin with the same run go to the worker that computes it. `jobs` worker
    processes (0: one per core, never more than the runs that are not cached); rows come in the order given,
    and a sweep that is stopped returns the finished ones. `beside`: instruments that give no row; they are
    computed first, beside the others, for a later `run` to find in the cache, if it too computes with one
    thread, as the workers do.
    """
    progress = progress or TextProgress()
    if not runs or not all(runs.values()):
        raise BadInput("runs: every series needs at least one instrument")
    chains = {
        name: [item if isinstance(item, tuple) else (item,) for item in group] for name, group in runs.items()
    }
    for group in chains.values():
        for chain in group:
            for instrument in chain:
                instrument.check(on)
    for instrument in beside:
        instrument.check(on)
    wanted = {"": [(instrument,) for instrument in beside]} | chains
    # a worker computes with one thread, and what is read back here is what it computed
    alone = jobs == 1 or on.device.type != "cpu" or not on.has_file
    with contextlib.nullcontext() if alone else threads(1):
        missing = families(
            on, {name: [chain for chain in group if not stored(on, chain)] for name, group in wanted.items()}
        )
        workers = min(jobs or len(os.sched_getaffinity(0)), sum(map(len, missing)))
        if workers > 1 and not alone:
            in_processes(on, [part for group in missing for part in dealt(group, workers)], workers, progress)
        rows = []
        last: dict[str, Subject] = {}
        every = [(name, chain) for name, group in chains.items() for chain in group]
        for number, (name, chain) in enumerate(progress.track(every, "runs")):
            following = [other for _, other in every[number + 1 :]]
            inner = progress.within(f"run {number + 1} of {len(every)}")
            result = run_chain(on, chain, inner, last, following)
            if result.partial:
                break
            rows.append(row(name, result))
        return pd.DataFrame(rows)


def run_chain(
    on: Subject, chain: Chain, progress: Progress, last: dict[str, Subject], following: Sequence[Chain]
) -> Result:
    """Each instrument on the subject the one before it returned; the last result.

    `last` holds the subject that the latest beginning of a chain ended with, so chains that begin alike
    compute it once; none where no chain of the `following` goes on from it, for it is as large as the model.
    """
    goes_on = any(other[0] == chain[0] for other in (chain, *following) if len(other) > 1)
    if not goes_on:
        last.clear()
    for instrument in chain[:-1]:
        key = instrument.key(on)
        if key not in last:
            changed = instrument.run(on, progress=progress).subject
            if changed is None:
                raise BadInput(
                    f"runs: {instrument.name()} changes no model, so nothing can follow it in a chain"
                )
            last.clear()
            last[key] = changed
        on = last[key]
    result = chain[-1].run(on, progress=progress)
    if len(chain) == 1 and goes_on and result.subject is not None and not result.partial:
        last.clear()
        last[chain[-1].key(on)] = result.subject
    return result


def stored(on: Subject, chain: Chain) -> bool:
    """True when the whole chain is in the cache (asking costs no computation)."""
    for instrument in chain:
        if not instrument.stored(on):
            return False
        on = on.derived(instrument, instrument.key(on), lambda: None)
    return True


def row(series: str, result: Result) -> dict[str, Any]:
    facts = {k: v for k, v in result.facts.items() if not isinstance(v, (dict, list))}
    before = [step["fields"] for step in result.provenance["history"] if "sparsity" in step["fields"]]
    fields = {"sparsity": before[-1]["sparsity"]} if before else {}
    sizes = [
        facts[c] for c in ("packed_bytes", "bytes") if c in facts
    ]  # packed, where the format has a packing
    fields |= {"size": sizes[0]} if sizes else {}
    return {
        "series": series,
        "instrument": result.instrument.name(),
        **facts,
        **fields,
        **columns(result.instrument),
        "seconds": result.provenance["seconds"],
    }


def columns(fields: Any) -> dict[str, Any]:
    """A column a field: a choice as its name, its options beside it as `rounding.damp`.
    `bits` is the width of the format.
    """
    found: dict[str, Any] = {}
    for name, value in fields.model_dump(mode="json").items():
        chosen = getattr(fields, name)
        if isinstance(chosen, Choice):
            found[name] = str(chosen)
            found |= {f"{name}.{option}": inner for option, inner in columns(chosen.options).items()}
        else:
            found[name] = value
    if "format.bits" in found:
        found["bits"] = found["format.bits"]
    return found


def families(on: Subject, chains: Mapping[str, Sequence[Chain]]) -> list[list[list[Chain]]]:
    """By series, its chains in families: those that begin with the same run, the short ones first,
    in the series that has the first of them.
    """
    series: list[list[list[Chain]]] = []
    known: dict[str, list[Chain]] = {}
    for group in chains.values():
        begun: list[list[Chain]] = []
        for chain in group:
            key = chain[0].key(on)
            if key not in known:
                known[key] = []
                begun.append(known[key])
            known[key].append(chain)
        series.append(begun)
    for family in known.values():
        family.sort(key=len)
    return [begun for begun in series if begun]


def dealt(group: list[list[Chain]], workers: int) -> list[list[Chain]]:
    """A series in as many consecutive parts as there are workers, families kept together:
    neighbours share statistics and beginnings.
    """
    ends = np.cumsum([0, *map(len, group)])
    parts = np.searchsorted(np.linspace(0, ends[-1], workers + 1)[1:-1], (ends[:-1] + ends[1:]) / 2)
    return [
        part
        for k in range(workers)
        if (part := [chain for family, p in zip(group, parts, strict=True) if p == k for chain in family])
    ]


def in_processes(on: Subject, groups: list[list[Chain]], workers: int, progress: Progress) -> None:
    """Fill the result cache from worker processes, each opening the subject from a folder written once."""
    import joblib

    with scratch() as folder:
        place = folder / "subject"
        on.save(place, private=True)
        tasks = (
            joblib.delayed(one_group)(str(place), on.fingerprint, on.evaluations, group) for group in groups
        )
        with warnings.catch_warnings():
            # a worker that has grown by much is replaced by a new one between two parts:
            # its statistics are measured again, nothing is lost
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            with pool("loky", workers):
                done = joblib.Parallel(return_as="generator_unordered")(tasks)
                for _ in progress.track(done, "parts of series", len(groups)):
                    pass


_opened: dict[
    str, Subject
] = {}  # in a worker: the subject of its last task, with the statistics measured on it


def one_group(
    folder: str, fingerprint: str, evaluations: dict[tuple[str, int], dict[str, float]], group: list[Chain]
) -> int:
    """In a worker: run one series on the saved subject under the caller's fingerprint,
    with what the caller measured on it.
    """
    import torch

    torch.set_num_threads(1)
    if fingerprint not in _opened:
        _opened.clear()
        _opened[fingerprint] = subject(folder)
        _opened[fingerprint].adopt_fingerprint(fingerprint, evaluations)
    last: dict[str, Subject] = {}
    for number, chain in enumerate(group):
        run_chain(_opened[fingerprint], chain, Progress(), last, group[number + 1 :])
    return len(group)


def curves(
    table: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    x_title: str,
    y_title: str,
    dense: float | None = None,
    **layout: Any,
) -> go.Figure:
    """One line a series, `y` against `x`; `dense` draws the uncompressed model's value as a reference."""
    fig = figure(title, x_title, y_title, **layout)
    index = looks(map(str, table["series"]))
    for name, part in table.groupby("series", sort=False):
        part = part.sort_values(x)
        line(fig, part[x], part[y], str(name), index=index[str(name)])
    if dense is not None:
        rule(fig, f"dense {dense:.4g}", y=dense)
    return fig


def predicted_beside_measured(
    table: pd.DataFrame, title: str, predicted: str = "predicted_change", measured: str = "measured_change"
) -> go.Figure:
    """Second-order prediction against measured loss change, both axes logarithmic,
    with the line where they agree.

    Points where either is not positive cannot be drawn on logarithmic axes; their number is in the title.
    """
    good = table[(table[predicted] > 0) & (table[measured] > 0)]
    left_out = len(table) - len(good)
    note = f" ({left_out} of {len(table)} not positive, not drawn)" if left_out else ""
    fig = figure(
        title + note,
        "predicted loss change (nats)",
        "measured loss change (nats)",
        xaxis_type="log",
        yaxis_type="log",
        height=480,
    )
    index = looks(map(str, good["series"]))
    for name, part in good.groupby("series", sort=False):
        points(fig, part[predicted], part[measured], str(name), index=index[str(name)])
    if len(good):
        ends = [good[[predicted, measured]].min().min(), good[[predicted, measured]].max().max()]
        line(fig, ends, ends, "equal", index=6, mode="lines")
    return fig


def frontier(table: pd.DataFrame, dense: Card, title: str) -> go.Figure:
    """Quality against the compressed layers' bytes for every run,
    with the runs that no smaller run beats joined.
    """
    fig = figure(
        title, "size of the compressed layers (MB)", f"test {dense.score}", xaxis_type="log", height=480
    )
    index = looks(map(str, table["series"]))
    size, value = table["size"] / 1e6, table[dense.score] * (1 if dense.higher_is_better else -1)
    for name, part in table.groupby("series", sort=False):
        points(fig, part["size"] / 1e6, part[dense.score], str(name), index=index[str(name)])
    order = size.argsort()
    best = [
        i
        for i in order
        if value[i] > max((value[j] for j in order if size[j] <= size[i] and j != i), default=-np.inf)
    ]
    line(fig, size[best], table[dense.score][best], "best for its size", index=6, mode="lines")
    points(fig, [dense.bytes / 1e6], [dense.value], "dense", index=6)
    return fig


def chained(table: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are of a model that was pruned, and then quantized."""
    if not {"sparsity", "bits"} <= set(table):
        return pd.Series(False, table.index)
    return table["sparsity"].notna() & table["bits"].notna()


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """The columns a reader compares, rounded."""
    wanted = [
        "series",
        "sparsity",
        "bits",
        "size",
        "loss",
        "accuracy",
        "perplexity",
        "kl",
        "distance",
        "predicted_change",
        "measured_change",
        "seconds",
    ]
    shown = table[[c for c in wanted if c in table]].copy()
    for name in {"kl", "distance"} & set(shown):  # of a chain it is to its first step's model
        shown.loc[chained(table), name] = np.nan
    shown["size"] = (shown["size"] / 1e6).round(2)
    shown = shown.rename(
        columns={
            "size": "size (MB)",
            "kl": "KL to dense (nats)",
            "predicted_change": "predicted change",
            "measured_change": "measured change",
        }
    ).round(4)
    shown = shown.set_index("series").rename_axis(None)
    for column in ("sparsity", "bits"):
        if column in shown:
            shown[column] = [f"{v:g}" if pd.notna(v) else "" for v in shown[column]]
    return shown.astype(object).where(shown.notna(), "")


def findings(table: pd.DataFrame, dense: Card) -> pd.DataFrame:
    """What the runs say, each with the numbers behind it: orderings the literature expects,
    whether they held here, and how far.
    """
    rows = []

    def ordering(claim: str, better: str, worse: str, column: str, at: float) -> None:
        values = [table[(table["series"] == s) & (table[column] == at)]["loss"] for s in (better, worse)]
        if all(len(v) for v in values):
            first, second = (float(v.iloc[0]) for v in values)
            rows.append(
                {
                    "expected": claim,
                    "at": f"{column} {at:g}",
                    "held": "yes" if first <= second else "NO",
                    "losses": f"{first:.4f} and {second:.4f}",
                }
            )

    for at in sorted(table["sparsity"].dropna().unique()) if "sparsity" in table else []:
        ordering("oBERT <= Wanda", "oBERT", "Wanda", "sparsity", at)
        ordering("SparseGPT <= Wanda", "SparseGPT", "Wanda", "sparsity", at)
        ordering("Wanda <= magnitude", "Wanda", "magnitude", "sparsity", at)
    for at in sorted(table["bits"].dropna().unique()) if "bits" in table else []:
        ordering("GPTQ < nearest", "GPTQ", "round to nearest", "bits", at)
    if {"predicted_change", "measured_change"} <= set(table):
        pairs = table[["predicted_change", "measured_change"]].dropna()
        rho = rank_correlation(pairs["predicted_change"].tolist(), pairs["measured_change"].tolist())
        rows.append(
            {
                "expected": "prediction ranks the runs",
                "at": f"{len(pairs)} runs",
                "held": "yes" if rho >= 0.8 else "NO",
                "losses": f"rank correlation {rho:.2f}",
            }
        )
    return pd.DataFrame(rows).set_index("expected").rename_axis(None)


def stored_orderings(on: Subject) -> pd.DataFrame:
    """What `workbench evidence` has measured of methods on this subject at other times: the claim, what came
    out, the numbers and what it took. Empty where nothing is stored.
    """
    rows = []
    for family, method in sorted(measured_methods()):
        record = evidence_record(family, method) or {}
        if record.get("subject") == on.name:
            rows.append(
                {
                    "method": method,
                    "claim": record.get("claim", ""),
                    "stored verdict": verdict(record),
                    "measured": record.get("note", ""),
                    "minutes": round(float(record.get("seconds", np.nan)) / 60, 1),
                }
            )
    return WholeTable(rows, columns=["method", "claim", "stored verdict", "measured", "minutes"])


@dataclass(frozen=True)
class Card:
    """The subject before anything is done to it: its reproducibility card and the numbers every comparison
    starts from.
    """

    facts: dict[str, Any]
    loss: float
    score: str  # accuracy, perplexity, ...
    value: float
    bytes: int  # of the layers a compression works on, in float32
    higher_is_better: bool

    def _repr_html_(self) -> str:
        return pd.DataFrame(
            {"": self.facts.keys(), "value": [format_fact(v) for v in self.facts.values()]}
        ).to_html(index=False, border=0, escape=True)


def card(on: Subject, layers: str = "blocks", progress: Progress | None = None) -> Card:
    """Evaluate the subject on its test split and describe it."""
    facts = on.card(progress)
    score = next(
        (
            m
            for m in ("accuracy", "perplexity")
            if f"test {m}" in facts and not (m == "accuracy" and "test perplexity" in facts)
        ),
        "loss",
    )
    size = 4 * sum(layer.original.numel() for layer in on.layers(layers))
    return Card(facts, facts["test loss"], score, facts[f"test {score}"], size, score == "accuracy")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; not a number when either has fewer than three distinct values."""
    from scipy.stats import spearmanr

    if len(set(first)) < 3 or len(set(second)) < 3:
        return float("nan")
    return float(spearmanr(first, second).statistic)
