"""The `flatness` instrument: models with the same pre-training loss, how flat their minima are and what they
know (Liu, Xie, Li and Ma 2023).
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from workbench.axis import parameter
from workbench.curvature.estimators.flatness import PROBED, flatness_study, rank_correlations
from workbench.errors import BadInput
from workbench.figures import figure
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class FlatnessResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        fig = figure("Flatness and what was learned", "trace of the Hessian", "accuracy of the probe")
        for recipe in self.table["recipe"].unique():
            mine = self.table[self.table["recipe"] == recipe]
            fig.add_scatter(x=mine["trace"], y=mine["probe_accuracy"], name=str(recipe), mode="markers")
        return fig


class Flatness(SubjectInstrument):
    """Train the subject's architecture from random weights by several optimizers, take each at one loss,
    and compare the Hessian's trace with the accuracy of a probe for what the text hides.
    """

    summary_line = "models of one pre-training loss: trace of the Hessian against downstream accuracy"

    seeds: int = parameter(3, "models of each optimizer", ge=1, le=20)
    steps: int = parameter(1500, "optimizer steps of each", ge=1, le=100_000, scale="log")
    examples: int = parameter(64, "validation examples of the Hessian", ge=1)
    probes: int = parameter(48, "random probes of its trace", ge=2)

    @classmethod
    def result_class(cls) -> type[Result]:
        return FlatnessResult

    def check(self, on: Subject) -> None:
        for split in ("train", "validation"):
            on.split(split)
        for split in PROBED:
            if split not in on.splits or "states" not in on.split(split):
                raise BadInput(
                    f"subject: a probe needs the splits {' and '.join(PROBED)} with a column states; "
                    "take hidden-markov"
                )

    def _run(self, on: Subject, progress: Progress) -> Result:
        table = flatness_study(on, self.seeds, self.steps, self.examples, self.probes, progress)
        facts = rank_correlations(table) if len(table) else {}
        return self.result(table, facts)
