"""The `task-suite` instrument: the lm-evaluation-harness's tasks on a model and on what became of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from workbench.axis import parameter
from workbench.errors import BadInput, notice
from workbench.instruments import SubjectInstrument
from workbench.measures.fidelity import candidate, check_comparable, sources_in, stamp
from workbench.measures.reference import on_its_data
from workbench.measures.suites.answers import TaskAnswers, answers_of, item_table
from workbench.measures.suites.built_tasks import build
from workbench.measures.suites.harness_limits import quiet
from workbench.measures.suites.harness_model import Interrupted, model_class
from workbench.measures.suites.recovery import MEAN, compared_rows, score_rows
from workbench.measures.suites.task_files import OWN, check_installed, harness_version, task_files
from workbench.measures.suites.task_suite_result import TaskSuiteResult
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.subjects.tasks import CausalLM
from workbench.unfinished.finished_parts import FinishedParts

COLUMNS = ("subject", "task", "metric", "items", "chance", "score", "score_se", "score_low", "score_high")
COMPARED = ("recovery", "recovery_low", "recovery_high", "right_to_wrong", "wrong_to_right", "mcnemar_p")


@dataclass(frozen=True)
class Asked:
    """A model that is asked, with the tokenizer that turns the tasks' texts into its tokens."""

    name: str
    model: Subject
    tokenizer: Any


class Unfinished(Exception):
    """Somebody asked to stop: `answers` are those of the tasks before."""

    def __init__(self, answers: list[TaskAnswers]) -> None:
        self.answers = answers


class TaskSuite(SubjectInstrument):
    """Does a smaller model still solve the tasks? The lm-evaluation-harness's multiple-choice and likelihood
    tasks on the subject and on any number of changed models: accuracies with their errors, recovery in %,
    the items that flipped and whether so many could be chance.
    """

    summary_line: ClassVar[str] = "tasks of the lm-evaluation-harness: recovery in %, flips, McNemar's p"

    candidates: str = parameter(
        "", "changed models, separated by commas: folders, saved results, GGUF files, hub ids, built-ins"
    )
    tasks: str = parameter(
        OWN,
        "tasks, separated by commas: task files (.yaml), folders of them, names of the harness's tasks, or "
        f"{OWN}, made of installed packages",
    )
    task_data: str = parameter(
        "", "folder that holds the tasks' data sets, each as its name; empty: in the cache"
    )
    shots: int = parameter(-1, "examples before each item; -1: as many as the task says", ge=-1, le=100)
    limit: int = parameter(0, "of each task, the first ones; 0: all", ge=0, unit="items")
    batch_tokens: int = parameter(
        2048, "read at once, padding included", ge=1, scale="log", unit="tokens", group="Machine and seed"
    )
    chat: bool = parameter(False, "put each item into the tokenizer's chat template")

    @classmethod
    def result_class(cls) -> type[Result]:
        return TaskSuiteResult

    @property
    def sources(self) -> list[str]:
        return sources_in(self.candidates)

    def check(self, on: Subject) -> None:
        check_asked(on, self.chat)
        check_comparable(on, "candidates", self.sources)
        task_files(self.tasks, self.task_data)

    def key(self, on: Any) -> str:
        try:
            files = [file.stamped() for file in task_files(self.tasks, self.task_data)]
        except BadInput as error:  # said by `check`
            files = [[str(error)]]
        parts = [super().key(on), [stamp(source) for source in self.sources], files, harness_version()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _run(self, on: Subject, progress: Progress) -> Result:
        return self.asked(on, self.sources, progress)

    def between(self, dense: Subject, changed: Subject, progress: Progress | None = None) -> Result:
        """The result for a changed model that is at hand; not cached."""
        check_asked(dense, self.chat)
        return self.asked(dense, [changed], progress or Progress())

    def asked(self, dense: Subject, changed: Sequence[str | Subject], progress: Progress) -> Result:
        files = task_files(self.tasks, self.task_data)
        with quiet():
            tasks = [build(file, self.shots) for file in files]
        finished = FinishedParts(self.name())

        def whole() -> list[TaskAnswers]:
            first = Asked(dense.name, dense, dense.tokenizer)
            found = self.answers(first, tasks, progress, finished, 0)
            if len(found) < len(tasks):
                raise Unfinished(found)
            return found

        told = json.dumps(
            [[file.stamped() for file in files], self.model_dump(exclude={"candidates", "device"})]
        )
        try:
            try:
                before = dense.memo(("task answers", told), whole)
            except Unfinished as part:
                before = part.answers
            told_by_guessing(dense.name, before)
            rows, items, shown = score_rows(dense.name, before), list[pd.DataFrame](), {dense.name}
            for place, source in enumerate(changed):
                if progress.stopped:
                    break
                other = opened(source, dense, shown)
                shown.add(other.name)
                after = self.answers(other, tasks, progress, finished, place + 1)
                rows += compared_rows(other.name, before[: len(after)], after, self.seed)
                items += [
                    item_table(one, two).assign(subject=other.name)
                    for one, two in zip(before, after, strict=False)
                ]
                del other
        finally:
            finished.close()
        table = pd.DataFrame(rows, columns=[*COLUMNS, *(COMPARED if changed else ())])
        if not changed:
            items = [item_table(found).assign(subject=dense.name) for found in before]
        tables = {"items": pd.concat(items, ignore_index=True)} if items else {}
        return self.result(table, self.facts(dense, table, tasks), tables=tables)

    def answers(
        self, asked: Asked, tasks: Sequence[Any], progress: Progress, finished: FinishedParts, place: int
    ) -> list[TaskAnswers]:
        """Of the tasks that were answered whole."""
        found: list[TaskAnswers] = []
        for task in tasks:
            label = (
                f"{asked.name}: {task.task_name}"
                if place == 0
                else f"{asked.name} ({place}): {task.task_name}"
            )
            model = model_class()(asked.model, asked.tokenizer, self.batch_tokens, progress, label, finished)
            try:
                found.append(answers_of(model, task, self.limit, self.chat, self.seed))
            except Interrupted:
                break
        return found

    def facts(self, dense: Subject, table: pd.DataFrame, tasks: Sequence[Any]) -> dict[str, Any]:
        facts: dict[str, Any] = {"reference": dense.name, "tasks": len(tasks), "harness": harness_version()}
        if not len(table):
            return facts
        own = table["subject"] == table["subject"].iloc[0]
        single = table[own & (table["task"] != MEAN)]
        facts["items"] = int(single.drop_duplicates("task")["items"].sum())
        others = list(dict.fromkeys(table.loc[~own, "subject"]))
        if others:
            facts["changed"] = others[0] if len(others) == 1 else ", ".join(others)
        for metric in dict.fromkeys(
            single.loc[single["chance"].notna() | single["score_low"].notna(), "metric"]
        ):
            dense_row, *rows = summed_up(table, metric)
            if not rows:
                facts |= {metric: dense_row["score"], f"{metric}_se": dense_row["score_se"]}
                continue
            facts |= {
                f"reference_{metric}": dense_row["score"],
                f"reference_{metric}_se": dense_row["score_se"],
            }
            if len(rows) > 1:
                best = max(rows, key=lambda row: (row["recovery"] == row["recovery"], row["recovery"]))
                facts |= {f"{metric}_best": best["subject"], f"{metric}_best_recovery": best["recovery"]}
                continue
            facts |= {metric: rows[0]["score"], f"{metric}_se": rows[0]["score_se"]}
            facts |= {f"{metric}_{name}": rows[0][name] for name in COMPARED}
        return facts


def told_by_guessing(name: str, answers: Sequence[TaskAnswers]) -> None:
    """Say of which tasks recovery means nothing, because guessing does as well."""
    rows = [row for row in score_rows(name, answers) if row["task"] != MEAN and row.get("chance", 0) > 0]
    poor = [f"{row['task']} ({row['metric']})" for row in rows if row["score_low"] <= row["chance"]]
    if poor:
        notice(
            f"tasks: {name!r} does no better than guessing on {', '.join(poor)}; recovery there says little"
        )


def summed_up(table: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    """The row of each subject for a metric: of the mean of the tasks where there are several."""
    mine = table[table["metric"] == metric]
    found = mine[mine["task"] == MEAN] if (mine["task"] == MEAN).any() else mine
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def check_asked(on: Subject, chat: bool) -> None:
    """`BadInput` for what cannot be asked in words."""
    check_installed()
    if not isinstance(on.task, CausalLM):
        raise BadInput(f"subject: the task {on.task.name} continues no text; task-suite needs causal-lm")
    if on.tokenizer is None:
        raise BadInput(
            f"subject: {on.name!r} has no tokenizer, and tasks are texts; put the tokenizer's files "
            "into its folder"
        )
    if chat and not getattr(on.tokenizer, "chat_template", None):
        raise BadInput(f"chat: the tokenizer of {on.name!r} has no chat template; leave chat off")


def words_of(tokenizer: Any) -> dict[str, int]:
    """Word -> id; empty for a tokenizer that does not say."""
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}


def opened(source: str | Subject, dense: Subject, shown: set[str]) -> Asked:
    """A changed model; its own tokenizer where that knows other words than the reference's."""
    if isinstance(source, Subject):
        name, model, own = source.name, on_its_data(dense, source), source.tokenizer
    else:
        found = candidate(source, dense)
        name, model, own = found.name, found.model, found.tokenizer
    tokenizer = dense.tokenizer
    if own is not None and words_of(own) != words_of(tokenizer):
        notice(f"candidates: {name!r} has other words than the reference; it reads by its own tokenizer")
        tokenizer = own
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return Asked(name if name not in shown else next(n for n in numbered if n not in shown), model, tokenizer)
