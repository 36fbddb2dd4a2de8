"""The fields that every data-dependent curvature instrument shares, and the operator they open."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

from workbench.axis import parameter
from workbench.curvature.operators.curvature_operator import (
    CurvatureOperator,
    curvature_operator,
)
from workbench.curvature.operators.output_space import check_kind
from workbench.curvature.operators.weights import find_places
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject

OperatorKind = Literal["hessian", "ggn", "empirical-fisher", "mc-fisher"]


class CurvatureInstrument(SubjectInstrument):
    """Which matrix, over which weights, on which data."""

    operator: OperatorKind = parameter(
        "hessian", "matrix: hessian, ggn (generalised Gauss-Newton), empirical-fisher or mc-fisher"
    )
    layers: str = parameter(
        "all",
        "weights it covers: all (every trainable parameter), blocks, or globs over layer or parameter names",
        min_length=1,
    )
    split: str = parameter("calibration", "data split", min_length=1, group="Data")
    examples: int = parameter(
        64, "examples of the split, exact over all of them", ge=1, le=65536, scale="log", group="Data"
    )
    batch_size: int = parameter(
        8,
        "examples in memory at a time; does not change the result",
        ge=1,
        le=4096,
        scale="log",
        group="Data",
    )
    dtype: Literal["float32", "float64"] = parameter(
        "float32", "precision of every product", group="Machine and seed"
    )

    def check(self, on: Subject) -> None:
        check_kind(self.operator, on.task)
        on.split(self.split)
        find_places(on.model, self.layers)

    def open(
        self, on: Subject, progress: Progress, layers: str | None = None
    ) -> AbstractContextManager[CurvatureOperator]:
        return curvature_operator(
            on,
            self.operator,
            layers or self.layers,
            self.split,
            self.examples,
            self.batch_size,
            self.dtype,
            seed=self.seed,
            progress=progress,
        )


def preview(progress: Progress, result: Result) -> None:
    result.partial = True
    progress.preview(result)
