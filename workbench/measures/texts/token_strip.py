"""The `token-strip` instrument: where in a text two models differ, and what each would have said there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.measures.changed_model import BesideChanged, changed_parameter
from workbench.measures.intervals import mcnemar
from workbench.measures.language import chunk_length, fresh, pair_of
from workbench.measures.reference import Answer, Reference, batch_of, kind_of, on_its_data, reference_of
from workbench.measures.texts.spelled import Words, class_name
from workbench.measures.texts.token_strip_result import KINDS, TokenStripResult
from workbench.measures.words import LEGEND
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.tasks import Seq2SeqLM
from workbench.subjects.vocabulary import wide

#: Texts that are looked at when nobody said how many.
USUAL = {"language": 8, "classification": 256}


class TokenStrip(BesideChanged):
    """Where do two models differ? A text with every token coloured by its divergence, and the words that both
    models put first there; of classifiers, the examples whose answer flipped, most confident first.
    """

    summary_line: ClassVar[str] = (
        "a text coloured by divergence, both models' first words; flips of classifiers"
    )

    changed: str = changed_parameter()
    test_examples: int = parameter(
        0, "texts; 0: 8 of a language model, 256 of a classifier", ge=0, unit="examples", group="Data"
    )
    split: str = parameter("test", "split the texts come from", group="Data")
    top: int = parameter(5, "first words of both models that are kept of every token", ge=1, le=50)

    @classmethod
    def result_class(cls) -> type[Result]:
        return TokenStripResult

    def check_task(self, on: Subject) -> None:
        check_words(on, self.split)

    def _run(self, on: Subject, progress: Progress) -> Result:
        return self.between(on, self.changed_model(on), progress)

    def between(self, dense: Subject, changed: Subject, progress: Progress | None = None) -> Result:
        """The result for a changed model that is at hand; not cached."""
        check_words(dense, self.split)
        progress = progress or Progress()
        changed = on_its_data(dense, changed)
        kind = kind_of(dense.task)
        size = self.test_examples or USUAL[kind]
        reference = reference_of(dense, self.split, size, progress, batch_size=batch_of(dense, self.split))
        found = [] if reference is None else looked_at(reference, changed, self.top, progress)
        build = language if kind == "language" else classification
        table, tops, facts = build(dense, self.split, joined(found))
        about = {"reference": dense.name, "changed": changed.name, "kind": kind}
        return self.result(table, about | facts, tables={"top": tops})


def check_words(on: Subject, split: str) -> None:
    """`BadInput` for a task whose answers are no words or classes of a text, token or example."""
    kind = kind_of(on.task)
    if kind not in USUAL:
        raise BadInput(
            f"subject: the task {on.task.name} answers with numbers, no words or classes; use fidelity"
        )
    targets = on.split(split).get(on.task.targets)
    if targets is not None and targets.ndim > 2:
        raise BadInput(f"subject: the task {on.task.name} has an answer for each pixel; use fidelity")


# ---- what is kept of both models' answers ------------------------------------------------------------------
def looked_at(
    reference: Reference, changed: Subject, top: int, progress: Progress
) -> list[dict[str, Tensor]]:
    look = functools.partial(look_at, top=top, exact=reference.kind == "classification")
    return reference.beside(changed, look, progress)[0]


@torch.no_grad()
def look_at(dense: Answer, changed: Answer, top: int, exact: bool) -> dict[str, Tensor]:
    """What a batch's answers (items, outputs) leave behind, (items,) or (items, top) each: `pair_of`, and
    both models' first words with their probabilities. A chunk of items has its logits at a time.

    exact : in double precision, where outputs are few
    """
    step = chunk_length(dense.outputs)
    parts = []
    for first in range(0, len(dense.targets), step):
        part = slice(first, first + step)
        logits = [logits_of(answer, part, exact) for answer in (dense, changed)]
        seen: dict[str, Tensor] = {}
        for name, values in zip(("dense", "changed"), logits, strict=True):
            best, words = values.topk(min(top, values.shape[-1]))
            seen |= {name: words, f"{name}_p": (best - values.logsumexp(-1, keepdim=True)).exp()}
        parts.append(seen | pair_of(logits[0], logits[1], dense.targets[part]))
    found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]} if parts else {}
    return found | {"example": dense.example, "position": dense.position, "target": dense.targets.cpu()}


def logits_of(answer: Answer, part: slice, exact: bool) -> Tensor:
    values = wide(answer.head(answer.rows[part]))
    return fresh(values.double() if exact else values, answer.rows)


def joined(found: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray[Any, Any]]:
    """All items, in the order of examples and positions."""
    whole = [part for part in found if "dense" in part]
    if not whole:
        return {}
    every = {name: torch.cat([part[name] for part in whole]).numpy() for name in whole[0]}
    order = np.lexsort((every["position"], every["example"]))
    return {name: values[order] for name, values in every.items()}


def tops_of(items: dict[str, Any], of: np.ndarray[Any, Any], spell: Any) -> pd.DataFrame:
    """One row an item and rank. item : row of the table."""
    columns = ["item", "rank", "dense", "dense_p", "changed", "changed_p"]
    if not items:
        return pd.DataFrame(columns=columns)
    count, top = items["dense"].shape
    held = {
        "item": np.repeat(of, top),
        "rank": np.tile(np.arange(1, top + 1), count),
        "dense": [spell(int(word)) for word in items["dense"].ravel()],
        "dense_p": items["dense_p"].ravel().astype(float),
        "changed": [spell(int(word)) for word in items["changed"].ravel()],
        "changed_p": items["changed_p"].ravel().astype(float),
    }
    return pd.DataFrame(held, columns=columns)


# ---- language models ---------------------------------------------------------------------------------------
def language(
    on: Subject, split: str, items: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Every token of the texts, those without a prediction with no divergence; first words; facts."""
    words = Words(on.tokenizer)
    columns = ["text", "position", "token", "word", "kl", "dense_p", "changed_p", "same_first_word"]
    rows: list[pd.DataFrame] = []
    for text in np.unique(items["example"]) if items else ():
        tokens, places = tokens_of(on, split, int(text))
        rows.append(
            pd.DataFrame({"text": int(text), "position": places, "token": tokens, "word": map(words, tokens)})
        )
    if not rows:
        return pd.DataFrame(columns=columns), tops_of({}, np.empty(0), words), {}
    table = pd.concat(rows, ignore_index=True)
    known = pd.DataFrame(
        {
            "text": items["example"],
            "position": items["position"],
            "kl": items["divergence"].astype(float),
            "dense_p": np.exp(items["dense_log_p"].astype(float)),
            "changed_p": np.exp(items["changed_log_p"].astype(float)),
            "same_first_word": items["same_top"],
        }
    )
    table = table.merge(known, how="left", on=["text", "position"])[columns]
    of = np.flatnonzero(table["kl"].notna())
    facts = {
        "unit": "nats a token",
        "texts": len(rows),
        "tokens": len(known),
        "kl": float(known["kl"].mean()),
        "kl_most": float(known["kl"].max()),
        "same_first_word": float(known["same_first_word"].mean()),
        "words": LEGEND,
    }
    return table, tops_of(items, of, words), facts


def tokens_of(on: Subject, split: str, row: int) -> tuple[list[int], list[int]]:
    """The tokens of a text that is predicted, and their positions: hidden ones as they are; without padding;
    of encoder-decoders what is written.
    """
    columns = {name: values[row] for name, values in on.split(split).items()}
    labels = columns[on.task.targets]
    known = labels != on.task.missing
    shown = torch.where(known, labels, labels.new_zeros(()))
    kept = known
    ids = columns.get("input_ids")
    if ids is not None and ids.shape == labels.shape and not isinstance(on.task, Seq2SeqLM):
        shown = torch.where(known, labels, ids)
        kept = known | (columns.get("attention_mask", torch.ones_like(ids)) != 0)
    places = kept.nonzero()[:, 0]
    return shown[places].tolist(), places.tolist()


# ---- classifiers -------------------------------------------------------------------------------------------
def classification(
    on: Subject, split: str, items: dict[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Every example (or labelled token) with both answers; first classes; facts.

    confidence : the changed model's probability of its own answer
    """
    spell = functools.lru_cache(functools.partial(class_name, on))
    columns = ["example", "position", "text", "truth", "before", "after", "before_p", "confidence"]
    columns += ["kl", "flip"]
    if not items:
        return pd.DataFrame(columns=columns), tops_of({}, np.empty(0), spell), {}
    before, after, truth = items["dense"][:, 0], items["changed"][:, 0], items["target"]
    words = Words(on.tokenizer)
    places = list(zip(items["example"].tolist(), items["position"].tolist(), strict=True))
    table = pd.DataFrame(
        {
            "example": items["example"],
            "position": items["position"],
            "text": [text_around(on, split, row, place, words) for row, place in places],
            "truth": [spell(int(v)) for v in truth],
            "before": [spell(int(v)) for v in before],
            "after": [spell(int(v)) for v in after],
            "before_p": items["dense_p"][:, 0],
            "confidence": items["changed_p"][:, 0],
            "kl": items["divergence"].astype(float),
            "flip": np.select(
                [
                    (before == truth) & (after != truth),
                    (before != truth) & (after == truth),
                    before != after,
                ],
                KINDS,
                "",
            ),
        },
        columns=columns,
    )
    counts = {name.replace(" ", "_"): int((table["flip"] == name).sum()) for name in KINDS}
    facts = {
        "unit": "nats an example",
        "items": len(table),
        "kl": float(table["kl"].mean()),
        "kl_most": float(table["kl"].max()),
        **counts,
        "mcnemar_p": mcnemar(counts["right_to_wrong"], counts["wrong_to_right"]),
        "words": LEGEND,
    }
    return table, tops_of(items, np.arange(len(table)), spell), facts


def text_around(on: Subject, split: str, row: int, place: int, words: Words, most: int = 64) -> str:
    """The text of an example; of a labelled token, in brackets, the tokens beside it."""
    columns = on.split(split)
    if "input_ids" not in columns:
        return f"example {row}"
    ids = columns["input_ids"][row]
    if columns[on.task.targets].ndim == 2:
        first = max(0, place - 6)
        beside = [
            words.text(ids[part].tolist()) for part in (slice(first, place), slice(place + 1, place + 7))
        ]
        return f"{beside[0]} [{words(int(ids[place])).strip()}] {beside[1]}".strip()
    if "attention_mask" in columns:
        ids = ids[columns["attention_mask"][row] != 0]
    return words.text(ids[:most].tolist()) + (" …" if len(ids) > most else "")
