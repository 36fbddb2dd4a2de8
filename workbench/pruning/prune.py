"""The `prune` instrument: saliency x pattern x allocation x compensation x schedule x recovery on one
subject.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

from workbench.errors import BadInput, notice
from workbench.progress import Progress
from workbench.pruning.axes import DIMENSIONS, units_of
from workbench.pruning.plan import PrunePlan
from workbench.results import Result
from workbench.statistics.walk_forecast import Planned
from workbench.storage.forecast import Plan
from workbench.subjects import Subject


class Engine(Protocol):
    """What carries a pruning out for a kind of pattern; `workbench.pruning.engine` has three."""

    def check(self, on: Any) -> None:
        """Say why a combination makes no sense, before anything is computed."""

    def begin(self, on: Subject, progress: Progress) -> None:
        """Take the subject, and keep what it is compared with."""

    def train(self, steps: int) -> None:
        """Recover for so many steps."""

    @property
    def trained(self) -> int:
        """Steps of recovery so far."""

    def event(self, sparsity: float) -> bool:
        """Score, and prune to a sparsity in all; False when it was stopped and nothing can follow."""

    def finish(self) -> Result:
        """The result, after the last step of recovery."""


class Prune(PrunePlan):
    """Remove weights by a published method or a composition of one's own;
    the loss predicted stands beside the loss measured.
    """

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = (
        "remove weights: any saliency, pattern, allocation, compensation, schedule and recovery"
    )

    @classmethod
    def result_class(cls) -> type[Result]:
        from workbench.pruning.prune_result import PruneResult

        return PruneResult

    def engine(self) -> Engine:
        made = self.pattern.value.engine
        if made is None:
            raise BadInput(f"pattern: {self.pattern} is only trained for, by `train-sparse`; choose another")
        engine: Engine = made(self, self.pattern())
        return engine

    @property
    def shares_weights(self) -> bool:
        return self.walks

    def check(self, on: Any) -> None:
        if "sequential" in self.model_fields_set and self.sequential and not self.in_sequence:
            notice(
                "sequential: has no effect where nothing but the weights is read, or gradients, recovery or "
                "other layers' scores are"
            )
        for split in (self.calibration_split, self.test_split):
            on.split(split)
        on.layers(self.layers)
        engine, fixed = self.engine(), self.pattern().fixed
        self._check_method()
        if fixed is not None and not math.isclose(self.sparsity, fixed, abs_tol=1e-6):
            raise BadInput(
                f"sparsity: {self.sparsity:g} contradicts pattern {self.pattern}, "
                f"which fixes it at {fixed:g}; leave sparsity out"
            )
        if self.sparsity_schedule.has("stages"):
            raise BadInput(
                f"sparsity_schedule: {self.sparsity_schedule} goes from stage to stage of `train-sparse`; "
                "choose one-shot, cubic or linear"
            )
        if not self.recovery.has("nothing"):
            if not self.recovery_steps:
                raise BadInput(
                    f"recovery.steps: 0 makes no sense with recovery {self.recovery}; "
                    "give recovery.steps, or recovery none"
                )
            on.split("train")
        self.allocation.value.check(self, self.allocation.options)
        engine.check(on)

    def _check_method(self) -> None:
        kinds, method = set(self.pattern().kinds), self.method
        only = units_of(method.entry)
        if only and not (kinds and kinds <= set(only)):
            raise BadInput(
                f"method: {method} removes {', '.join(only)}; "
                "choose one of them as the pattern, or another method"
            )
        if method.has("not dimensions") and kinds & set(DIMENSIONS):
            raise BadInput(
                f"method: {method} has no form for whole {self.pattern}; "
                "choose magnitude, taylor2, minitron or another that scores them"
            )

    def planned(self, on: Subject) -> Plan | None:
        """The walk, where blocks are pruned one after another on what they read."""
        if not self.in_sequence:
            return None
        layers = on.layers(self.layers)
        return Planned(
            on,
            layers,
            self.calibration_split,
            self.calibration_examples,
            self.test_split,
            on.size(self.test_split),
            rewritten=not self.compensation.has("nothing"),
            masks=sum(layer.original.numel() for layer in layers),
            predicted=bool(self.predict_examples),
        )

    def try_part(self, on: Subject, *part: Any) -> None:
        engine: Any = self.engine()
        engine.tried(on, *part)

    def _run(self, on: Subject, progress: Progress) -> Result:
        engine = self.engine()
        engine.begin(on, progress)
        events = self.sparsity_schedule(self.sparsity, 1)
        between = self.steps_between(len(events))
        for sparsity in events:
            if progress.stopped:
                break
            if between:
                engine.train(between)
            if not engine.event(sparsity):
                return engine.finish()
        engine.train(self.recovery_steps - engine.trained)
        return engine.finish()
