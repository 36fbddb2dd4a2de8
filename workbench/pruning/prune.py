"""The `prune` instrument: saliency x pattern x allocation x compensation x schedule x recovery on one
subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning.allocation.latency import measured_speedup
from workbench.pruning.engine.dimensions import check_dimension, prune_dimension
from workbench.pruning.engine.matrices import prune_once, zero_share
from workbench.pruning.engine.structure_events import check_structures, prune_units
from workbench.pruning.error_table import add_prediction, layer_table, packed_bytes
from workbench.pruning.methods import PRESETS
from workbench.pruning.pattern import NM, Dimension, Structures, Tiles, parse
from workbench.pruning.plan import TRAINED_BEFORE_LAST, PrunePlan
from workbench.pruning.recovery.recovery import Recovery
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.pruning.schedule import sparsities
from workbench.results import Result
from workbench.subjects import Layer, Subject
from workbench.training.chosen import chosen_settings


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

    def check(self, on: Any) -> None:
        pattern = parse(self.pattern)
        saliency, compensation, allocation = self.composition()
        for split in (self.calibration_split, self.test_split):
            on.split(split)
        layers = on.layers(self.layers)
        if isinstance(pattern, Dimension):
            check_dimension(self, on, pattern)
        elif not isinstance(pattern, Structures) and saliency not in SALIENCIES and saliency != "movement":
            raise BadInput(
                f"saliency: {saliency} scores whole structures and dimensions, not single weights; "
                "choose another, or such a pattern"
            )
        if allocation == "adaptive" and not isinstance(pattern, Structures):
            raise BadInput(
                "allocation: adaptive shares heads and neurons among the blocks; choose layer, row or global"
            )
        if isinstance(pattern, NM):
            if not math.isclose(self.sparsity, pattern.sparsity, abs_tol=1e-6) and self.sparsity != 0.5:
                raise BadInput(
                    f"sparsity: {self.sparsity:g} contradicts pattern {self.pattern}, "
                    f"which fixes it at {pattern.sparsity:g}; leave sparsity out"
                )
            if self.schedule != "one-shot":
                raise BadInput(
                    "schedule: an N:M pattern has one sparsity, so it cannot be reached gradually; "
                    "use one-shot"
                )
        if self.schedule == "one-shot" and self.steps != 1:
            raise BadInput(
                f"steps: {self.steps} makes no sense with schedule one-shot; "
                "choose cubic or linear, or leave steps at 1"
            )
        if (self.recovery == "none") != (self.recovery_steps == 0):
            raise BadInput(
                f"recovery_steps: {self.recovery_steps} makes no sense with recovery {self.recovery}; "
                "give both or neither"
            )
        if PRESETS[self.method].refine and pattern != Tiles(1, 1):
            raise BadInput(
                f"pattern: {self.method} exchanges single weights, so it needs pattern unstructured"
            )
        if self.recovery != "none":
            on.split("train")
        if (allocation == "latency") != (self.speedup > 1) or (
            allocation == "latency" and not (isinstance(pattern, Structures) and self.remove)
        ):
            raise BadInput(
                f"speedup: {self.speedup:g} with allocation {allocation} and pattern {self.pattern}; "
                "a speed-up above 1, allocation latency and removed heads or neurons belong together"
            )
        if allocation == "latency" and self.schedule != "one-shot":
            raise BadInput(
                "schedule: allocation latency is one-shot; prune again with a larger speed-up to go on "
                "gradually"
            )
        if saliency == "movement" and (self.recovery == "none" or self.schedule == "one-shot"):
            raise BadInput(
                "saliency: movement is collected while training; "
                "it needs a gradual schedule, a recovery and recovery_steps"
            )
        if saliency == "movement" and not self.steps_between(self.steps):
            raise BadInput(
                f"recovery_steps: {self.recovery_steps} leave no training before the first of {self.steps} "
                "pruning steps, and movement is collected there; "
                f"give at least {math.ceil(self.steps / TRAINED_BEFORE_LAST)}"
            )
        if (
            self.allocation == "global"
            and saliency in ("wanda", "obs", "fluctuation", "random")
            and not isinstance(pattern, Structures)
        ):
            raise BadInput(
                f"allocation: global compares scores across layers and {saliency} scores do not compare; "
                "use layer, row or a loss-like saliency"
            )
        if isinstance(pattern, Structures):
            check_structures(on, layers, pattern, saliency, compensation, allocation)
        elif compensation == "bias":
            for layer in layers:
                if layer.bias is None or len(layer.shape) != 2:
                    raise BadInput(
                        f"compensation: bias needs a bias in every layer and {layer.name} has none; "
                        "use obs, least-squares or none"
                    )

    def _recovery(
        self, on: Subject, layers: Sequence[Layer], teacher: Subject | None, progress: Progress
    ) -> Recovery | None:
        if self.recovery == "none":
            return None

        def draw(run: Recovery) -> None:
            if type(progress).preview is not Progress.preview:
                progress.preview(
                    self.result(
                        pd.DataFrame(),
                        {"steps": run.done},
                        tables={"recovery": pd.DataFrame(run.curve)},
                        partial=True,
                    )
                )

        return Recovery(
            on,
            layers,
            self.recovery,
            self.recovery_steps,
            self.lr,
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            teacher=teacher,
            movement=self.composition()[0] == "movement",
            progress=progress,
            watch=draw,
            settings=chosen_settings(self),
        )

    def _run(self, on: Subject, progress: Progress) -> Result:
        layers, pattern = on.layers(self.layers), parse(self.pattern)
        if isinstance(pattern, Dimension):
            return prune_dimension(self, on, pattern, progress)
        dense_test = on.evaluated(self.test_split, progress=progress)
        dense = on.copy()
        before = {layer.name: layer.weight.detach().clone() for layer in layers}
        calibration = self.calibration(on, layers, progress)
        recovery = self._recovery(on, layers, dense, progress)
        target = pattern.sparsity if isinstance(pattern, NM) else self.sparsity
        events = sparsities(self.schedule, target, self.steps)
        between = self.steps_between(len(events))
        history: list[dict[str, float]] = []
        kept: dict[str, Tensor] = {}
        extra: dict[str, float] = {}
        for number, sparsity in enumerate(events):
            if progress.stopped:
                break
            if recovery is not None and between:
                recovery.advance(between)
            if number or between:
                calibration = self.calibration(on, layers, progress)
            if isinstance(pattern, Structures):
                kept = prune_units(
                    on,
                    layers,
                    calibration,
                    pattern,
                    sparsity,
                    *self.composition(),
                    progress,
                    self.speedup,
                    self.amplitude,
                    self.batch_size,
                    extra,
                )
            else:
                scores = recovery.scores if recovery is not None else {}
                prune_once(
                    layers,
                    calibration,
                    pattern,
                    sparsity,
                    *self.composition(),
                    progress,
                    scores,
                    PRESETS[self.method].refine,
                )
            history.append(
                {
                    "step": number + 1,
                    "trained": recovery.done if recovery else 0,
                    "sparsity": zero_share(layers),
                }
            )
        if recovery is not None:
            recovery.advance(self.recovery_steps - recovery.done)
            recovery.finish()
        # The dense model's statistics: still held when they fit in memory,
        # otherwise measured on the copy again, a group of layers at a time.
        table = layer_table(
            layers,
            before,
            None if progress.stopped else self.calibration(dense, dense.layers(self.layers), progress).gram,
        )
        facts = self._facts(layers, dense_test)
        if self.predict_examples and not progress.stopped:
            deltas = {layer.name: layer.weight.detach() - before[layer.name] for layer in layers}
            add_prediction(
                table, facts, dense, deltas, self.calibration_split, self.predict_examples, progress
            )
        arrays = {
            layer.name: np.packbits((layer.weight.detach() != 0).cpu().numpy(), axis=-1) for layer in layers
        }
        if kept and self.remove:
            from workbench.subjects.structure.removal import remove

            remove(on.model, kept)
            if extra:
                extra["speedup"] = measured_speedup(dense, on, self.batch_size, split=self.calibration_split)
            facts |= extra
            facts["packed_bytes"] = facts["dense_bytes"] - 4 * (
                facts["weights"] - sum(layer.original.numel() for layer in on.layers(self.layers))
            )
        if not progress.stopped:
            facts |= on.evaluate(self.test_split, progress=progress)
        tables = {"schedule": pd.DataFrame(history)} if len(history) > 1 else {}
        if recovery is not None:
            tables["recovery"] = pd.DataFrame(recovery.curve)
            facts["trained_share"] = recovery.trainable_share
        if kept:
            tables["units"] = pd.DataFrame(
                [{"group": n, "units": k.shape[1], "kept": int(k[0].sum())} for n, k in kept.items()]
            )
        return self.result(table, facts, tables=tables, arrays=arrays, subject=on)

    def _facts(self, layers: Sequence[Layer], dense: dict[str, float]) -> dict[str, Any]:
        saliency, compensation, allocation = self.composition()
        weights = sum(layer.original.numel() for layer in layers)
        zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
        return {
            "sparsity": zeros / weights,
            **{f"dense_{k}": v for k, v in dense.items()},
            "weights": weights,
            "nonzero": weights - zeros,
            "dense_bytes": weights * 4,
            "packed_bytes": packed_bytes(weights, weights - zeros, parse(self.pattern)),
            "composition": (
                f"{saliency} x {self.pattern} x {allocation} x {compensation} x {self.schedule} x "
                f"{self.recovery}"
            ),
        }
