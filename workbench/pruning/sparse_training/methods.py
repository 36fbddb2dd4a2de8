"""Published ways to train with masks, as compositions: each names what differs from plain training along
the axes of `TrainSparse`.
"""

from __future__ import annotations

from workbench.axis import Options
from workbench.pruning.sparse_training.axes import SPARSE_METHOD

#: Plain dense training; a mask that is made before training keeps its place unless a method says more.
PLAIN = {
    "masks": "none",
    "saliency": "magnitude",
    "allocation": "layer",
    "sparsity_schedule": "from-start",
    "trainable": "all",
    "terms": "none",
    "objective": "task",
    "backward": "exact",
    "portion": "whole",
}


@SPARSE_METHOD.add("dense", formula="W", source="baseline")
def dense(options: Options) -> dict[str, str]:
    return dict(PLAIN)


@SPARSE_METHOD.add("static", formula="W M, one mask, kept", source="baseline")
def static(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "static"}


@SPARSE_METHOD.add(
    "spdf", formula="random M; the fine-tuning after it has masks lifted", source="Thangarasa et al. 2023"
)
def spdf(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "static", "saliency": "random"}


@SPARSE_METHOD.add(
    "mediswift", formula="the same composition on a field's own texts", source="Thangarasa et al. 2024"
)
def mediswift(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "static", "saliency": "random"}


@SPARSE_METHOD.add(
    "slope",
    formula="M * W + B A, dX from a matrix that is N:M along both sides",
    source="Mozaffari et al. 2024",
    beside={"pattern": "2:4"},
)
def slope(options: Options) -> dict[str, str]:
    return PLAIN | {
        "masks": "static",
        "saliency": "random",
        "terms": "side-low-rank",
        "backward": "double-pruned",
    }


@SPARSE_METHOD.add(
    "ast", formula="M = choice(|w|) at every step, + S P^T beside it, distilled", source="Huang et al. 2024"
)
def ast(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "adaptive", "terms": "side-blocks", "objective": "distil"}


@SPARSE_METHOD.add("dsl", formula="the smallest |w| go, the largest |g| come back", source="Wang et al. 2024")
def dsl(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "regrow", "saliency": "random"}


@SPARSE_METHOD.add(
    "app",
    formula="|g w|, density 0.8^n from stage to stage, a part of the data for each",
    source="Misra et al. 2022",
    beside={"stages": 2},
)
def app(options: Options) -> dict[str, str]:
    return PLAIN | {
        "masks": "static",
        "saliency": "gradient",
        "allocation": "global",
        "sparsity_schedule": "geometric",
        "portion": "megabatches",
    }


@SPARSE_METHOD.add(
    "block-movement",
    formula="M = sigmoid(S) > threshold, S trained for each block",
    source="Lagunas et al. 2021",
)
def block_movement(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "gates", "objective": "distil"}


@SPARSE_METHOD.add("movement", formula="M = choice(S), S -= lr dL/d(W M) W", source="Sanh et al. 2020")
def movement(options: Options) -> dict[str, str]:
    return PLAIN | {"masks": "movement", "sparsity_schedule": "cubic"}


@SPARSE_METHOD.add("pst", formula="M = choice(|w| + A B + R + C), adapters under it", source="Li et al. 2022")
def pst(options: Options) -> dict[str, str]:
    return PLAIN | {
        "masks": "scores",
        "sparsity_schedule": "cubic",
        "trainable": "adapters",
        "terms": "low-rank",
    }


@SPARSE_METHOD.add(
    "dsee",
    formula="M * W + B A + S2, dense until the last stage",
    source="Chen et al. 2021",
    beside={"stages": 2},
)
def dsee(options: Options) -> dict[str, str]:
    return PLAIN | {
        "masks": "static",
        "sparsity_schedule": "late",
        "trainable": "adapters",
        "terms": "side-low-rank+entries",
    }


@SPARSE_METHOD.add("lora", formula="W + B A", source="Hu et al. 2021")
def lora(options: Options) -> dict[str, str]:
    return PLAIN | {"trainable": "adapters", "terms": "low-rank"}


@SPARSE_METHOD.add("hft", formula="half of each kind of matrix learns in a stage", source="Hui et al. 2024")
def hft(options: Options) -> dict[str, str]:
    return PLAIN | {"trainable": "half"}
