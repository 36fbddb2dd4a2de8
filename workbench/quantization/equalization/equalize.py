"""Equalize: fold a scale of each input feature into the module before, so that rounding loses less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import BaseModel

from workbench.axis import Choice, parameter
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.quantization.equalization.equalizations import EQUALIZATION, Scaled
from workbench.quantization.equalization.scale_groups import fold, scale_groups
from workbench.quantization.rotation.fold import same_function, stream_of
from workbench.results import Result, choices
from workbench.subjects import Subject
from workbench.subjects.changes import bake

if TYPE_CHECKING:
    import plotly.graph_objects as go


class EqualizeResult(Result):
    """A row a group of layers that share a scale; the scaled model is `.subject`."""

    def figure(self, column: str = "spread", **more: Any) -> go.Figure:
        from workbench.figures import figure, line

        words = {
            "spread": "largest over median size of an input feature",
            "error": "relative squared error of the outputs",
        }[column]
        kind = self.instrument.kind  # type: ignore[attr-defined]
        first, second = {
            "spread": (("as trained", "spread"), (f"scaled by {kind}", "spread_scaled")),
            "error": (("rounded as trained", "error_unscaled"), (f"rounded, scaled by {kind}", "error")),
        }[column]
        fig = figure(
            f"What each group of layers reads, before and after {kind}", "layers", words, yaxis_type="log"
        )
        for label, name in (first, second):
            line(
                fig, self.table["group"].to_numpy(), self.table[name].to_numpy(), label, mode="lines+markers"
            )
        return fig

    def view_model(self) -> type[BaseModel] | None:
        searched = self.table["error"].notna().any()
        return choices("EqualizeView", column=("spread", "error") if searched else ("spread",))


class Equalize(SubjectInstrument):
    """Fold one scale a feature into the norm (or linear layer) that a pre-norm causal model's layers read:
    SmoothQuant, or AWQ's search. Its function stays, and any program opens the result; round it afterwards.
    """

    changes_model: ClassVar[bool] = True

    kind: Choice = EQUALIZATION.choice("awq")
    calibration_examples: int = parameter(128, "calibration examples", ge=1, unit="examples")

    @classmethod
    def result_class(cls) -> type[Result]:
        return EqualizeResult

    def check(self, on: Subject) -> None:
        stream_of(on.model)
        on.split("calibration")

    def _run(self, on: Subject, progress: Progress) -> Result:
        copy = on.copy()
        made = copy.with_model(bake(copy.model))
        groups = scale_groups(made.model)
        found: list[Scaled] = []
        for scaled in self.kind(made, groups, self.calibration_examples, progress):
            fold(made.model, scaled.group, scaled.scale)
            found.append(scaled)
        change = same_function(on, made)
        table = pd.DataFrame([row(scaled) for scaled in found])
        facts: dict[str, Any] = {
            "groups": len(found),
            "largest_change_of_logits": change,
            "spread": float(table["spread"].median()),
            "spread_scaled": float(table["spread_scaled"].median()),
        }
        if table["error"].notna().any():
            facts |= {name: float(table[name].mean()) for name in ("error_unscaled", "error")}
        return self.result(table, facts, subject=made)


def row(scaled: Scaled) -> dict[str, Any]:
    group, size, after = scaled.group, scaled.size, scaled.size / scaled.scale
    return {
        "group": group.giver,
        "readers": " ".join(group.readers),
        "exponent": float("nan") if scaled.exponent is None else scaled.exponent,
        "scale_low": float(scaled.scale.min()),
        "scale_high": float(scaled.scale.max()),
        "spread": float(size.max() / size.median().clamp_min(1e-30)),
        "spread_scaled": float(after.max() / after.median().clamp_min(1e-30)),
        "error_unscaled": float("nan") if scaled.error_unscaled is None else scaled.error_unscaled,
        "error": float("nan") if scaled.error is None else scaled.error,
    }
