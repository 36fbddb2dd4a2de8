"""What masks do while training.

Traits: "given": the subject's own masks, or none; "made": chosen before training, by a saliency; "moving":
chosen anew at every step, from the dense model; "tiles": patterns with a gate for each tile or unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.axis import Options, parameter
from workbench.progress import Progress
from workbench.pruning.sparse_training import block_movement
from workbench.pruning.sparse_training.axes import MASKS
from workbench.pruning.sparse_training.trained_masks import AdaptiveMask, LowRankScores, MovementScores
from workbench.subjects import Mask

if TYPE_CHECKING:
    from workbench.pruning.sparse_training.run import Course


@MASKS.add("none", formula="W", source="baseline", traits="given")
def none(course: Course, sparsity: float, options: Options) -> None:
    """No masks."""


@MASKS.add("kept", formula="W M, M as it is", source="baseline", traits="given")
def kept(course: Course, sparsity: float, options: Options) -> None:
    """Those that there are."""


@MASKS.add("lifted", formula="W starts at W M", source="Thangarasa et al. 2023 (SPDF)", traits="given")
def lifted(course: Course, sparsity: float, options: Options) -> None:
    """Those that there are go; the weights start where they left them."""
    for layer in course.layers:
        for change in [c for c in layer.changes if isinstance(c, Mask)]:
            layer.write(layer.weight.detach())
            layer.detach(change)


@MASKS.add("static", formula="W M, M chosen once", source="baseline", traits="made")
def static(course: Course, sparsity: float, options: Options) -> None:
    """Chosen before the stage that they belong to (see `TrainSparse`)."""


class Exchange(Options):
    period: int = parameter(10, "steps between exchanges of weights", ge=1)
    exchanged: float = parameter(
        0.3, "share of the kept weights exchanged at first (falls by a cosine)", ge=0, lt=1
    )
    regrow_by: str = parameter(
        "gradient", "which pruned weights come back: gradient or random", pattern="^(gradient|random)$"
    )


@MASKS.add(
    "regrow",
    formula="the smallest |w| go, the largest |g| come back",
    source="Evci et al. 2020 (RigL); Mocanu et al. 2018 (SET); Wang et al. 2024 (DSL)",
    options=Exchange,
    traits="made",
)
def regrow(course: Course, sparsity: float, options: Exchange) -> None:
    """Chosen once, then pruned and regrown at a constant budget."""
    course.prune(sparsity, Progress())


class Pull(Options):
    decay: float = parameter(2e-4, "largest pull on what is pruned (SR-STE)", ge=0)


@MASKS.add(
    "adaptive",
    formula="M = choice(|w| norm) at every step",
    source="Huang et al. 2024 (AST); Zhou et al. 2021 (SR-STE)",
    options=Pull,
    traits="moving",
)
def adaptive(course: Course, sparsity: float, options: Pull) -> None:
    """Chosen from the weights at every step."""
    wanda = course.plan.saliency.entry.needs == "inputs"
    calibration = course.calibration(Progress())
    for layer in course.layers:
        norm = (
            calibration.norm(layer) if wanda else torch.ones(1, layer.shape[-1], device=layer.original.device)
        )
        stacked = len(layer.shape) == 3 and wanda
        pattern = str(course.plan.pattern)
        layer.attach(AdaptiveMask(norm[:, None] if stacked else norm[0], pattern, sparsity))


class Gated(Options):
    penalty: float = parameter(
        20.0, "weight of the open gates' share in the loss; too small a one closes none", ge=0
    )
    threshold: float = parameter(
        0.1, "a gate stays open while the sigmoid of its score is above this", gt=0, lt=0.5
    )
    learning_rate: float = parameter(0.1, "peak learning rate of the gates' scores", gt=0, le=10, scale="log")


@MASKS.add(
    "gates",
    formula="M = sigmoid(S) > threshold, S trained for each block",
    source="Lagunas et al. 2021",
    options=Gated,
    traits=("moving", "tiles"),
)
def gates(course: Course, sparsity: float, options: Gated) -> None:
    """A trained score for each block."""
    block_movement.attach_gates(course.on, course.layers, str(course.plan.pattern), options.threshold)


class Moved(Options):
    learning_rate: float = parameter(1e-2, "peak learning rate of the scores", gt=0, le=10, scale="log")


@MASKS.add(
    "movement",
    formula="M = choice(S), S -= lr dL/d(W M) W",
    source="Sanh et al. 2020, eq. 3 and 4",
    options=Moved,
    traits="moving",
)
def movement(course: Course, sparsity: float, options: Moved) -> None:
    """A trained score for each weight."""
    for layer in course.layers:
        score = torch.zeros(layer.shape, device=layer.original.device)
        layer.attach(MovementScores(score, str(course.plan.pattern), sparsity))


class Scored(Options):
    rank: int = parameter(8, "rank of the trained scores", ge=1)
    learning_rate: float = parameter(3e-2, "peak learning rate of the scores", gt=0, le=10, scale="log")


@MASKS.add(
    "scores",
    formula="M = choice(|w| + a1 A B + a2 (R + C))",
    source="Li et al. 2022 (PST)",
    options=Scored,
    traits="moving",
)
def scores(course: Course, sparsity: float, options: Scored) -> None:
    """Trained low-rank scores."""
    for layer in course.layers:
        out, width = layer.shape
        rank, device = min(options.rank, out, width), layer.original.device
        # The product starts at zero and can still learn, as in an adapter; the lines start at zero.
        right = torch.randn(rank, width, generator=course.generator) / width**0.5
        left, row, column = (
            torch.zeros(shape, device=device) for shape in ((out, rank), (out, 1), (1, width))
        )
        layer.attach(LowRankScores(left, right.to(device), row, column, str(course.plan.pattern), sparsity))
