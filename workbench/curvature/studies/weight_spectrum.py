"""Spectra of the weight matrices themselves: no data needed.

For a weight W (out, in), lambda_i = s_i^2 / max(out, in) are the eigenvalues of its correlation matrix. Noise
of entry variance sigma^2 fills sigma^2 (1 -+ sqrt(q))^2, q = min / max of the two sizes (Marchenko and Pastur
1967); trained matrices grow a power-law tail p(lambda) ~ lambda^-alpha (Martin and Mahoney 2021).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, create_model
from scipy import integrate, optimize
from torch import Tensor

from workbench.axis import parameter
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


@dataclass(frozen=True)
class PowerLaw:
    """p(x) ~ x^-exponent on [lowest, largest]: `tail` values, Kolmogorov distance, standard error
    (exponent - 1) / sqrt(tail).
    """

    exponent: float
    lowest: float
    largest: float
    tail: int
    distance: float
    error: float


def power_law(values: NDArray[np.float64], least_tail: int = 10) -> PowerLaw | None:
    """Maximum-likelihood exponent with the start of the tail chosen by Kolmogorov distance
    (Clauset, Shalizi and Newman 2009).

    exponent = 1 + n / sum log(x_i / x_min). None when fewer than `least_tail` positive values are there.
    """
    x = np.sort(values[values > 1e-12 * max(float(values.max()), 1e-300)])
    if len(x) < least_tail:
        return None
    logs = np.log(x)
    best: PowerLaw | None = None
    for start in range(len(x) - least_tail + 1):
        tail = len(x) - start
        total = float(logs[start:].sum() - tail * logs[start])
        if total <= 0:
            continue
        exponent = 1 + tail / total
        model = 1 - np.exp((1 - exponent) * (logs[start:] - logs[start]))
        steps = np.arange(tail + 1) / tail
        distance = float(max(np.abs(model - steps[:-1]).max(), np.abs(model - steps[1:]).max()))
        if best is None or distance < best.distance:
            best = PowerLaw(
                exponent, float(x[start]), float(x[-1]), tail, distance, (exponent - 1) / tail**0.5
            )
    return best


def marchenko_pastur_density(x: NDArray[np.float64], q: float, variance: float = 1.0) -> NDArray[np.float64]:
    """Density of the nonzero eigenvalues of noise with entry variance `variance`, 0 < q <= 1
    (shape ratio).
    """
    low, high = variance * (1 - q**0.5) ** 2, variance * (1 + q**0.5) ** 2
    inside = (x > low) & (x < high)
    out = np.zeros_like(x)
    out[inside] = np.sqrt((high - x[inside]) * (x[inside] - low)) / (2 * np.pi * q * variance * x[inside])
    return out


@functools.lru_cache(256)
def marchenko_pastur_median(q: float) -> float:
    """Median of the law at unit variance."""
    low, high = (1 - q**0.5) ** 2, (1 + q**0.5) ** 2

    def share(end: float) -> float:
        # x = low + 2 half sin(t/2)^2 removes the square-root ends, and keeps low = 0 (square matrices) exact
        half = (high - low) / 2
        stop = 2 * float(np.arcsin(np.sqrt(np.clip((end - low) / (2 * half), 0, 1))))

        def integrand(t: float) -> float:
            s, c = np.sin(t / 2) ** 2, np.cos(t / 2) ** 2
            return float(4 * half**2 * s * c / (2 * np.pi * q * (low + 2 * half * s)))

        return integrate.quad(integrand, 0, stop)[0] - 0.5

    return float(optimize.brentq(share, low + 1e-12, high - 1e-12))


@dataclass(frozen=True)
class NoiseFit:
    """Marchenko-Pastur fit: entry variance, bulk edges, eigenvalues above the upper edge,
    and Kolmogorov distance of the rest.
    """

    variance: float
    low: float
    high: float
    spikes: int


def noise_fit(values: NDArray[np.float64], q: float) -> NoiseFit:
    """Entry variance from the median eigenvalue, which spikes hardly move (Gavish and Donoho 2014)."""
    variance = float(np.median(values)) / marchenko_pastur_median(round(q, 6))
    low, high = variance * (1 - q**0.5) ** 2, variance * (1 + q**0.5) ** 2
    return NoiseFit(variance, low, high, int((values > high).sum()))


def weight_row(weight: Tensor) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Measures of one matrix (out, in) and its correlation eigenvalues, largest first."""
    out, width = weight.shape
    singular = torch.linalg.svdvals(weight.detach().float().cpu()).double().numpy()
    values = singular**2 / max(out, width)
    top = float(values[0])
    share = values / values.sum() if top > 0 else values
    row: dict[str, Any] = {
        "out": out,
        "in": width,
        "largest_singular": float(singular[0]),
        "smallest_singular": float(singular[-1]),
        "frobenius": float(np.sqrt((singular**2).sum())),
        "stable_rank": float(values.sum() / top) if top > 0 else 0.0,
        "effective_rank": float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
        if top > 0
        else 0.0,
        "rank": int((singular > singular[0] * max(out, width) * np.finfo(np.float32).eps).sum())
        if top > 0
        else 0,
    }
    if top > 0 and min(out, width) >= 8:
        fit = noise_fit(values, min(out, width) / max(out, width))
        row |= {"noise_deviation": fit.variance**0.5, "noise_edge": fit.high, "spikes": fit.spikes}
    law = power_law(values)
    if law is not None:
        row |= {
            "power_law": law.exponent,
            "power_law_error": law.error,
            "fit_from": law.lowest,
            "fit_to": law.largest,
            "fit_tail": law.tail,
            "fit_distance": law.distance,
        }
    return row, values


class WeightSpectrum(SubjectInstrument):
    """Singular values, stable rank, Marchenko-Pastur noise fit and power-law exponent of every weight matrix;
    needs no data.
    """

    summary_line = "singular values, stable rank, noise edge and power-law exponent of the weights (no data)"

    layers: str = parameter("blocks", "layers by glob: blocks, * or patterns such as *.query", min_length=1)

    @classmethod
    def result_class(cls) -> type[Result]:
        return WeightSpectrumResult

    def check(self, on: Subject) -> None:
        on.layers(self.layers)

    @torch.no_grad()
    def _run(self, on: Subject, progress: Progress) -> Result:
        rows, spectra = [], []
        for layer in progress.track(on.layers(self.layers), "weight matrices"):
            weight = layer.weight
            stack = weight if weight.ndim == 3 else weight[None]
            for expert, matrix in enumerate(stack):
                name = layer.name if weight.ndim == 2 else f"{layer.name}[{expert}]"
                row, values = weight_row(matrix)
                rows.append({"layer": name} | row)
                spectra.append(
                    pd.DataFrame({"layer": name, "rank": np.arange(1, len(values) + 1), "eigenvalue": values})
                )
        table = pd.DataFrame(rows)
        facts: dict[str, Any] = {"matrices": len(table)}
        for column in ("stable_rank", "power_law", "spikes"):
            if column in table:
                facts[f"median_{column}"] = float(table[column].median())
        return self.result(
            table, facts, tables={"eigenvalues": pd.concat(spectra, ignore_index=True)} if spectra else {}
        )


class WeightSpectrumResult(Result):
    """All layers' spectra by rank, one layer with its fits, or a heat map of one measure."""

    def view_model(self) -> type[BaseModel]:
        names = tuple(self.table["layer"]) if len(self.table) else ()
        shown = tuple(
            c
            for c in ("stable_rank", "power_law", "spikes", "effective_rank", "largest_singular")
            if c in self.table
        )
        fields: dict[str, Any] = {
            "layer": (Literal[("map", *names)], parameter("map", "one layer's spectrum, or the map of all")),
            "measure": (Literal[shown], parameter(shown[0], "what the map shows")),
        }
        return create_model("WeightSpectrumView", **fields)

    def figure(self, **view: Any) -> go.Figure:
        from workbench.curvature.studies.drawings import layers_figure
        from workbench.figures import figure, line, rule

        layer = view.get("layer", "map")
        if layer == "map":
            measure = view.get("measure", "stable_rank")
            words = measure.replace("_", " ")
            return layers_figure(self.table, measure, words, f"{words.capitalize()} of each layer")
        values = self.tables["eigenvalues"]
        values = values[values["layer"] == layer]
        row = self.table[self.table["layer"] == layer].iloc[0]
        fig = figure(
            f"Weight spectrum of {layer}",
            x="rank",
            y="eigenvalue of WW'/max(out, in)",
            xaxis_type="log",
            yaxis_type="log",
        )
        line(fig, values["rank"], values["eigenvalue"], "eigenvalues", mode="lines")
        if "noise_edge" in row and row["noise_edge"] == row["noise_edge"]:
            rule(fig, "noise edge", y=float(row["noise_edge"]))
        if "power_law" in row and row["power_law"] == row["power_law"]:
            ranks = np.arange(1, int(row["fit_tail"]) + 1)
            fitted = row["fit_from"] * (ranks / row["fit_tail"]) ** (-1 / (row["power_law"] - 1))
            line(fig, ranks, fitted, f"power law, exponent {row['power_law']:.2f}", mode="lines")
        return fig
