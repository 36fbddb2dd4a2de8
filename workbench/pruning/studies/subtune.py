"""The `subtune` instrument: which blocks of a trained model are worth fine-tuning on a new task
(Kaplun et al. 2023, SubTuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from workbench.axis import entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.sparse_training.train_sparse import TrainSparse
from workbench.results import Result
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Subtune(SubjectInstrument):
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
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    learning_rate: float = parameter(1e-3, "peak learning rate (AdamW, cosine)", gt=0, le=10, scale="log")
    choose_on: str = parameter("validation", "split whose loss chooses the blocks")
    test_split: str = parameter("test", "split for the reported loss and metrics")

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        return {"lr": "learning_rate"}

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
            seed=self.seed,
            test_split=self.choose_on,
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
        tuned: dict[tuple[int, ...], Subject] = {}

        def tried(blocks: tuple[int, ...], step: int) -> float:
            result = self.tuning(blocks).run(on, Progress(), cache=False)
            assert result.subject is not None
            tuned[blocks] = result.subject
            loss = float(result.facts.get("loss", float("inf")))
            rows.append(
                {
                    "step": step,
                    "blocks": ",".join(map(str, blocks)) or "head",
                    "added": blocks_added(blocks, chosen),
                    "loss": loss,
                    "accuracy": result.facts.get("accuracy"),
                    "trained_parameters": result.facts["trained_parameters"],
                }
            )
            return loss

        count = len(on.blocks())
        chosen: tuple[int, ...] = ()
        best = tried((), 0)
        for step in range(1, min(self.most, count) + 1):
            found: dict[tuple[int, ...], float] = {}
            for block in progress.track([b for b in range(count) if b not in chosen], f"block {step}"):
                candidate = tuple(sorted({*chosen, block}))
                found[candidate] = tried(candidate, step)
            if not found:
                break
            candidate = min(found, key=lambda c: found[c])
            if found[candidate] > best * (1 - self.gain):
                break
            chosen, best = candidate, found[candidate]
            tuned = {chosen: tuned[chosen]}
            if progress.stopped:
                break
        made = tuned[chosen]
        facts = {
            "chosen": ",".join(map(str, chosen)) or "head",
            f"{self.choose_on}_loss": best,
            "trained_parameters": next(
                r["trained_parameters"] for r in rows if r["blocks"] == (",".join(map(str, chosen)) or "head")
            ),
        }
        if not progress.stopped:
            facts |= made.evaluate(self.test_split, progress=progress)
        return self.result(pd.DataFrame(rows), facts, subject=made)


def blocks_added(blocks: tuple[int, ...], chosen: tuple[int, ...]) -> int:
    """The block that a candidate adds to those chosen; -1 for the head alone."""
    return next((b for b in blocks if b not in chosen), -1)


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
