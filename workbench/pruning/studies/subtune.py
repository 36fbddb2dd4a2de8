"""The `subtune` instrument: which blocks of a trained model are worth fine-tuning on a new task
(Kaplun et al. 2023, SubTuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from workbench.axis import Choice, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.sparse_training.train_sparse import TrainSparse
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.chosen import FIELDS, RunFields
from workbench.training.resume import remembered
from workbench.training.schedule.schedules import LEARNING_RATE_SCHEDULE
from workbench.unfinished import current

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Subtune(SubjectInstrument, RunFields):
    """Fine-tune only a few blocks: each block alone first (the profile),
    then greedily the one whose addition helps most.
    """

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = (
        "fine-tuning profile of the blocks and a greedy choice of the few that are worth training"
    )

    most: int = parameter(2, "blocks to choose at most", ge=1, le=100)
    gain: float = parameter(
        0.02, "smallest share by which a further block must lower the validation loss", ge=0, lt=1
    )
    steps: int = parameter(100, "optimizer steps of every candidate", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log", group="Training")
    learning_rate: float = parameter(1e-3, "peak learning rate", gt=0, le=10, scale="log")
    schedule: Choice = LEARNING_RATE_SCHEDULE.choice("cosine", group="Training")
    choose_on: str = parameter("validation", "split whose loss chooses the blocks", group="Data")
    test_split: str = parameter("test", "split for the reported loss and metrics", group="Data")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"lr": "learning_rate", "learning_rate_schedule": "schedule"}

    @classmethod
    def result_class(cls) -> type[Result]:
        return SubtuneResult

    def tuning(self, blocks: tuple[int, ...]) -> TrainSparse:
        """The training of these blocks and the head, or of the head alone."""
        named = {"name": "blocks", "blocks": ",".join(map(str, blocks))}
        return TrainSparse(
            method="dense",
            trainable=named if blocks else "head",
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            seed=self.seed,
            test_split=self.choose_on,
            **{name: getattr(self, name) for name in FIELDS},
        )

    def code(self) -> str:
        """Version of the code that its trainings reach."""
        return code_version(type(self), [entry.value for entry in entries_in(self.tuning((0,)))])

    def check(self, on: Any) -> None:
        for split in ("train", self.choose_on, self.test_split):
            on.split(split)
        if self.choose_on == self.test_split:
            raise BadInput(
                f"choose_on: blocks chosen on {self.choose_on!r} would be judged on the split they were "
                "chosen on; give another"
            )
        if not on.blocks():
            raise BadInput("subject: the model has no repeated blocks to choose from")

    def _run(self, on: Subject, progress: Progress) -> Result:
        rows: list[dict[str, Any]] = []
        count = len(on.blocks())
        chosen: tuple[int, ...] = ()
        head = self.tried(on, (), progress)
        rows.append({"step": 0, "blocks": "head", "added": -1, **head.row})
        best = head
        for step in range(1, min(self.most, count) + 1):
            nearest: Tried | None = None
            for block in progress.track([b for b in range(count) if b not in chosen], f"block {step}"):
                found = self.tried(on, tuple(sorted({*chosen, block})), progress)
                if progress.stopped:  # in the midst of its training
                    break
                rows.append({"step": step, "blocks": named(found.blocks), "added": block, **found.row})
                if nearest is None or found.loss < nearest.loss:
                    nearest, found = found, nearest
                self.forget(on, found)
            if nearest is None or nearest.loss > best.loss * (1 - self.gain):
                break
            self.forget(on, best)
            chosen, best = nearest.blocks, nearest
            if progress.stopped:
                break
        facts = {
            "chosen": named(chosen),
            f"{self.choose_on}_loss": best.loss,
            "trained_parameters": best.row["trained_parameters"],
        }
        made = best.tuned(on, self)
        if not progress.stopped:
            facts |= made.evaluate(self.test_split, progress=progress)
        return self.result(pd.DataFrame(rows), facts, subject=made)

    def tried(self, on: Subject, blocks: tuple[int, ...], progress: Progress) -> Tried:
        """The training of these blocks, or of the head alone: its loss, and the weights it came to."""
        kept: list[Subject] = []

        def trained() -> dict[str, Any]:
            result = self.tuning(blocks).run(on, Candidate(progress), cache=False)
            assert result.subject is not None
            kept.append(result.subject)
            return {
                "loss": float(result.facts.get("loss", float("inf"))),
                "accuracy": result.facts.get("accuracy"),
                "trained_parameters": result.facts["trained_parameters"],
            }

        row = remembered(f"blocks-{'.'.join(map(str, blocks)) or 'head'}", trained)
        return Tried(blocks, row, kept[0] if kept else None)

    def forget(self, on: Subject, lost: Tried | None) -> None:
        """The checkpoints of a candidate that was not chosen are needed no more."""
        journal = current()
        if journal is not None and lost is not None:
            journal.forget(self.tuning(lost.blocks).key(on))


@dataclass(frozen=True)
class Tried:
    """A candidate: its row of the table, and the subject it came to; None when an earlier process trained it,
    of which only the row is kept.
    """

    blocks: tuple[int, ...]
    row: dict[str, Any]
    subject: Subject | None

    @property
    def loss(self) -> float:
        return float(self.row["loss"])

    def tuned(self, on: Subject, asked: Subtune) -> Subject:
        """Its subject: trained again where only the row is kept."""
        if self.subject is not None:
            return self.subject
        again = asked.tuning(self.blocks).run(on, Progress(), cache=False).subject
        assert isinstance(again, Subject)
        return again


class Candidate(Progress):
    """The progress of one candidate's training: it hears the Stop of the whole and draws nothing."""

    def __init__(self, whole: Progress) -> None:
        self.whole = whole
        super().__init__()
        self.stop = whole.stop

    @property
    def signal(self) -> int | None:
        """The signal that asked to stop, which is for the whole."""
        return self.whole.signal

    @signal.setter
    def signal(self, number: int | None) -> None:
        if number is not None:
            self.whole.signal = number


def named(blocks: tuple[int, ...]) -> str:
    return ",".join(map(str, blocks)) or "head"


class SubtuneResult(Result):
    """The profile: loss against the block that is trained, one series for every step of the choice."""

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure, rule

        fig = figure(
            "Fine-tuning one block more",
            x="block added",
            y=f"{getattr(self.instrument, 'choose_on', 'validation')} loss (nats)",
            barmode="group",
        )
        for step, part in self.table[self.table.added >= 0].groupby("step"):
            fig.add_bar(
                x=part.added, y=part.loss, name=f"choice {step}", marker_color=color(int(str(step)) - 1)
            )
        head = self.table[self.table.added < 0]
        if len(head):
            rule(fig, "head alone", y=float(head.loss.iloc[0]))
        return fig
