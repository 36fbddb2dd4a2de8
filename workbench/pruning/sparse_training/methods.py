"""Published ways to train with masks, as compositions: each names what differs from plain training along
the axes of `TrainSparse`.

masks      none, kept (those there are), lifted, static, adaptive (chosen from the weights at every step),
           gates (a trained score for each block), scores (trained low-rank scores), regrow
           (pruned and regrown at a constant budget)
schedule   from-start, cubic (inside the run, for masks that are chosen at every step), geometric and late
           (from stage to stage)
trainable  all, body (no embeddings), adapters, half, blocks, head
terms      none, low-rank (under the mask), side-low-rank, side-blocks, side-low-rank+entries (beside it)
objective  task, distil
backward   exact, double-pruned
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """One composition; a field left alone is plain dense training."""

    masks: str = "none"
    saliency: str = "magnitude"
    allocation: str = "layer"
    schedule: str = "from-start"
    trainable: str = "all"
    terms: str = "none"
    objective: str = "task"
    backward: str = "exact"
    data: str = "whole"
    source: str = ""


METHODS: dict[str, Training] = {
    "dense": Training(source="baseline"),
    "static": Training("static", source="baseline: one mask, kept"),
    "spdf": Training(
        "static", "random", source="Thangarasa et al. 2023; the fine-tuning after it has masks=lifted"
    ),
    "mediswift": Training(
        "static", "random", source="Thangarasa et al. 2024; the same composition on a field's own texts"
    ),
    "slope": Training(
        "static", "random", terms="side-low-rank", backward="double-pruned", source="Mozaffari et al. 2024"
    ),
    "ast": Training("adaptive", terms="side-blocks", objective="distil", source="Huang et al. 2024"),
    "dsl": Training(
        "regrow",
        "random",
        source="Wang et al. 2024; Evci et al. 2020 (RigL) and Mocanu et al. 2018 (SET) are its relatives",
    ),
    "app": Training(
        "static", "gradient", "global", "geometric", data="megabatches", source="Misra et al. 2022"
    ),
    "block-movement": Training("gates", objective="distil", source="Lagunas et al. 2021"),
    "pst": Training(
        "scores", schedule="cubic", trainable="adapters", terms="low-rank", source="Li et al. 2022"
    ),
    "dsee": Training(
        "static",
        schedule="late",
        trainable="adapters",
        terms="side-low-rank+entries",
        source="Chen et al. 2021",
    ),
    "lora": Training(trainable="adapters", terms="low-rank", source="Hu et al. 2021"),
    "hft": Training(trainable="half", source="Hui et al. 2024"),
}
