"""The `interference` instrument: where models that were trained from one base fight, before any merge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from workbench.arithmetic.conflict_grid import VALUES, conflict_grid
from workbench.arithmetic.conflicts import conflict_table, whole_model
from workbench.arithmetic.fine_tunes import check_trains, idle_where_named
from workbench.arithmetic.merge import Merge
from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.measures.fidelity import sources_in, stamp
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go


class InterferenceView(BaseModel):
    """What the viewer may choose without comparing again."""

    value: Literal["conflict", "cosine", "norm", "relative", "cancelled"] = Field(
        "conflict", description="what the colours show"
    )


class InterferenceResult(Result):
    """A row a tensor; the grid shows those of the repeated blocks."""

    def view_model(self) -> type[BaseModel]:
        return InterferenceView

    def figure(self, **view: Any) -> go.Figure:
        value = InterferenceView(**view).value
        return conflict_grid(self.table, value, f"{VALUES[value][0]}, {self.facts['models']} models")


class Interference(SubjectInstrument):
    """Where do models that were trained from one base disagree? Signs, angles and sizes of their differences
    by block and tensor; nothing is run and nothing merged.
    """

    summary_line: ClassVar[str] = "where fine-tunes of one base disagree: signs, cosines, norms by block"

    parents: str = parameter("", "models to compare, as for merge; empty: fine-tunes are made here")
    base: str = parameter("", "what all were trained from, where it is not the subject")
    fine_tunes: int = parameter(2, "fine-tunes to make where no parents are named", ge=1, le=32)
    steps: int = parameter(100, "optimizer steps of each of them", ge=1, le=1_000_000, scale="log")
    learning_rate: float = parameter(1e-3, "peak learning rate of each of them", gt=0, le=100, scale="log")

    @classmethod
    def result_class(cls) -> type[Result]:
        return InterferenceResult

    def key(self, on: Any) -> str:
        stamps = [stamp(source) for source in (*sources_in(self.parents), self.base)]
        return hashlib.sha256(json.dumps([super().key(on), stamps]).encode()).hexdigest()[:24]

    def idle(self) -> Iterator[str]:
        yield from super().idle()
        yield from idle_where_named(self, "parents")

    def check(self, on: Subject) -> None:
        if self.base and not sources_in(self.parents):
            raise BadInput("base: needs parents that are named; name them with --parents")
        if not self.parents:
            check_trains(on)

    def _run(self, on: Subject, progress: Progress) -> Result:
        asked = {name: value for name, value in self.model_dump().items() if name in Merge.model_fields}
        models = Merge(**asked).models(on, progress)
        table = conflict_table(models, progress)
        names = {f"model_{i + 1}": parent.name for i, parent in enumerate(models.parents)}
        facts = {"models": len(models.parents), "base": models.base.name, **names, **whole_model(table)}
        return self.result(table, facts)
