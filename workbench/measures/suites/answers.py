"""What one model answers to the items of a task, by the harness's own rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.errors import BadInput, one_line
from workbench.measures.suites.harness_limits import offline, quiet, sandboxed


@dataclass(frozen=True)
class TaskAnswers:
    """One entry an item, in the task's order.

    scores : metric -> (items,) 0 or 1, for metrics that say whether an item was answered rightly
    sums : metric -> (items, 2), a log-likelihood in nats and what it is divided by (items, words, bytes), for
        metrics of likelihood
    loglikelihoods : of an item's requests, in nats
    """

    task: str
    kind: str
    item: list[int]
    question: list[str]
    target: list[str]
    choices: NDArray[np.int64]
    scores: dict[str, NDArray[np.float64]]
    sums: dict[str, NDArray[np.float64]]
    loglikelihoods: list[NDArray[np.float64]]

    @property
    def chosen(self) -> list[int]:
        """The most probable choice of each item; -1 where there is none to choose from."""
        pairs = zip(self.loglikelihoods, self.choices, strict=True)
        return [int(np.argmax(found[:count])) if count > 1 else -1 for found, count in pairs]

    @property
    def chance(self) -> float:
        """Share of items that guessing answers rightly; NaN where there is nothing to choose from."""
        return float((1 / self.choices).mean()) if (self.choices > 1).all() else float("nan")


def answers_of(model: Any, task: Any, limit: int = 0, chat: bool = False, seed: int = 0) -> TaskAnswers:
    """Ask a `model_class()` the first `limit` items of a task (0: all), each after examples that are drawn
    with the seed: the same for every model. `BadInput` for items that contradict the task.
    """
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(seed)
    name = task.task_name
    with quiet(), offline(), sandboxed():
        try:
            found = evaluate(
                lm=model,
                task_dict={"tasks": {name: task}},
                limit=limit or None,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except Exception as error:
            if model.answering or isinstance(error, BadInput):
                raise
            raise BadInput(
                f"tasks: {name!r} has an item that its own settings do not fit: {type(error).__name__}: "
                f"{one_line(str(error))[:200]}"
            ) from None
    assert found is not None
    samples = found["samples"][name]
    samples = sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"])
    return gathered(task, samples)


def gathered(task: Any, samples: list[dict[str, Any]]) -> TaskAnswers:
    kind = str(task.OUTPUT_TYPE)
    scores: dict[str, NDArray[np.float64]] = {}
    sums: dict[str, NDArray[np.float64]] = {}
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if metric == "perplexity":
            sums[metric] = np.array([[value, 1.0] for value in values])
        elif all(isinstance(value, tuple) and len(value) == 2 for value in values):
            if kind == "loglikelihood_rolling":
                sums[metric] = np.array(values, dtype=np.float64)
        elif all(isinstance(value, (int, float, np.number)) and value in (0, 1) for value in values):
            scores[metric] = np.array(values, dtype=np.float64)
    asked = [
        [answer if isinstance(answer, float) else answer[0] for answer in sample["filtered_resps"]]
        for sample in samples
    ]
    counts = [
        len(task.doc_to_choice(sample["doc"])) if kind == "multiple_choice" else 1 for sample in samples
    ]
    return TaskAnswers(
        task.task_name,
        kind,
        [int(sample["doc_id"]) for sample in samples],
        [str(sample["arguments"][0][0]) for sample in samples],
        [str(sample["target"]) for sample in samples],
        np.array(counts),
        scores,
        sums,
        [np.array(found, dtype=np.float64) for found in asked],
    )


def item_table(dense: TaskAnswers, changed: TaskAnswers | None = None) -> pd.DataFrame:
    """One row an item: what both chose, whether each was right by each metric, and what became of it."""
    table = pd.DataFrame(
        {
            "task": dense.task,
            "item": dense.item,
            "question": [text[-400:] for text in dense.question],
            "target": dense.target,
        }
    )
    for name, answers in (("dense", dense), ("changed", changed)):
        if answers is None:
            continue
        table[f"{name}_choice"] = answers.chosen
        table[f"{name}_loglikelihoods"] = [found.tolist() for found in answers.loglikelihoods]
        for metric, scores in answers.scores.items():
            table[f"{name}_{metric}"] = scores
    for metric in dense.scores if changed is not None else ():
        before, after = table[f"dense_{metric}"], table[f"changed_{metric}"]
        table[f"{metric}_became"] = np.select(
            [before > after, after > before, before == 1],
            ["right to wrong", "wrong to right", "stayed right"],
            "stayed wrong",
        )
    return table
