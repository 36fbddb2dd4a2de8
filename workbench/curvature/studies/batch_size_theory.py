"""Batch-size theory against measurement: top eigenvalue, and largest stable learning rate,
as a function of the batch size.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from pydantic import BaseModel, create_model

from workbench.axis import parameter
from workbench.curvature.estimators.batch_theory import bulk_edge, effective_batch, shifted_eigenvalue
from workbench.curvature.estimators.eigenpairs import eigenpairs
from workbench.curvature.estimators.probes import rademacher, standard_error
from workbench.curvature.operators.curvature_operator import CurvatureOperator, Stopped
from workbench.curvature.studies.settings import CurvatureInstrument
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject


def with_rows(on: Subject, split: str, rows: torch.Tensor) -> Subject:
    """The subject with a single split that holds these rows."""
    columns = {k: v[rows] for k, v in on.split(split).items()}
    return Subject(on.name, on.model, on.task, {split: columns}, data_note=on.data_note)


def trains(
    on: Subject, split: str, optimizer: str, rate: float, batch: int, steps: int, start: float, seed: int
) -> bool:
    """Whether `steps` of training at this rate keep the mean loss of the last quarter within half a nat above
    `start`.
    """
    model = copy.deepcopy(on.model).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    rule: torch.optim.Optimizer = (
        torch.optim.SGD(weights, lr=rate) if optimizer == "sgd" else torch.optim.Adam(weights, lr=rate)
    )
    draw = torch.Generator().manual_seed(seed)
    columns, size = on.split(split), on.size(split)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randperm(size, generator=draw)[:batch]
            loss = on.task.loss(model, {k: v[rows].to(on.device) for k, v in columns.items()})
            if not torch.isfinite(loss):
                return False
            losses.append(float(loss.detach()))
            rule.zero_grad()
            loss.backward()
            rule.step()
    return float(np.mean(losses[-max(steps // 4, 1) :])) <= start + 0.5


def largest_rate(
    on: Subject,
    split: str,
    optimizer: str,
    guess: float,
    batch: int,
    steps: int,
    start: float,
    seed: int,
    progress: Progress,
) -> float:
    """The largest rate at which training stays stable, by bisection in log scale to 5 %, from a guess."""

    def stable(rate: float) -> bool:
        if progress.stop.is_set():
            raise Stopped
        return trains(on, split, optimizer, rate, batch, steps, start, seed)

    if not 0 < guess < math.inf:  # of a curvature that is zero or not finite
        return guess
    low = high = guess
    if stable(guess):
        while stable(high := high * 2):
            low = high
            if high > guess * 1e4:
                return math.inf
    else:
        while not stable(low := low / 2):
            high = low
            if low < guess * 1e-4:
                return 0.0
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return math.sqrt(low * high)


class BatchSizeTheory(CurvatureInstrument):
    """Top eigenvalue of batches of several sizes beside spiked random matrix theory;
    optionally the largest stable rates of SGD and Adam.
    """

    summary_line = (
        "batch size against top eigenvalue and noise edge: "
        "random matrix theory beside measurement, and learning-rate limits"
    )

    split: str = parameter(
        "train", "data split whose first examples stand for the full data", min_length=1, group="Data"
    )
    examples: int = parameter(
        256, "examples that count as the full batch", ge=8, le=65536, scale="log", group="Data"
    )
    smallest: int = parameter(8, "smallest batch", ge=1, le=4096, scale="log", group="Measurement")
    sizes: int = parameter(5, "batch sizes, spaced geometrically up to the full one", ge=2, le=12)
    repeats: int = parameter(4, "random batches of each size", ge=1, le=64)
    noise_probes: int = parameter(
        4, "probes for the noise's total variance", ge=1, le=64, group="Measurement"
    )
    tolerance: float = parameter(
        0.01, "relative residual of each eigenvalue", gt=0, lt=1, scale="log", group="Measurement"
    )
    learning_rates: bool = parameter(
        False, "also bisect the largest stable learning rate of SGD and Adam by short trainings"
    )
    training_steps: int = parameter(
        60,
        "steps of each such training",
        only_with="learning_rates",
        ge=8,
        le=10_000,
        scale="log",
        group="Measurement",
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return BatchSizeResult

    def check(self, on: Subject) -> None:
        super().check(on)
        if self.smallest >= min(self.examples, on.size(self.split)):
            raise BadInput(
                f"smallest: {self.smallest} is not below the full batch of "
                f"{min(self.examples, on.size(self.split))} examples; lower it"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        total = min(self.examples, on.size(self.split))
        draw = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(on.size(self.split), generator=draw)[:total]
        full = with_rows(on, self.split, rows)
        batches = sorted({int(b) for b in np.round(np.geomspace(self.smallest, total, self.sizes))})
        measured: list[dict[str, Any]] = []
        rates: list[dict[str, Any]] = []
        facts: dict[str, Any] = {"examples": total}
        try:
            self._full(full, progress, facts, total)
            for batch in progress.track(batches, "batch sizes"):
                for number in range(1 if batch >= total else self.repeats):
                    chosen = torch.randperm(total, generator=draw)[:batch]
                    with self.open(with_rows(full, self.split, chosen), progress.quiet()) as operator:
                        measured.append(
                            {"batch": batch, "repeat": number, "top_eigenvalue": self._top(operator)}
                        )
                if self.learning_rates:
                    rates.append(self._rates(full, progress, batch, measured))
        except Stopped:
            progress.partial = True
        return self._result(measured, rates, facts, total)

    def _top(self, operator: CurvatureOperator) -> float:
        found = eigenpairs(operator, 1, "top", self.tolerance, 1, None, 300, False, self.seed)
        if not len(found.values):
            raise (
                Stopped
                if operator.progress.stop.is_set()
                else BadInput(
                    f"tolerance: {self.tolerance} was not reached in 300 products; give a larger one"
                )
            )
        return float(found.values[0])

    def _full(self, full: Subject, progress: Progress, facts: dict[str, Any], total: int) -> None:
        progress.show("full batch", 0, None)
        with self.open(full, progress.quiet()) as operator:
            probes = rademacher(operator, range(self.noise_probes), self.seed)
            noise = operator.noise(operator.matmat(probes))
            if noise is None:
                raise BadInput(
                    f"batch_size: {self.batch_size} leaves one micro-batch; "
                    "the noise needs at least 2, so lower it"
                )
            facts |= {
                "full_top": self._top(operator),
                "parameters": operator.size,
                "item_noise": noise,
                "example_noise": noise * total / operator.total_items,
            }

    def _rates(
        self, full: Subject, progress: Progress, batch: int, measured: list[dict[str, Any]]
    ) -> dict[str, Any]:
        start = full.evaluate(self.split)["loss"]
        top = float(np.mean([row["top_eigenvalue"] for row in measured if row["batch"] == batch]))
        sgd = largest_rate(
            full,
            self.split,
            "sgd",
            2 / top if top > 0 else 1.0,
            batch,
            self.training_steps,
            start,
            self.seed,
            progress,
        )
        adam = largest_rate(
            full, self.split, "adam", 1e-2, batch, self.training_steps, start, self.seed, progress
        )
        return {"batch": batch, "sgd_limit": sgd, "adam_limit": adam}

    def _result(
        self, measured: list[dict[str, Any]], rates: list[dict[str, Any]], facts: dict[str, Any], total: int
    ) -> Result:
        runs = pd.DataFrame(measured, columns=["batch", "repeat", "top_eigenvalue"])
        if not len(runs) or "full_top" not in facts:
            return self.result(pd.DataFrame({"batch": []}), facts, partial=True)
        noise, size, top = facts["example_noise"], facts["parameters"], facts["full_top"]
        table = (
            runs.groupby("batch")["top_eigenvalue"]
            .agg(measured="mean", standard_error=standard_error)
            .reset_index()
        )
        table["predicted"] = [shifted_eigenvalue(top, noise, size, b, total) for b in table["batch"]]
        x = np.array([1 / effective_batch(b, total) / top for b in table["batch"]])
        slope = float(x @ (table["measured"] - top) / (x @ x)) if (x @ x) > 0 else 0.0
        table["fitted"] = top + slope * x
        table["noise_edge"] = [bulk_edge(noise, size, b, total) for b in table["batch"]]
        table["two_over_measured"], table["two_over_predicted"] = (
            2 / table["measured"],
            2 / table["predicted"],
        )
        if rates:
            table = table.merge(pd.DataFrame(rates), on="batch", how="left")
            for name in ("sgd_limit", "adam_limit"):
                kept = table[[("batch"), name]].replace([math.inf, 0.0], math.nan).dropna()
                if len(kept) > 1:
                    facts[f"{name}_slope"] = float(
                        np.polyfit(np.log(kept["batch"]), np.log(kept[name]), 1)[0]
                    )
        spread = float(((table["measured"] - table["measured"].mean()) ** 2).sum())
        if len(table) > 2 and spread > 0:
            facts |= {
                f"r2_{name}": 1 - float(((table["measured"] - table[name]) ** 2).sum()) / spread
                for name in ("predicted", "fitted")
            }
        facts["fitted_over_measured_noise"] = slope / (noise / size) if noise > 0 else math.nan
        return self.result(table, facts, tables={"runs": runs})


class BatchSizeResult(Result):
    """Measured top eigenvalues beside theory; a slider puts any batch size on it."""

    def view_model(self) -> type[BaseModel] | None:
        if "full_top" not in self.facts:
            return None
        largest = int(self.facts["examples"])
        fields: dict[str, Any] = {
            "batch": (
                int,
                parameter(largest, "batch size whose prediction is marked", ge=1, le=largest, scale="log"),
            )
        }
        return create_model("BatchSizeView", **fields)

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, line, points

        fig = figure(
            "Top eigenvalue by batch size",
            x="batch size (examples)",
            y="eigenvalue",
            xaxis_type="log",
            yaxis_type="log",
        )
        if "full_top" not in self.facts or not len(self.table):
            return fig
        total, top, noise, size = (
            self.facts["examples"],
            self.facts["full_top"],
            self.facts["example_noise"],
            self.facts["parameters"],
        )
        grid = np.geomspace(max(float(self.table["batch"].min()) / 2, 1), total, 120)
        error = 2 * self.table["standard_error"].fillna(0)
        points(
            fig, self.table["batch"], self.table["measured"], "measured (± 2 s.e.)", error_y=dict(array=error)
        )
        line(
            fig,
            grid,
            [shifted_eigenvalue(top, noise, size, b, total) for b in grid],
            "theory, measured noise",
            mode="lines",
        )
        ratio = self.facts["fitted_over_measured_noise"]
        if math.isfinite(ratio):
            line(
                fig,
                grid,
                [top + ratio * noise / size / effective_batch(b, total) / top for b in grid],
                "theory, fitted noise",
                mode="lines",
            )
        line(
            fig, grid[:-1], [bulk_edge(noise, size, b, total) for b in grid[:-1]], "noise edge", mode="lines"
        )
        for column, name in (("sgd_limit", "2 / largest stable SGD rate"),):
            if column in self.table:
                points(fig, self.table["batch"], 2 / self.table[column], name)
        batch = view.get("batch")
        if batch:
            value = shifted_eigenvalue(top, noise, size, batch, total)
            points(fig, [batch], [value], f"B={batch}: λ {value:.4g}, 2/λ {2 / value:.3g}")
        return fig
