"""The eigenvalue density of a curvature matrix, with a confidence band, resolved outliers,
and what it implies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import BaseModel, create_model
from torch import Tensor

from workbench.axis import parameter
from workbench.curvature.estimators.batch_theory import bulk_edge, shifted_eigenvalue
from workbench.curvature.estimators.lanczos import GroupedProbes, Quadrature, band, keeps_basis, outliers
from workbench.curvature.estimators.probes import rademacher, standard_error
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Stopped
from workbench.curvature.studies.settings import CurvatureInstrument, preview
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


class Spectrum(CurvatureInstrument):
    """Eigenvalue density by stochastic Lanczos quadrature, its band over probes, trace, norm and outliers."""

    summary_line = (
        "eigenvalue density (stochastic Lanczos quadrature) with a band, outliers, trace and 2/lambda"
    )

    probes: int = parameter(4, "random probe vectors; the band needs at least 2", ge=1, le=64)
    steps: int = parameter(30, "Lanczos steps a probe; resolves roughly as many eigenvalues", ge=1, le=400)
    width: float = parameter(
        0.01,
        "standard deviation of the Gaussian that smooths the density, as a fraction of the spectrum's extent",
        gt=0,
        le=0.5,
        scale="log",
        group="Numerics",
    )
    reorthogonalise: Literal["auto", "full", "none"] = parameter(
        "auto", "keep all Krylov vectors orthogonal (auto: when they fit in 2 GiB)", group="Numerics"
    )
    per_layer: bool = parameter(False, "also the spectrum of every layer's own block, in the same passes")

    @classmethod
    def result_class(cls) -> type[Result]:
        return SpectrumResult

    def _run(self, on: Subject, progress: Progress) -> Result:
        with self.open(on, progress.quiet()) as operator:
            full = self.reorthogonalise == "full" or (
                self.reorthogonalise == "auto"
                and keeps_basis(operator.size, self.probes, self.steps, operator.dtype.itemsize)
            )

            def draw(numbers: Sequence[int]) -> Tensor:
                return rademacher(operator, numbers, self.seed)

            whole = GroupedProbes(operator, draw, self.probes, self.steps, full, parts=operator.slices)
            blocks: GroupedProbes | None = None
            try:
                for _ in progress.track(whole.run(), "Lanczos steps", whole.steps):
                    if progress.watched:
                        preview(progress, self._result(operator, whole, None, full))
                if self.per_layer and not progress.stopped:
                    whole.release()
                    blocks = GroupedProbes(operator, draw, self.probes, self.steps, full, operator.slices)
                    for _ in progress.track(blocks.run(), "Lanczos steps in each layer", blocks.steps):
                        if progress.watched:
                            preview(progress, self._result(operator, whole, blocks, full))
            except Stopped:
                progress.partial = True
            return self._result(operator, whole, blocks, full)

    def _result(
        self, operator: CurvatureOperator, whole: GroupedProbes, blocks: GroupedProbes | None, full: bool
    ) -> Result:
        quadrature = whole.quadrature()
        if not quadrature.nodes:
            empty = pd.DataFrame({"eigenvalue": [], "density": [], "low": [], "high": []}, dtype=float)
            return self.result(
                empty, {"parameters": operator.size, "products": operator.products}, partial=True
            )
        width = self.width * max(
            quadrature.extent[1] - quadrature.extent[0], 1e-6 * max(map(abs, quadrature.extent)), 1e-12
        )
        table = density_table(quadrature, width)
        found, edges = outliers(quadrature, operator.size)
        traces, squares = operator.size * quadrature.moment(1), operator.size * quadrature.moment(2)
        bottom, top = quadrature.extent
        share = pd.DataFrame(
            {
                "probe": np.repeat(np.arange(len(quadrature.nodes)), [len(n) for n in quadrature.nodes]),
                "eigenvalue": np.concatenate(quadrature.nodes),
                "weight": np.concatenate(quadrature.weights),
                "residual": np.concatenate(quadrature.residuals),
            }
        )
        highest = [int(np.argmax(n)) for n in quadrature.nodes]
        best = max(range(len(quadrature.nodes)), key=lambda i: quadrature.nodes[i][highest[i]])
        facts: dict[str, Any] = {
            "top_eigenvalue": top,
            "top_residual": float(quadrature.residuals[best][highest[best]]),
            "bottom_eigenvalue": bottom,
            "trace": float(traces.mean()),
            "trace_standard_error": standard_error(traces),
            "frobenius_norm": math.sqrt(max(float(squares.mean()), 0.0)),
            "frobenius_squared_standard_error": standard_error(squares),
            "mass": float(np.trapezoid(table["density"], table["eigenvalue"])),
            "negative_mass": quadrature.mass_below(-1e-7 * max(map(abs, quadrature.extent))),
            "two_over_top": 2 / top if top > 0 else math.inf,
            "outliers": len(found),
            "bulk_low": edges[0],
            "bulk_high": edges[1],
            "gaussian_width": width,
            "parameters": operator.size,
            "steps_done": whole.done,
            "products": operator.products,
            "items": operator.total_items,
            "reorthogonalised": full,
            "operator": self.operator,
        }
        if whole.noise is not None and not math.isnan(whole.noise):  # else there was one batch
            facts["item_noise"] = whole.noise
        tables = {
            "nodes": share,
            "outliers": pd.DataFrame(
                [{"eigenvalue": o.value, "residual": o.residual, "copies": o.copies} for o in found],
                columns=["eigenvalue", "residual", "copies"],
            ),
            "layers": layer_table(operator, whole, blocks),
        }
        if blocks is not None and blocks.done:
            tables["layer_density"] = pd.concat(
                [
                    layer_density(operator.names[b], blocks.quadrature(b), self.width)
                    for b in range(len(operator.names))
                ],
                ignore_index=True,
            )
        return self.result(table, facts, tables=tables)


def density_table(quadrature: Quadrature, width: float, points: int = 1200) -> pd.DataFrame:
    grid = quadrature.grid(width, points)
    mean, low, high = band(quadrature.densities(grid, width))
    return pd.DataFrame({"eigenvalue": grid, "density": mean, "low": low, "high": high})


def layer_density(name: str, quadrature: Quadrature, fraction: float) -> pd.DataFrame:
    low, high = quadrature.extent
    width = fraction * max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    return density_table(quadrature, width, 400).assign(layer=name)


def layer_table(
    operator: CurvatureOperator, whole: GroupedProbes, blocks: GroupedProbes | None
) -> pd.DataFrame:
    """Per weight: trace of its own block, from the first product's partial sums,
    and the ends of its own spectrum when measured.
    """
    rows = []
    for place, (name, s, forms) in enumerate(
        zip(operator.names, operator.slices, whole.forms.T, strict=True)
    ):
        row: dict[str, Any] = {
            "layer": name,
            "parameters": s.stop - s.start,
            "trace": float(forms.mean()),
            "trace_standard_error": standard_error(forms),
            "mean_eigenvalue": float(forms.mean()) / (s.stop - s.start),
        }
        if blocks is not None and blocks.done:
            own = blocks.quadrature(place)
            row["bottom_eigenvalue"], row["top_eigenvalue"] = own.extent
        rows.append(row)
    return pd.DataFrame(rows)


class SpectrumResult(Result):
    """Density on a log axis with its band, labelled outliers and bulk edges; or the layers as a heat map."""

    def view_model(self) -> type[BaseModel]:
        names = self.layer_names()
        fields: dict[str, Any] = {
            "show": (
                Literal["density", "layers"],
                parameter("density", "the density, or every layer's mean eigenvalue"),
            ),
            "axis": (
                Literal["linear", "signed log"],
                parameter("signed log", "scale of the eigenvalue axis"),
            ),
        }
        if names:
            fields["layer"] = (Literal[("whole", *names)], parameter("whole", "whose spectrum"))
        if self.facts.get("item_noise", math.nan) > 0:
            largest = max(int(self.facts["items"]), 2)
            fields["batch"] = (
                int,
                parameter(
                    largest,
                    "items in a training batch: marks the predicted top and noise edge",
                    ge=1,
                    le=largest,
                    scale="log",
                ),
            )
        return create_model("SpectrumView", **fields)

    def leading(self) -> pd.DataFrame:
        """The resolved eigenvalues, the largest first, not the density's grid."""
        found = self.tables.get("outliers")
        if found is None or not len(found):
            return self.table
        return found.reindex(found["eigenvalue"].abs().sort_values(ascending=False).index)

    def layer_names(self) -> list[str]:
        table = self.tables.get("layer_density")
        return [] if table is None else list(dict.fromkeys(table["layer"]))

    def figure(self, **view: Any) -> go.Figure:
        from workbench.curvature.studies.drawings import density_figure, layers_figure

        if view.get("show") == "layers" and "layers" in self.tables:
            return layers_figure(self.tables["layers"])
        layer = view.get("layer", "whole")
        if layer != "whole" and layer in self.layer_names():
            table = self.tables["layer_density"]
            return density_figure(
                table[table["layer"] == layer], f"Spectrum of {layer}", view.get("axis", "signed log")
            )
        fields = self.instrument.model_dump()
        so_far = " (so far)" if self.partial else ""
        title = f"{LABEL[fields['operator']]} spectrum, {fields['layers']}{so_far}"
        marks: list[tuple[float, str]] = []
        batch = view.get("batch")
        if batch and batch < self.facts.get("items", 0):
            marks = self.batch_marks(batch)
        return density_figure(
            self.table,
            title,
            view.get("axis", "signed log"),
            self.tables.get("outliers"),
            (self.facts["bulk_low"], self.facts["bulk_high"]) if "bulk_low" in self.facts else None,
            marks,
        )

    def batch_marks(self, batch: int) -> list[tuple[float, str]]:
        """Where a batch of so many items puts the largest eigenvalue and the edge of the noise bulk
        (spiked random matrix theory).
        """
        noise, size = self.facts["item_noise"], self.facts["parameters"]
        top = shifted_eigenvalue(self.facts["top_eigenvalue"], noise, size, batch, self.facts["items"])
        edge = bulk_edge(noise, size, batch, self.facts["items"])
        return [
            (edge, f"noise edge at B={batch}"),
            (top, f"predicted top at B={batch}: 2/λ = {2 / top:.3g}" if top > 0 else "predicted top"),
        ]

    def summary(self) -> str:
        if "trace" not in self.facts:
            return super().summary()
        f = self.facts
        note = " (partial: stopped early)" if self.partial else ""
        return (
            f"spectrum{note}: {LABEL[f['operator']]}, {f['parameters']:,} parameters, top "
            f"{f['top_eigenvalue']:.6g} (residual {f['top_residual']:.2g}), "
            f"bottom {f['bottom_eigenvalue']:.4g}, trace {f['trace']:.5g} ± {f['trace_standard_error']:.2g} "
            f"(s.e.), ‖H‖ {f['frobenius_norm']:.4g}, "
            f"mass {f['mass']:.5f}, 2/λ {f['two_over_top']:.4g}, "
            f"{f['outliers']} outlier{'' if f['outliers'] == 1 else 's'}, "
            f"Gaussian width {f['gaussian_width']:.2g}"
        )


LABEL = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton",
    "empirical-fisher": "Empirical Fisher",
    "mc-fisher": "Fisher (sampled)",
}
