"""The `fisher-sweep` instrument: oBERT's loss over damp, number of gradients and block size,
which its authors ask users to sweep by hand.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel

from workbench.axis import Choice, entries_in, parameter
from workbench.code_version import code_version
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.axes import PATTERN
from workbench.results import Result
from workbench.subjects import Subject
from workbench.values import number_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

KEYS = ("damp", "gradients", "block")


class FisherSweep(SubjectInstrument):
    """Loss after one-shot oBERT over a grid of damp, number of gradients and block size of the Fisher."""

    summary_line: ClassVar[str] = "which damp, how many gradients and which block size oBERT needs here"

    damps: str = parameter(
        "1e-4,1e-3,1e-2,1e-1,1", "damps, shares of the Fisher's mean diagonal, separated by commas"
    )
    gradients: str = parameter(
        "32,128,256", "numbers of per-example gradients, separated by commas", unit="examples"
    )
    blocks: str = parameter("10,50,200", "weights in one block of the Fisher, separated by commas")
    sparsity: float = parameter(0.8, "share of the weights to remove", gt=0, lt=1, step=0.01)
    pattern: Choice = PATTERN.choice(
        "unstructured", "unstructured, 2:4, block 4x1: what single-weight pruning accepts"
    )
    layers: str = parameter("blocks", "which layers: blocks or globs")
    calibration_split: str = parameter("calibration", "split for the gradients", group="Data")
    test_split: str = parameter(
        "validation", "split for the losses: a sweep chooses, so not the one that is reported", group="Data"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        return FisherSweepResult

    def grid(self) -> list[tuple[float, int, int]]:
        """All (damp, gradients, block) in the order in which statistics can be kept;
        `BadInput` naming a value that is no number.
        """
        axes = []
        for field, whole in (("damps", False), ("gradients", True), ("blocks", True)):
            values = []
            for word in getattr(self, field).split(","):
                value = number_of(word.strip(), field)
                if value is None:
                    raise BadInput(
                        f"{field}: {word.strip()!r} is not a number; give numbers separated by commas"
                    )
                if value <= 0 or (whole and value != int(value)):
                    raise BadInput(
                        f"{field}: {word.strip()} is not accepted; give positive "
                        f"{'whole ' if whole else ''}numbers separated by commas"
                    )
                values.append(int(value) if whole else value)
            axes.append(sorted(set(values)))
        return [
            (float(damp), int(gradients), int(block))
            for gradients, block, damp in itertools.product(axes[1], axes[2], axes[0])
        ]

    def step(self, damp: float, gradients: int, block: int) -> Any:
        from workbench.pruning.prune import Prune

        fisher = {"damp": damp, "gradients": gradients, "block": block}
        structured = bool(set(self.pattern().kinds))
        more: dict[str, Any] = {} if structured else {"compensation": {"name": "fisher", **fisher}}
        return Prune(
            method="obert",
            sparsity=self.sparsity,
            pattern=self.pattern,
            layers=self.layers,
            saliency={"name": "fisher", **fisher},
            predict_examples=0,
            seed=self.seed,
            device=self.device,
            calibration_split=self.calibration_split,
            test_split=self.test_split,
            **more,
        )

    def code(self) -> str:
        """Version of the code that the prunings of the grid reach."""
        prunes = [self.step(*cell) for cell in self.grid()[:1]]
        return code_version(type(self), [entry.value for p in prunes for entry in entries_in(p)])

    def check(self, on: Any) -> None:
        for cell in self.grid():
            self.step(*cell).check(on)
        most = max(gradients for _, gradients, _ in self.grid())
        if most > on.size(self.calibration_split):
            raise BadInput(
                f"gradients: {most} are more than the {on.size(self.calibration_split)} examples of split "
                f"{self.calibration_split}"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        rows = []
        for damp, gradients, block in progress.track(self.grid(), "damp x gradients x block"):
            facts = self.step(damp, gradients, block).run(on, Progress(), cache=False).facts
            rows.append(
                {
                    "damp": damp,
                    "gradients": gradients,
                    "block": block,
                    **{k: facts[k] for k in ("loss", "accuracy", "sparsity") if k in facts},
                }
            )
        table = pd.DataFrame(rows)
        if not len(table):
            return self.result(table)
        best = table.iloc[int(table["loss"].argmin())]
        facts = {f"best_{key}": float(best[key]) if key == "damp" else int(best[key]) for key in KEYS} | {
            "best_loss": float(best["loss"])
        }
        return self.result(
            table,
            facts
            | {"worst_loss": float(table["loss"].max()), "dense_loss": on.evaluate(self.test_split)["loss"]},
        )


class FisherSweepView(BaseModel):
    """Which two parameters span the map; the third is shown at its best value."""

    show: Literal["damp x gradients", "damp x block", "gradients x block"] = "damp x gradients"
    value: Literal["loss", "accuracy"] = "loss"


class FisherSweepResult(Result):
    """Heat maps of the loss over two of the three parameters."""

    def view_model(self) -> type[BaseModel]:
        return FisherSweepView

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, heat

        chosen = FisherSweepView(**view)
        x, y = chosen.show.split(" x ")
        third = next(key for key in KEYS if key not in (x, y))
        fixed = self.facts[f"best_{third}"]
        value = chosen.value if chosen.value in self.table else "loss"
        grid = self.table[self.table[third] == fixed].pivot(index=y, columns=x, values=value)
        fig = figure(f"oBERT's {value} at {third} {fixed:g}", x=x, y=y)
        fig.update_xaxes(type="category")
        fig.update_yaxes(type="category")
        heat(
            fig,
            np.asarray(grid),
            [f"{c:g}" for c in grid.columns],
            [f"{r:g}" for r in grid.index],
            unit=value if value == "accuracy" else "loss (nats)",
        )
        return fig
