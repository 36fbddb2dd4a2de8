"""The `grow` instrument: a larger model from a small one's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch

from workbench.arithmetic.growth.depth import stacking_tokens
from workbench.arithmetic.growth.growth import GROWTH, config_of, relative_change
from workbench.arithmetic.sources import block_of, own_tensors, plain
from workbench.axis import Choice, parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Change of the outputs, of the largest, up to which a function counts as the same in float32.
SAME = 1e-4
#: Stacking's guideline is for a model that becomes four times as deep.
STACKED = 4


class GrowResult(Result):
    """A row a block (and what lies outside), before and after; the grown model is `.subject`."""

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import color, figure

        fig = figure(f"{self.facts['method']}: parameters", "block", "parameters", barmode="group")
        for index, (name, column) in enumerate((("small", "parameters_before"), ("grown", "parameters"))):
            fig.add_bar(x=self.table["block"], y=self.table[column], name=name, marker_color=color(index))
        return fig


class Grow(SubjectInstrument):
    """Make a larger model of the same class from the subject's weights, wider or deeper by a whole multiple;
    where the method keeps the function, the outputs are compared.
    """

    summary_line: ClassVar[str] = "a larger model from a small one's weights: outputs at step 0, parameters"
    changes_model: ClassVar[bool] = True

    method: Choice = GROWTH.choice("hypercloning")
    times: int = parameter(2, "how many times as wide, or as deep", ge=2, le=16)
    flops: float = parameter(
        0.0, "FLOPs of the whole run: when to stack, by the published guideline; 0: not asked", ge=0
    )
    test_examples: int = parameter(128, "examples for the loss before and after", ge=1, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return GrowResult

    def check(self, on: Subject) -> None:
        on.split("test")
        config_of(on.model)
        if self.flops and (self.method != "stack" or self.times != STACKED):
            raise BadInput("flops: the guideline is for --method stack --times 4; leave flops out otherwise")
        if 0 < self.flops < 1e6:
            raise BadInput(
                f"flops: {self.flops:g} is below any training run; give the FLOPs of the whole run"
            )

    def _run(self, on: Subject, progress: Progress) -> Result:
        small = plain(on)
        grown = small.with_model(self.method(small.model, self.times).eval())
        before, after = outputs(small), outputs(grown)
        change = relative_change(before, after)
        if self.method.has("preserving") and change > SAME:
            kind = type(on.model).__name__
            raise BadInput(
                f"method: {self.method.name} does not keep the function of {kind}: outputs change by "
                f"{change:.2g} of the largest; choose another method"
            )
        table = parameter_table(small, grown)
        facts: dict[str, Any] = {"method": self.method.name, "times": self.times, "change_of_outputs": change}
        facts |= {"parameters_before": count(small), "parameters": count(grown)}
        facts["flops_per_token"] = 6 * count(grown)
        if self.flops:
            facts["small_tokens"] = stacking_tokens(count(grown), self.flops)
        for name, subject in (("small_", small), ("", grown)):
            found = subject.evaluate("test", limit=self.test_examples, progress=progress)
            facts |= {f"{name}{k}": v for k, v in found.items() if k in ("loss", "accuracy")}
        return self.result(table, facts, subject=grown)


@torch.no_grad()
def outputs(on: Subject) -> torch.Tensor:
    """On the first test examples."""
    batch = next(on.batches("test", 4, 4))
    found: torch.Tensor = on.task.output(on.model, batch)
    return found.float()


def count(on: Subject) -> int:
    return sum(value.numel() for value in own_tensors(on.model).values())


def parameter_table(small: Subject, grown: Subject) -> pd.DataFrame:
    """A row a block of the grown model; those that the small one has not had 0 before."""

    def by_block(on: Subject) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, value in own_tensors(on.model).items():
            block = block_of(name) or "outside"
            found[block] = found.get(block, 0) + value.numel()
        return found

    before, after = by_block(small), by_block(grown)
    return pd.DataFrame(
        [{"block": b, "parameters_before": before.get(b, 0), "parameters": n} for b, n in after.items()]
    )
