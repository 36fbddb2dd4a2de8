"""The `ptq-or-qat` instrument: training through the rounding, or rounding after as many dense steps."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.figures import figure, line
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.quantize import Quantize
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.chosen import chosen_settings
from workbench.training.data_order import Draws
from workbench.training.loop import fit


class PtqOrQatResult(Result):
    def figure(self, **view: Any) -> go.Figure:
        fig = figure("Trained through the rounding, or rounded afterwards", "bits", "test loss (nats)")
        for side in ("trained", "rounded"):
            line(fig, self.table["bits"].to_numpy(), self.table[side].to_numpy(), side, mode="lines+markers")
        return fig


class PtqOrQat(SubjectInstrument):
    """At each width: the loss after training through the rounding (LSQ), and after as many steps in full
    precision and then the clipping of least squared error.
    """

    summary_line = "training through the rounding against rounding afterwards, at several widths"

    layers: str = parameter(
        "blocks", "layers to quantize, comma-separated globs; 'blocks' is every layer inside the blocks"
    )
    widths: list[int] = parameter([8, 4, 3, 2], "widths of the integers")
    steps: int = parameter(200, "optimizer steps of either side", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(16, "examples of a step", ge=1, le=4096, scale="log", group="Training")
    learning_rate: float = parameter(1e-3, "peak learning rate of AdamW (linear decay)", gt=0, scale="log")
    calibration_examples: int = parameter(
        64, "calibration examples of the rounding afterwards", ge=1, group="Data"
    )
    test_examples: int = parameter(512, "test examples at most", ge=1, group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return PtqOrQatResult

    def check(self, on: Subject) -> None:
        if not self.widths:
            raise BadInput("widths: there is none; give at least one, such as 4")
        for width in self.widths:
            self.trained(width).check(on)
            self.rounded(width).check(on)

    def trained(self, width: int) -> TrainQuantized:
        chosen: dict[str, Any] = {"name": "lsq", "bits": width}
        return TrainQuantized(
            layers=self.layers,
            method=chosen,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            test_examples=self.test_examples,
            seed=self.seed,
        )

    def rounded(self, width: int) -> Quantize:
        return Quantize(
            layers=self.layers,
            format=f"int{width}",
            granularity="channel",
            range="mse",
            sequential=False,
            calibration_examples=self.calibration_examples,
            predict_examples=0,
            test_examples=self.test_examples,
            seed=self.seed,
        )

    def _run(self, on: Subject, progress: Progress) -> Result:
        dense = on.copy()
        alike = self.trained(self.widths[0])  # the optimizer and the batches of the other side
        fit(
            dense,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            warmup=0.0,
            seed=self.seed,
            order=Draws(self.seed),
            own_generator=False,
            evaluate_split="",
            progress=progress,
            label="in full precision",
            **chosen_settings(alike),
        )
        rows = []
        for width in progress.track(self.widths, "widths"):
            aware = self.trained(width).run(on, Progress(), cache=False).facts
            late = self.rounded(width).run(dense, Progress(), cache=False).facts
            rows.append(
                {
                    "bits": width,
                    "trained": float(aware["loss"]),
                    "rounded": float(late["loss"]),
                    "gap": float(aware["loss"]) - float(late["loss"]),
                }
            )
        facts = {"dense_loss": on.evaluate("test", limit=self.test_examples)["loss"]}
        facts |= {f"gap_{row['bits']}_bits": row["gap"] for row in rows}
        return self.result(pd.DataFrame(rows), facts)
