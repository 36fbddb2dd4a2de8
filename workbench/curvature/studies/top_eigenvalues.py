"""The largest and smallest eigenvalues, with residual norms, multiplicities,
and the layers their vectors live in.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench.axis import parameter
from workbench.curvature.estimators.eigenpairs import Eigenpairs, eigenpairs
from workbench.curvature.operators.curvature_operator import CurvatureOperator
from workbench.curvature.studies.settings import CurvatureInstrument, preview
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class TopEigenvalues(CurvatureInstrument):
    """Eigenvalues at the ends of the spectrum by block Lanczos with restart, to a stated residual,
    with multiplicity.
    """

    summary_line = (
        "largest / smallest eigenvalues with residuals, multiplicity and the layers their vectors live in"
    )

    count: int = parameter(5, "eigenvalues at each end", ge=1, le=200)
    end: Literal["top", "bottom", "both"] = parameter("top", "which end of the spectrum")
    tolerance: float = parameter(
        1e-4,
        "residual norm over the largest magnitude at which a pair counts as converged",
        gt=0,
        lt=1,
        scale="log",
        group="Search",
    )
    block: int = parameter(2, "vectors multiplied together", ge=1, le=32, group="Search")
    max_products: int = parameter(
        600,
        "matrix-vector products, at most, at each end and search",
        ge=4,
        le=100_000,
        scale="log",
        group="Search",
    )
    verify: bool = parameter(
        True,
        "search once more, orthogonally to what was found, for missed copies of repeated eigenvalues",
        group="Search",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return EigenvaluesResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        rows: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        with self.open(on, progress.quiet()) as operator:
            for end in ("top", "bottom") if self.end == "both" else (self.end,):

                def each(
                    done: int,
                    values: Tensor,
                    end: str = end,
                    finished: tuple[dict[str, Any], ...] = tuple(rows),
                ) -> None:
                    progress.show(f"products ({end})", done, None)
                    if progress.watched:
                        early = [
                            {"end": end, "rank": i, "eigenvalue": float(v), "residual": math.nan}
                            for i, v in enumerate(values)
                        ]
                        preview(
                            progress,
                            self.result(pd.DataFrame([*finished, *early]), {"products": operator.products}),
                        )

                found = eigenpairs(
                    operator,
                    self.count,
                    end,
                    self.tolerance,
                    self.block,
                    None,
                    self.max_products,
                    self.verify,
                    self.seed,
                    each,
                )
                rows += rows_of(found, end, operator)
                facts |= {
                    f"{end}_eigenvalue": float(found.values[0]) if len(found.values) else math.nan,
                    f"{end}_multiplicity": found.multiplicities()[0][1] if len(found.values) else 0,
                    f"{end}_note": found.note,
                    f"{end}_resolved": found.note == "multiplicities are resolved",
                }
                if progress.stopped:
                    break
            facts |= {"parameters": operator.size, "products": operator.products, "operator": self.operator}
        columns = ["end", "rank", "eigenvalue", "residual", "layer", "layer_share"]
        return self.result(pd.DataFrame(rows, columns=columns), facts)


def rows_of(found: Eigenpairs, end: str, operator: CurvatureOperator) -> list[dict[str, Any]]:
    """One row an eigenvalue; `layer` holds the largest share of its vector's squared norm."""
    rows = []
    for rank, (value, residual, vector) in enumerate(
        zip(found.values.tolist(), found.residuals.tolist(), found.vectors, strict=True)
    ):
        shares = torch.stack([vector[s].double().square().sum() for s in operator.slices])
        best = int(shares.argmax())
        rows.append(
            {
                "end": end,
                "rank": rank,
                "eigenvalue": value,
                "residual": residual,
                "layer": operator.names[best],
                "layer_share": float(shares[best] / shares.sum()),
            }
        )
    return rows


class EigenvaluesResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, points

        fig = figure("Eigenvalues at the ends of the spectrum", x="rank from the end", y="eigenvalue")
        for end, rows in self.table.groupby("end", sort=False):
            text = [
                f"{v:.6g}, residual {r:.1e}"
                for v, r in zip(rows["eigenvalue"], rows["residual"], strict=True)
            ]
            points(
                fig,
                rows["rank"] + 1,
                rows["eigenvalue"],
                str(end),
                text=text,
                error_y=dict(array=rows["residual"].fillna(0)),
            )
        return fig
