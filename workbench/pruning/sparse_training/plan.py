"""The fields of `train-sparse`, and what follows from them alone."""

from __future__ import annotations

from typing import Literal

from workbench.axis import parameter
from workbench.instruments import SubjectInstrument
from workbench.pruning.saliency.weights import SALIENCIES
from workbench.pruning.sparse_training.methods import METHODS
from workbench.training.sweep.objective import Start

Method = Literal[
    "static",
    "spdf",
    "mediswift",
    "slope",
    "ast",
    "dsl",
    "app",
    "block-movement",
    "pst",
    "dsee",
    "lora",
    "hft",
    "dense",
]

Masks = Literal["preset", "none", "kept", "lifted", "static", "adaptive", "gates", "scores", "regrow"]


class SparsePlan(SubjectInstrument):
    """What `train-sparse` is told: every part of its run reads it."""

    method: Method = parameter("static", "published method: fixes what is left at preset below")
    sparsity: float = parameter(
        0.5, "share of the weights to remove (gates: comes out of the penalty instead)", ge=0, lt=1, step=0.01
    )
    pattern: str = parameter(
        "unstructured",
        "unstructured, 2:4, block 16x16, row, column; gates also: "
        "hybrid 16x16 (blocks in attention, whole neurons elsewhere)",
    )
    layers: str = parameter("blocks", "which layers carry masks: blocks or globs over names")
    masks: Masks = parameter("preset", "what the masks do while training")
    saliency: str = parameter(
        "preset", f"what chooses a mask that is made before training: preset, {', '.join(SALIENCIES)}"
    )
    allocation: Literal["preset", "row", "layer", "global", "erdos-renyi"] = parameter(
        "preset", "how a mask made before training shares its sparsity among layers"
    )
    schedule: Literal["preset", "from-start", "cubic", "geometric", "late"] = parameter(
        "preset", "sparsity over the run; geometric and late go from stage to stage"
    )
    trainable: Literal["preset", "all", "body", "adapters", "half", "blocks", "head"] = parameter(
        "preset", "what learns"
    )
    blocks: str = parameter("", "numbers of the blocks that learn, with trainable blocks, such as 0,2")
    terms: Literal["preset", "none", "low-rank", "side-low-rank", "side-blocks", "side-low-rank+entries"] = (
        parameter("preset", "terms added to a weight: under its mask, or beside it")
    )
    objective: Literal["preset", "task", "distil"] = parameter(
        "preset", "task's loss, alone or with distillation from the subject as it was given"
    )
    backward: Literal["preset", "exact", "double-pruned"] = parameter(
        "preset", "gradient that goes on to earlier layers"
    )
    start: Start = parameter("weights", "start from the subject's weights or from random ones")
    steps: int = parameter(200, "optimizer steps in all", ge=1, le=1_000_000, scale="log")
    batch_size: int = parameter(32, "examples per step", ge=1, le=65536, scale="log")
    lr: float = parameter(
        1e-3, "peak learning rate (AdamW, cosine, anew in every stage)", gt=0, le=10, scale="log"
    )
    score_lr: float = parameter(3e-2, "peak learning rate of trained scores", gt=0, le=10, scale="log")
    stages: int = parameter(
        1,
        "parts of the run: the half that learns is drawn, and a staged schedule prunes, at the start of each",
        ge=1,
        le=1000,
    )
    data: Literal["preset", "whole", "megabatches"] = parameter(
        "preset", "a stage sees all training examples, or its own part of them"
    )
    replay: bool = parameter(False, "with megabatches: a stage sees the parts before its own again")
    rank: int = parameter(8, "rank of low-rank terms and scores", ge=1)
    entries: int = parameter(64, "free entries in a matrix, for side-low-rank+entries", ge=1)
    support: Literal["decomposition", "random"] = parameter("decomposition", "where the free entries lie")
    group: int = parameter(16, "inputs that share a number, for side-blocks", ge=1)
    lazy: float = parameter(
        0.01, "share of the last steps in which a double-pruned run's adapters take part", ge=0, le=1
    )
    decay: float = parameter(2e-4, "largest pull of adaptive masks on what they prune (SR-STE)", ge=0)
    penalty: float = parameter(0.1, "weight of the open gates' share in the loss", ge=0)
    threshold: float = parameter(
        0.1, "a gate stays open while the sigmoid of its score is above this", gt=0, lt=0.5
    )
    period: int = parameter(10, "steps between exchanges of weights, for regrow", ge=1)
    exchanged: float = parameter(
        0.3, "share of the kept weights exchanged at first (falls by a cosine), for regrow", ge=0, lt=1
    )
    regrow_by: Literal["gradient", "random"] = parameter("gradient", "which pruned weights come back")
    calibration_examples: int = parameter(
        64, "examples for saliencies that need inputs", ge=1, unit="examples"
    )
    gradients: int = parameter(
        64, "per-example gradients for saliencies that need them", ge=1, unit="examples"
    )
    test_split: str = parameter("test", "split for the reported loss and metrics")

    def axis(self, name: str) -> str:
        """An axis's value after the method has filled what was left to it."""
        own = getattr(self, name)
        return getattr(METHODS[self.method], name) if own == "preset" else own
