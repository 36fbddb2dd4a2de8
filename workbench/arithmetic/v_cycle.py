"""The `v-cycle` instrument: train a model for a while as a smaller one made of its own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from workbench.arithmetic.fine_tunes import check_trains
from workbench.arithmetic.grow import count
from workbench.arithmetic.growth.growth import config_of
from workbench.arithmetic.growth.v_cycle import coalesced, interpolated_model
from workbench.arithmetic.sources import plain
from workbench.axis import parameter
from workbench.errors import Stopped
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.studies.train import Train

if TYPE_CHECKING:
    import plotly.graph_objects as go


class VCycleResult(Result):
    """A row a stage: its model's size, what it cost, and its loss; the large model is `.subject`."""

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import figure, line

        fig = figure("V-cycle", "FLOPs so far, 6 N a token", "loss on validation (nats)")
        line(
            fig, self.table["flops"].to_numpy(), self.table["loss"].to_numpy(), "stages", mode="lines+markers"
        )
        fig.data[0].text = list(self.table["stage"])
        fig.data[0].mode = "lines+markers+text"
        return fig


class VCycle(SubjectInstrument):
    """Coalesce the subject into a smaller model, train that, make it large again and draw the subject's
    weights towards it.
    """

    summary_line: ClassVar[str] = "train a model as a smaller one for a while, and come back"
    changes_model: ClassVar[bool] = True

    width: int = parameter(2, "how many times narrower the small model is", ge=1, le=16)
    depth: int = parameter(2, "how many times shallower it is", ge=1, le=16)
    alpha: float = parameter(0.25, "share of the small model's copies in the weights afterwards", ge=0, le=1)
    small_steps: int = parameter(100, "optimizer steps of the small model", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples a step", ge=1, le=65536, scale="log")
    learning_rate: float = parameter(1e-3, "its peak learning rate", gt=0, le=100, scale="log")
    validation_examples: int = parameter(256, "examples for the losses of the stages", ge=1, unit="examples")

    @classmethod
    def name(cls) -> str:
        return "v-cycle"

    @classmethod
    def result_class(cls) -> type[Result]:
        return VCycleResult

    def check(self, on: Subject) -> None:
        on.split("validation")
        check_trains(on)
        config_of(on.model)

    def _run(self, on: Subject, progress: Progress) -> Result:
        large = plain(on)
        small = large.with_model(coalesced(large.model, self.width, self.depth).eval())
        train = Train(
            steps=self.small_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            device=self.device,
        )
        trained = train.run(small, progress.within("small model"), cache=False)
        if trained.partial or trained.subject is None:
            raise Stopped("v-cycle: stopped before the small model was trained")
        made = interpolated_model(large.model, trained.subject.model, self.width, self.depth, self.alpha)
        back = large.with_model(made.eval())
        tokens = trained.facts["items"]
        cost = 6.0 * count(small) * tokens
        stages = (("large", large, 0.0), ("coalesced", small, 0.0), ("small, trained", trained.subject, cost))
        rows = [
            {"stage": stage, "parameters": count(model), "flops": flops} | self.losses(model, progress)
            for stage, model, flops in (*stages, ("large again", back, cost))
        ]
        facts = {"before_loss": rows[0]["loss"], "small_loss": rows[2]["loss"], "loss": rows[3]["loss"]}
        facts |= {"flops": cost, "share_of_large_step": count(small) / count(large)}
        return self.result(pd.DataFrame(rows), facts, subject=back)

    def losses(self, model: Subject, progress: Progress) -> dict[str, float]:
        found = model.evaluate("validation", limit=self.validation_examples, progress=progress.quiet())
        return {name: value for name, value in found.items() if name in ("loss", "accuracy")}
