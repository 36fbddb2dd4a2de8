"""What a compression report concludes: which model to take, in three sentences, a table and its command.

short = conclusion(on, every, pruned | quantized | chains, card, model_out="reports/model")
short.sentences; short.table; short.commands
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.facts import in_bytes
from workbench.instruments import Instrument
from workbench.measures.compression.report import chosen, detail, distance_in
from workbench.measures.intervals import wilson
from workbench.measures.words import word
from workbench.names import in_words, quoted, run_in_turn
from workbench.progress import TextProgress
from workbench.studies import Card
from workbench.subjects import Subject

#: How much worse a model may be to be recommended: a point of accuracy, a percent of a loss or a perplexity.
POINT = 0.01

Run = Instrument | tuple[Instrument, ...]


@dataclass(frozen=True)
class Conclusion:
    """sentences : what the numbers say;  table : the models that a reader chooses between
    chain : the runs of the recommended one;  commands : what makes it
    folder : where it is, "" when it was not written
    """

    sentences: tuple[str, ...]
    table: pd.DataFrame
    chain: tuple[Instrument, ...]
    commands: tuple[str, ...]
    folder: str = ""

    def folder_of(self, run: Instrument) -> str:
        """Where the model that a run gives was written; "" when it is not the recommended one."""
        return self.folder if self.chain == (run,) else ""

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        made = html.escape("\n".join(self.commands))
        return f"{said}{self.table.to_html(border=0, escape=True)}<p>It is made by</p><pre>{made}</pre>"


def conclusion(
    on: Subject,
    table: pd.DataFrame,
    runs: Mapping[str, Sequence[Run]],
    dense: Card,
    examples: int,
    model_out: str = "",
) -> Conclusion:
    """The recommended run of a sweep and what it is chosen among.

    table : rows of `studies.sweep(on, runs)`; stopped early, its first rows
    examples : that each was measured on
    model_out : folder that the recommended model is written to; "" for none
    """
    every = [run for group in runs.values() for run in group][: len(table)]
    table = table.reset_index(drop=True).assign(what=named(table))
    best = recommended(table, dense)
    name = distance_in(table)
    if name:  # of a chain it is the distance to its first step's model
        table.loc[[isinstance(run, tuple) for run in every], name] = math.nan
    places = {"recommended": best, "smallest": int(table["size"].idxmin())}
    if name:
        places["nearest to the dense model"] = int(table[name].idxmin())
    found = every[best]
    chain = found if isinstance(found, tuple) else (found,)
    if model_out:
        write(on, chain, model_out)
    sentences = said(table, best, dense, examples, name)
    if model_out:
        sentences.append(f"The recommended model is in {os.path.relpath(model_out, report_folder())}.")
    shown_rows = shown(table, places, dense, examples, name)
    return Conclusion(tuple(sentences), shown_rows, chain, commands(on, chain), model_out)


def named(table: pd.DataFrame) -> list[str]:
    """`GPTQ, 4 bits` of each run; of a chain the sparsity too."""
    chains = table["bits"].notna() & table["sparsity"].notna() if {"bits", "sparsity"} <= set(table) else None
    words = [f"{series}, {part}" for series, part in zip(table["series"], detail(table), strict=True)]
    if chains is not None:
        words = [
            f"{text} at sparsity {s:g}" if both else text
            for text, s, both in zip(words, table["sparsity"], chains, strict=True)
        ]
    return words


def worst_allowed(dense: Card) -> float:
    """The score up to which a model counts as as good as the dense one."""
    return dense.value - POINT if dense.higher_is_better else dense.value * (1 + POINT)


def recommended(table: pd.DataFrame, dense: Card) -> int:
    """The row of the smallest model within `POINT` of the dense one's score; where none is, of the best."""
    score, limit = table[dense.score], worst_allowed(dense)
    good = table[score >= limit if dense.higher_is_better else score <= limit]
    if len(good):
        return int(good.sort_values(["size", "loss"]).index[0])
    return int(score.idxmax() if dense.higher_is_better else score.idxmin())


def score_text(value: float, dense: Card, examples: int) -> str:
    """A score with what it is known to: the interval of a share."""
    if dense.score != "accuracy" or not 0 <= value <= 1:
        return f"{value:.4g}" + (" nats" if dense.score == "loss" else "")
    low, high = wilson(round(value * examples), examples)
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def said(table: pd.DataFrame, best: int, dense: Card, examples: int, name: str) -> list[str]:
    """Which model, how near it is, and what the next smaller one loses."""
    row = table.loc[best]
    ratio = dense.bytes / float(row["size"])
    kept = float(row[dense.score]) >= worst_allowed(dense)
    if not dense.higher_is_better:
        kept = float(row[dense.score]) <= worst_allowed(dense)
    within = "a point" if dense.higher_is_better else "a percent"
    role = (
        f"the smallest of {len(table)} within {within} of the dense model's {dense.score}"
        if kept
        else f"the best of {len(table)}, none of which is within {within} of the dense model's {dense.score}"
    )
    size, before = in_bytes(float(row["size"])), in_bytes(dense.bytes)
    scores = [score_text(value, dense, examples) for value in (float(row[dense.score]), dense.value)]
    sentences = [
        f"{row['what']} is {role}: {size} in the place of {before} ({ratio:.1f} times less), "
        f"{dense.score} {scores[0]} against {scores[1]}, on the {examples} test examples that it was "
        "chosen on."
    ]
    if name and pd.notna(row[name]):
        low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
        verdict = f": {word(float(row[name]))}" if name == "kl" else ""
        unit = "nats an item" if name == "kl" else "(0: the same)"
        sentences.append(
            f"Its outputs are {float(row[name]):.3g} {unit} from the dense model's, 95 % interval "
            f"{low:.2g} to {high:.2g}{verdict}."
        )
    smaller = table[table["size"] < row["size"]]
    if len(smaller):
        score = smaller[dense.score]
        after = table.loc[score.idxmax() if dense.higher_is_better else score.idxmin()]
        sentences.append(
            f"The best that is smaller still, {after['what']} ({in_bytes(float(after['size']))}), has "
            f"{dense.score} {score_text(float(after[dense.score]), dense, examples)}."
        )
    else:
        sentences.append("Nothing that was tried is smaller.")
    return sentences


def shown(
    table: pd.DataFrame, places: Mapping[str, int], dense: Card, examples: int, name: str
) -> pd.DataFrame:
    """A row a role, the dense model last."""
    rows = []
    for role, place in places.items():
        row = table.loc[place]
        found = {
            "": role,
            "model": row["what"],
            "size": in_bytes(float(row["size"])),
            "times smaller": f"{dense.bytes / float(row['size']):.1f}",
            f"test {dense.score}": score_text(float(row[dense.score]), dense, examples),
        }
        if name:
            known = pd.notna(row[name])
            found["KL (nats)" if name == "kl" else name] = f"{float(row[name]):.3g}" if known else ""
        rows.append(found)
    last = {"": "dense", "model": "", "size": in_bytes(dense.bytes), "times smaller": "1"}
    rows.append(last | {f"test {dense.score}": score_text(dense.value, dense, examples)})
    return pd.DataFrame(rows).fillna("").set_index("")


def commands(on: Subject, chain: Sequence[Instrument]) -> tuple[str, ...]:
    """A command a step; the second works on the folder of the first."""
    found = []
    for number, run in enumerate(chain, 1):
        source = on.name if number == 1 else f"step-{number - 1}"
        out = "model" if number == len(chain) else f"step-{number}"
        words = in_words([(run.name(), chosen(run))])
        found.append(f"workbench run {words} --subject {quoted(source)} --out {out}")
    return tuple(found)


def write(on: Subject, chain: Sequence[Instrument], folder: str) -> None:
    """Write what a chain gives to a folder, opened again and its loss compared."""
    *_, result = run_in_turn(chain, on, TextProgress())
    result.save(Path(folder), told=lambda _: None)


def report_folder() -> Path:
    """Where the report that is being made will lie; the current folder outside one."""
    return Path(os.environ.get("WORKBENCH_REPORT_FOLDER", "."))


def model_folder(given: Any) -> str:
    """Where a report writes its recommended model: where it was asked for, else beside the report."""
    if given:
        return str(given)
    return str(report_folder() / "model") if "WORKBENCH_REPORT_FOLDER" in os.environ else ""
