"""The trace with a standard error, in total and per layer, and the squared Frobenius norm."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel

from workbench.axis import parameter
from workbench.curvature.estimators.probes import standard_error
from workbench.curvature.estimators.traces import (
    ProbeSums,
    TraceEstimate,
    estimate,
    hutchinson_probes,
    narrow,
)
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Stopped
from workbench.curvature.studies.settings import CurvatureInstrument, preview
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class Trace(CurvatureInstrument):
    """Trace by Hutchinson (with per-layer traces, Frobenius norm and diagonal), Hutch++ or XTrace,
    each with a standard error.
    """

    summary_line = (
        "trace with a standard error (Hutchinson, Hutch++, XTrace), per layer, Frobenius norm, diagonal"
    )

    method: Literal["hutchinson", "hutch++", "xtrace"] = parameter(
        "hutchinson", "estimator; hutchinson also gives layers, norm and diagonal"
    )
    products: int = parameter(32, "matrix-vector products, at most", ge=2, le=4096, scale="log")
    interval: float = parameter(
        0.0,
        "stop when two standard errors are within this fraction of the trace (0: use all products)",
        ge=0,
        le=10,
    )
    diagonal: bool = parameter(
        False, "also estimate the diagonal and summarise it per layer", only_with="method=hutchinson"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return TraceResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        with self.open(on, progress.quiet()) as operator:
            if self.method == "hutchinson":
                return self._hutchinson(operator, progress)
            label = f"{self.method} products"
            progress.show(label, 0, self.products)

            def each(found: TraceEstimate) -> None:
                progress.show(label, min(operator.products, self.products), self.products)
                if progress.watched:
                    preview(progress, self._result(operator, found))

            found = estimate(operator, self.method, self.products, self.seed, self.interval, each)
            progress.partial = progress.partial or found.partial
            progress.show(label, self.products, self.products)
            return self._result(operator, found)

    def _hutchinson(self, operator: CurvatureOperator, progress: Progress) -> Result:
        group = min(8, self.products)
        found, sums = TraceEstimate("hutchinson", math.nan, math.nan, 0), ProbeSums()
        try:
            groups = hutchinson_probes(
                operator, self.products, self.seed, group, operator.slices, self.diagonal
            )
            for sums in progress.track(groups, "probes", -(-self.products // group)):
                found = of_sums(sums)
                if progress.watched:
                    preview(progress, self._result(operator, found, sums))
                if found.products >= 8 and narrow(found.value, found.error, self.interval):
                    break
        except Stopped:
            progress.partial = True
        return self._result(operator, found, sums)

    def _result(
        self, operator: CurvatureOperator, found: TraceEstimate, sums: ProbeSums | None = None
    ) -> Result:
        facts: dict[str, Any] = {
            "trace": found.value,
            "standard_error": found.error,
            "low": found.value - 2 * found.error,
            "high": found.value + 2 * found.error,
            "mean_eigenvalue": found.value / operator.size,
            "frobenius_squared": found.frobenius_squared,
            "frobenius_squared_standard_error": found.frobenius_squared_error,
            "products": found.products,
            "parameters": operator.size,
            "operator": self.operator,
            "method": self.method,
        }
        samples = pd.DataFrame({"probe": np.arange(len(found.samples)), "sample": found.samples})
        running = np.array(
            [
                [found.samples[: i + 1].mean(), standard_error(found.samples[: i + 1])]
                for i in range(len(found.samples))
            ]
        )
        samples["trace"], samples["standard_error"] = running.reshape(-1, 2).T
        tables = {"layers": self._layers(operator, sums)} if sums is not None and sums.forms else {}
        return self.result(samples, facts, tables=tables)

    def _layers(self, operator: CurvatureOperator, sums: ProbeSums) -> pd.DataFrame:
        forms = np.array(sums.block_forms)  # (probes, layers)
        rows = []
        for place, (name, s) in enumerate(zip(operator.names, operator.slices, strict=True)):
            value, size = float(forms[:, place].mean()), s.stop - s.start
            row: dict[str, Any] = {
                "layer": name,
                "parameters": size,
                "trace": value,
                "trace_standard_error": standard_error(forms[:, place]),
                "mean_eigenvalue": value / size,
            }
            if sums.diagonal is not None and sums.diagonal_square is not None:
                count = len(sums.forms)
                mean = sums.diagonal[s].double() / count
                spread = (sums.diagonal_square[s].double() / count - mean.square()).clamp_min(0) / max(
                    count - 1, 1
                )
                row |= {
                    "diagonal_least": float(mean.min()),
                    "diagonal_median": float(mean.median()),
                    "diagonal_largest": float(mean.max()),
                    "diagonal_standard_error": float(spread.mean().sqrt()),
                    "diagonal_negative": float((mean < 0).double().mean()),
                }
            rows.append(row)
        return pd.DataFrame(rows)


def of_sums(sums: ProbeSums) -> TraceEstimate:
    values = np.array(sums.forms)
    return TraceEstimate(
        "hutchinson",
        float(values.mean()),
        standard_error(values),
        len(values),
        values,
        float(np.mean(sums.squares)),
        standard_error(sums.squares),
    )


class TraceView(BaseModel):
    show: Literal["layers", "convergence"] = parameter("layers", "traces by layer, or the running estimate")


class TraceResult(Result):
    """The running estimate with its interval, or the layers as a heat map."""

    def view_model(self) -> type[BaseModel] | None:
        return TraceView if "layers" in self.tables else None

    def figure(self, **view: Any) -> go.Figure:
        from workbench.curvature.studies.drawings import layers_figure
        from workbench.figures import figure, line

        if view.get("show", "layers") == "layers" and "layers" in self.tables:
            return layers_figure(self.tables["layers"])
        shown = self.table.iloc[1:]
        fig = figure(f"Trace by {self.facts['method']}", x="probes", y="trace")
        half = 2 * shown["standard_error"]
        line(
            fig,
            shown["probe"] + 1,
            shown["trace"],
            "running mean, ± 2 standard errors",
            band=(shown["trace"] - half, shown["trace"] + half),
        )
        return fig

    def summary(self) -> str:
        f = self.facts
        note = " (partial: stopped early)" if self.partial else ""
        return (
            f"trace{note}: {f['trace']:.6g} ± {f['standard_error']:.2g} (standard error, {f['method']}, "
            f"{f['products']} products) of the {f['operator']}, "
            f"{f['parameters']:,} parameters"
        )
