"""The `gradient-noise` instrument: noise scale with its interval, and the batch size it suggests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.figures import figure, line, rule
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.batch.batch_size import gradient_groups, noise_scale, noise_scale_interval


class GradientNoise(SubjectInstrument):
    """Gradient noise scale B_simple = tr(Sigma) / |G|^2 at the subject's weights (McCandlish et al. 2018)."""

    summary_line = "gradient noise scale with interval: the batch size up to which larger batches pay"

    split: str = parameter("train", "data split", min_length=1, group="Data")
    groups: int = parameter(24, "independent batches whose gradients are compared", ge=4, le=4096)
    size: int = parameter(16, "examples of each batch", ge=1, le=4096)
    level: float = parameter(0.9, "probability content of the interval", gt=0.5, lt=1)

    @classmethod
    def result_class(cls) -> type[Result]:
        return NoiseResult

    def check(self, on: Subject) -> None:
        if self.groups * self.size > on.size(self.split):
            raise BadInput(
                f"groups: {self.groups} x {self.size} examples are more than the {on.size(self.split)} of "
                f"split {self.split!r}; lower groups or size"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        gram = gradient_groups(on, self.split, self.groups, self.size, self.seed, progress)
        found = noise_scale(gram, self.size)
        low, high = noise_scale_interval(gram, self.size, self.level)
        facts: dict[str, Any] = {
            "noise_scale": found.simple,
            "noise_scale_low": low,
            "noise_scale_high": high,
            "gradient_square_norm": found.square_norm,
            "covariance_trace": found.trace,
            "at_20_percent_overhead": 0.2 * found.simple,
        }
        batches = np.unique(np.round(np.geomspace(1, max(4 * min(found.simple, 1e6), 64), 60)).astype(int))
        # eq. 2.11 and 2.12 of the source: steps 1 + B_noise / B over the least,
        # examples 1 + B / B_noise over the least
        with np.errstate(divide="ignore"):  # gradients without noise: every batch above one is for nothing
            over = 1 + batches / np.float64(found.simple)
        table = pd.DataFrame(
            {
                "batch_size": batches,
                "steps_over_least": 1 + found.simple / batches,
                "examples_over_least": over,
            }
        )
        return self.result(table, facts, arrays={"gram": gram})


class NoiseResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        fig = figure(
            "What a batch size costs, by the noise scale",
            x="batch size (examples)",
            y="multiple of the least",
            xaxis_type="log",
            yaxis_type="log",
        )
        for axis in (fig.layout.xaxis, fig.layout.yaxis):
            axis.update(dtick="D2", exponentformat="none")
        line(fig, self.table.batch_size, self.table.steps_over_least, "optimizer steps", mode="lines")
        line(fig, self.table.batch_size, self.table.examples_over_least, "examples", mode="lines")
        scale, low, high = (self.facts[f"noise_scale{end}"] for end in ("", "_low", "_high"))
        if np.isfinite(scale) and low > 0 and np.isfinite(high):
            rule(fig, f"noise scale {scale:.3g} ({low:.3g} to {high:.3g})", x=scale)
        else:
            fig.update_layout(title_text="The noise scale is not known: its interval has no end")
        return fig
