"""The fields of `prune`, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from workbench.axis import parameter
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning.calibration import Calibration
from workbench.pruning.methods import preset_for
from workbench.pruning.pattern import parse
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

TRAINED_BEFORE_LAST = 0.6  # share of the recovery steps spent before the last event of a gradual schedule


class PrunePlan(SubjectInstrument):
    """What `prune` is told: every part of a pruning reads it."""

    method: Method = parameter(
        "obert", "published method: fixes saliency, compensation and allocation unless they are given"
    )
    sparsity: float = parameter(0.5, "share of the weights to remove", ge=0, lt=1, step=0.01)
    pattern: str = parameter(
        "unstructured",
        "what goes together: unstructured, 2:4, 2:4 outputs, block 16x16, row, column, heads, neurons, "
        "heads+neurons, "
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
        "take pruned heads and neurons out of the matrices, so that the model is smaller; "
        "otherwise they are masked",
    )
    predict_examples: int = parameter(
        32, "examples for predicted and measured loss change (0: leave them out)", ge=0, unit="examples"
    )
    calibration_split: str = parameter("calibration", "split that all statistics come from")
    test_split: str = parameter("test", "split for the reported loss and metrics")

    def composition(self) -> tuple[str, str, str]:
        """(saliency, compensation, allocation) after the preset has filled what was left to it."""
        preset = preset_for(self.method, parse(self.pattern))
        own = (self.saliency, self.compensation, self.allocation)
        filled = (preset.saliency, preset.compensation, preset.allocation)
        saliency, compensation, allocation = (
            a if a != "preset" else b for a, b in zip(own, filled, strict=True)
        )
        return saliency, compensation, allocation

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
