"""The `prune` instrument: saliency x pattern x allocation x compensation x schedule x recovery on one subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.instruments import BadInput, Progress, Result, SubjectInstrument, parameter
from workbench.pruning.allocation.latency import measured_speedup
from workbench.pruning.calibration import Calibration
from workbench.pruning.engine.dimensions import TRAINED_BEFORE_LAST, check_dimension, prune_dimension
from workbench.pruning.engine.matrices import prune_once, zero_share
from workbench.pruning.engine.structure_events import check_structures, prune_units
from workbench.pruning.error_table import add_prediction, layer_table, packed_bytes
from workbench.pruning.methods import PRESETS, preset_for
from workbench.pruning.pattern import NM, Dimension, Structures, Tiles, parse
from workbench.pruning.recovery.recovery import Recovery
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.pruning.schedule import sparsities
from workbench.subjects import Layer, Subject

Method = Literal[
    "magnitude",
    "wanda",
    "sparsegpt",
    "obert",
    "obert-greedy",
    "gradient",
    "obd",
    "taylor2",
    "movement",
    "icbs",
    "flap",
    "llm-pruner",
    "ziplm",
    "minitron",
    "adapt-pruner",
    "deeper-layers",
    "heapr",
    "premoe",
    "slimmoe",
    "pat",
    "random",
]
SaliencyName = Literal[
    "preset",
    "random",
    "magnitude",
    "wanda",
    "fluctuation",
    "gradient",
    "obd",
    "taylor2",
    "movement",
    "obs",
    "fisher",
    "fisher-greedy",
    "activation",
    "heapr",
    "angular",
    "block-influence",
    "loss",
    "deepest",
    "tcess",
    "usage",
    "learned",
]
Allocation = Literal["preset", "row", "layer", "global", "erdos-renyi", "latency", "adaptive"]


class Prune(SubjectInstrument):
    """Remove weights by a published method or a composition of one's own; the loss predicted stands beside the loss measured."""

    changes_model: ClassVar[bool] = True
    summary_line: ClassVar[str] = (
        "remove weights: any saliency, pattern, allocation, compensation, schedule and recovery"
    )

    method: Method = parameter(
        "obert", "published method: fixes saliency, compensation and allocation unless they are given"
    )
    sparsity: float = parameter(0.5, "share of the weights to remove", ge=0, lt=1, step=0.01)
    pattern: str = parameter(
        "unstructured",
        "what goes together: unstructured, 2:4, 2:4 outputs, block 16x16, row, column, heads, neurons, heads+neurons, "
        "channels, layers, experts",
    )
    layers: str = parameter(
        "blocks",
        "which layers: blocks (all inside the repeated blocks) or globs over names, such as '*.query,*.key'",
    )
    saliency: SaliencyName = parameter("preset", "what a weight's removal is thought to cost")
    compensation: Literal["preset", "none", "bias", "obs", "least-squares", "fisher"] = parameter(
        "preset", "what the survivors do about the removed weights"
    )
    allocation: Allocation = parameter(
        "preset",
        "how the sparsity is shared among layers or groups; latency: so that the speed-up is reached",
    )
    amplitude: float = parameter(
        0.1, "how far an adaptive allocation moves a block's sparsity from the mean", ge=0, le=1
    )
    speedup: float = parameter(
        1.0,
        "measured speed-up to reach by removing heads and neurons, with allocation latency",
        ge=1,
        step=0.1,
    )
    schedule: Literal["one-shot", "cubic", "linear"] = parameter(
        "one-shot", "at once, or over several steps with the statistics measured anew at each"
    )
    steps: int = parameter(1, "pruning steps of a gradual schedule", ge=1)
    calibration_examples: int = parameter(
        128, "examples for the layers' input statistics", ge=1, unit="examples"
    )
    gradients: int = parameter(256, "gradients for gradient and Fisher saliencies", ge=1)
    gradient_batch: int = parameter(
        1, "examples averaged in each gradient (1: per-example gradients)", ge=1, unit="examples"
    )
    damp: float = parameter(
        0.01,
        "added to the diagonal of a Hessian or Fisher, as a share of its mean diagonal",
        gt=0,
        scale="log",
    )
    block: int = parameter(50, "weights in one block of the Fisher", ge=1)
    recovery: Literal["none", "finetune", "distil", "low-rank"] = parameter(
        "none", "training after and between the pruning steps, with the masks in force"
    )
    recovery_steps: int = parameter(0, "training steps in all", ge=0)
    lr: float = parameter(5e-5, "peak learning rate of the recovery (AdamW, linear decay)", gt=0, scale="log")
    batch_size: int = parameter(16, "examples in a training batch", ge=1)
    rank: int = parameter(8, "rank of the adapters of a low-rank recovery", ge=1)
    remove: bool = parameter(
        True,
        "take pruned heads and neurons out of the matrices, so that the model is smaller; otherwise they are masked",
    )
    predict_examples: int = parameter(
        32, "examples for predicted and measured loss change (0: leave them out)", ge=0, unit="examples"
    )
    calibration_split: str = parameter("calibration", "split that all statistics come from")
    test_split: str = parameter("test", "split for the reported loss and metrics")

    @classmethod
    def result_class(cls) -> type[Result]:
        from workbench.pruning.prune_result import PruneResult

        return PruneResult

    def composition(self) -> tuple[str, str, str]:
        """(saliency, compensation, allocation) after the preset has filled what was left to it."""
        preset = preset_for(self.method, parse(self.pattern))
        own = (self.saliency, self.compensation, self.allocation)
        filled = (preset.saliency, preset.compensation, preset.allocation)
        saliency, compensation, allocation = (
            a if a != "preset" else b for a, b in zip(own, filled, strict=True)
        )
        return saliency, compensation, allocation

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
                f"saliency: {saliency} scores whole structures and dimensions, not single weights; choose another, or such a pattern"
            )
        if allocation == "adaptive" and not isinstance(pattern, Structures):
            raise BadInput(
                "allocation: adaptive shares heads and neurons among the blocks; choose layer, row or global"
            )
        if isinstance(pattern, NM):
            if not math.isclose(self.sparsity, pattern.sparsity, abs_tol=1e-6) and self.sparsity != 0.5:
                raise BadInput(
                    f"sparsity: {self.sparsity:g} contradicts pattern {self.pattern}, which fixes it at {pattern.sparsity:g}; leave sparsity out"
                )
            if self.schedule != "one-shot":
                raise BadInput(
                    "schedule: an N:M pattern has one sparsity, so it cannot be reached gradually; use one-shot"
                )
        if self.schedule == "one-shot" and self.steps != 1:
            raise BadInput(
                f"steps: {self.steps} makes no sense with schedule one-shot; choose cubic or linear, or leave steps at 1"
            )
        if (self.recovery == "none") != (self.recovery_steps == 0):
            raise BadInput(
                f"recovery_steps: {self.recovery_steps} makes no sense with recovery {self.recovery}; give both or neither"
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
                "schedule: allocation latency is one-shot; prune again with a larger speed-up to go on gradually"
            )
        if saliency == "movement" and (self.recovery == "none" or self.schedule == "one-shot"):
            raise BadInput(
                "saliency: movement is collected while training; it needs a gradual schedule, a recovery and recovery_steps"
            )
        if saliency == "movement" and not self.steps_between(self.steps):
            raise BadInput(
                f"recovery_steps: {self.recovery_steps} leave no training before the first of {self.steps} pruning steps, and movement is collected there; "
                f"give at least {math.ceil(self.steps / TRAINED_BEFORE_LAST)}"
            )
        if (
            self.allocation == "global"
            and saliency in ("wanda", "obs", "fluctuation", "random")
            and not isinstance(pattern, Structures)
        ):
            raise BadInput(
                f"allocation: global compares scores across layers and {saliency} scores do not compare; use layer, row or a loss-like saliency"
            )
        if isinstance(pattern, Structures):
            check_structures(on, layers, pattern, saliency, compensation, allocation)
        elif compensation == "bias":
            for layer in layers:
                if layer.bias is None or len(layer.shape) != 2:
                    raise BadInput(
                        f"compensation: bias needs a bias in every layer and {layer.name} has none; use obs, least-squares or none"
                    )

    def steps_between(self, events: int) -> int:
        """Recovery steps before each of so many pruning events."""
        return int(TRAINED_BEFORE_LAST * self.recovery_steps / events) if events > 1 else 0

    def calibration(self, on: Subject, layers: Sequence[Layer], progress: Progress) -> Calibration:
        return Calibration(
            on,
            layers,
            self.calibration_split,
            self.calibration_examples,
            self.gradients,
            self.damp,
            self.block,
            self.seed,
            progress,
            gradient_batch=self.gradient_batch,
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
        # The dense model's statistics: still held when they fit in memory, otherwise measured on the copy again, a group of layers at a time.
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
            "composition": f"{saliency} x {self.pattern} x {allocation} x {compensation} x {self.schedule} x {self.recovery}",
        }
