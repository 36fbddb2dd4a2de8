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

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.facts import in_bytes
from workbench.instruments import Instrument
from workbench.measures.compression.report import chosen, detail, distance_in
from workbench.measures.intervals import wilson
from workbench.measures.reference import batch_of, compare, distance_facts
from workbench.measures.words import word
from workbench.names import in_words, quoted, run_in_turn
from workbench.progress import TextProgress
from workbench.studies import Card, chained
from workbench.subjects import Subject
from workbench.subjects import subject as open_subject

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
    places = {"recommended": best, "smallest": int(np.argmin(table["size"]))}
    if name and table[name].notna().any():
        places["nearest to the dense model"] = int(np.nanargmin(table[name].astype(float)))
    found = every[best]
    chain = found if isinstance(found, tuple) else (found,)
    if model_out:
        write(on, chain, model_out)
        if name and len(chain) > 1:
            for column, value in distance_of(on, model_out, examples).items():
                table.loc[best, column] = value
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    sentences = said(rows, best, dense, examples, name)
    if model_out:
        place = os.path.relpath(model_out, report_folder())
        beside = "" if place.startswith("..") else ", beside this report"
        sentences.append(f"The recommended model is in the folder {place}{beside}.")
    best_ones = shown(rows, places, dense, examples, name)
    return Conclusion(tuple(sentences), best_ones, chain, commands(on, chain), model_out)


def named(table: pd.DataFrame) -> list[str]:
    """`GPTQ, 4 bits` of each run; of a chain the sparsity too."""
    words = [f"{series}, {part}" for series, part in zip(table["series"], detail(table), strict=True)]
    sparsities = table["sparsity"] if "sparsity" in table else [math.nan] * len(table)
    return [
        f"{text} at sparsity {s:g}" if both else text
        for text, s, both in zip(words, sparsities, chained(table), strict=True)
    ]


def good_enough(score: Any, dense: Card) -> Any:
    """Whether a score, or each of several, is within `POINT` of the dense model's."""
    if dense.higher_is_better:
        return score >= dense.value - POINT
    return score <= dense.value * (1 + POINT)


def recommended(table: pd.DataFrame, dense: Card) -> int:
    """The row of the smallest model within `POINT` of the dense one's score; where none is, of the best."""
    score = table[dense.score].to_numpy(dtype=float)
    good = np.flatnonzero(good_enough(score, dense))
    if len(good):
        order = np.lexsort((table["loss"].to_numpy()[good], table["size"].to_numpy()[good]))
        return int(good[order[0]])
    return best_of(score, dense)


def best_of(score: NDArray[np.float64], dense: Card) -> int:
    """The place of the best score."""
    return int(np.nanargmax(score) if dense.higher_is_better else np.nanargmin(score))


def score_text(value: float, dense: Card, examples: int) -> str:
    """A score with what it is known to: the interval of a share."""
    if dense.score != "accuracy" or not 0 <= value <= 1:
        return f"{value:.4g}" + (" nats" if dense.score == "loss" else "")
    low, high = wilson(round(value * examples), examples)
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def said(rows: list[dict[str, Any]], best: int, dense: Card, examples: int, name: str) -> list[str]:
    """Which model, how near it is, and what the next smaller one loses."""
    row = rows[best]
    step = "a point" if dense.higher_is_better else "a percent"
    within = f"within {step} of the dense model's {dense.score}"
    role = f"the smallest of {len(rows)} {within}"
    if not good_enough(row[dense.score], dense):
        role = f"the best of {len(rows)}, none of which is {within}"
    size, before = in_bytes(row["size"]), in_bytes(dense.bytes)
    ratio = f"{dense.bytes / row['size']:.1f} times less"
    scores = [score_text(value, dense, examples) for value in (row[dense.score], dense.value)]
    sentences = [
        f"{row['what']} is {role}: {size} in the place of {before} ({ratio}), "
        f"{dense.score} {scores[0]} against {scores[1]}, on the {examples} test examples that it was "
        "chosen on."
    ]
    if name and pd.notna(row[name]):
        verdict = f": {word(row[name])}" if name == "kl" else ""
        unit = "nats an item" if name == "kl" else "(0: the same)"
        sentences.append(
            f"Its outputs are {row[name]:.3g} {unit} from the dense model's, 95 % interval "
            f"{row[f'{name}_low']:.2g} to {row[f'{name}_high']:.2g}{verdict}."
        )
    smaller = [other for other in rows if other["size"] < row["size"]]
    if smaller:
        after = smaller[best_of(np.array([other[dense.score] for other in smaller], dtype=float), dense)]
        sentences.append(
            f"The best that is smaller still, {after['what']} ({in_bytes(after['size'])}), has "
            f"{dense.score} {score_text(after[dense.score], dense, examples)}."
        )
    else:
        sentences.append("Nothing that was tried is smaller.")
    return sentences


def shown(
    rows: list[dict[str, Any]], places: Mapping[str, int], dense: Card, examples: int, name: str
) -> pd.DataFrame:
    """A row a role, the dense model last."""
    found = {}
    for role, place in places.items():
        row = rows[place]
        found[role] = {
            "model": row["what"],
            "size": in_bytes(row["size"]),
            "times smaller": f"{dense.bytes / row['size']:.1f}",
            f"test {dense.score}": score_text(row[dense.score], dense, examples),
        }
        if name:
            known = pd.notna(row[name])
            found[role]["KL (nats)" if name == "kl" else name] = f"{row[name]:.3g}" if known else ""
    found["dense"] = {
        "model": "",
        "size": in_bytes(dense.bytes),
        "times smaller": "1",
        f"test {dense.score}": score_text(dense.value, dense, examples),
    }
    return pd.DataFrame.from_dict(found, orient="index").fillna("")


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


def distance_of(on: Subject, folder: str, examples: int) -> dict[str, float]:
    """How far the model in a folder is from the dense one, with its interval."""
    made = open_subject(folder)
    compared = compare(on, made, "test", examples, batch_size=batch_of(on, "test"))
    return distance_facts(compared.measures())


def report_folder() -> Path:
    """Where the report that is being made will lie; the current folder outside one."""
    return Path(os.environ.get("WORKBENCH_REPORT_FOLDER", "."))


def model_folder(given: Any) -> str:
    """Where a report writes its recommended model: where it was asked for, else beside the report."""
    if given:
        return str(given)
    return str(report_folder() / "model") if "WORKBENCH_REPORT_FOLDER" in os.environ else ""
