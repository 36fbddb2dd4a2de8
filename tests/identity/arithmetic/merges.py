"""Merges beside mergekit and the authors' code, from the same seeded tensors."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, Literal, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

from tests.identity.pairs import Draw, beside
from tests.identity.repositories import loaded, source
from tests.identity.scripts import taken
from workbench.arithmetic import MERGE, Models, Source, side_by_side
from workbench.arithmetic.merging.averages import on_the_sphere
from workbench.arithmetic.merging.merging import Setting, streamed
from workbench.arithmetic.merging.task_vectors import dropped
from workbench.storage.identity import AUTHORS, PEER

SHAPES = {"layers.0.weight": (24, 32), "layers.1.weight": (32, 24), "norm.weight": (32,)}
MERGEKIT: dict[str, Any] = source("arcee-ai/mergekit") | {"kind": PEER}
MERGELM: dict[str, Any] = source("yule-BUAA/MergeLM") | {"kind": AUTHORS}


def drawn(draw: Draw, count: int = 3) -> list[dict[str, Tensor]]:
    """A base and models a little away from it."""
    base = {name: draw.normal(*shape) for name, shape in SHAPES.items()}
    return [base] + [
        {name: base[name] + 0.1 * draw.normal(*shape) for name, shape in SHAPES.items()} for _ in range(count)
    ]


def models_of(tensors: list[dict[str, Tensor]]) -> Models:
    def made(name: str, held: dict[str, Tensor]) -> Source:
        return Source(name, name, SHAPES, held.__getitem__)

    return side_by_side(made("base", tensors[0]), [made(f"p{i}", t) for i, t in enumerate(tensors[1:])])


def ours(name: str, tensors: list[dict[str, Tensor]], strength: float = 1.0, **options: Any) -> Tensor:
    chosen = MERGE.chosen(name, **options)
    rule = chosen.value(Setting(models_of(tensors), (), "", 1, lambda found: 0.0), chosen.options)
    merged = dict(streamed(models_of(tensors), rule, strength))
    return flat(merged)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def by_tensor(tensors: list[dict[str, Tensor]], merged: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """A function of {"base": ..., "p0": ...} applied to each tensor."""
    names = ["base", *(f"p{i}" for i in range(len(tensors) - 1))]
    return flat({n: merged(dict(zip(names, [t[n] for t in tensors], strict=True))) for n in SHAPES})


class Task:
    """In the place of mergekit's node of a graph, of which only `execute` is asked."""

    def __class_getitem__(cls, kind: Any) -> type:
        return cls


#: What the annotations of mergekit's classes name.
NAMED: dict[str, Any] = {
    "ImmutableMap": dict,
    "Optional": Optional,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
}
NAMED |= {
    n: object for n in ("MergeTensorInput", "ModelReference", "WeightInfo", "GeneralizedTaskArithmeticMerge")
}
NAMED |= {"Any": Any, "Literal": Literal, "Enum": Enum, "torch": torch, "Task": Task}


def generalized(
    tensors: list[dict[str, Tensor]], scale: float, density: float, consensus: Any, cut: Any
) -> Tensor:
    """mergekit's task for all merges of differences."""
    owner = "arcee-ai/mergekit"
    cuts = ("SparsificationMethod", "RescaleNorm", "rescaled_masked_tensor", "sparsify", "magnitude")
    found = taken(owner, "mergekit/sparsify.py", *cuts, **NAMED)
    given = NAMED | {"RescaleNorm": found["RescaleNorm"], "sparsify": found["sparsify"]}
    names = ("GTATask", "get_task_vectors", "get_mask", "ConsensusMethod")
    made = taken(owner, "mergekit/merge_methods/generalized_task_arithmetic.py", *names, **given)
    theirs = SimpleNamespace(**found | made)
    settings = {f"p{i}": {"weight": 1.0, "density": density} for i in range(len(tensors) - 1)}

    def merged(held: dict[str, Tensor]) -> Tensor:
        task = SimpleNamespace(
            weight_info=SimpleNamespace(name="w", is_embed=False),
            base_model="base",
            tensor_parameters=SimpleNamespace(data=settings),
            method=SimpleNamespace(
                sparsification_method=None if cut is None else theirs.SparsificationMethod(cut),
                consensus_method=None if consensus is None else theirs.ConsensusMethod(consensus),
            ),
            rescale_norm=None,
            int8_mask=False,
            normalize=consensus is not None,
            lambda_=scale,
        )
        found: Tensor = theirs.GTATask.execute(task, dict(held))
        return found

    return by_tensor(tensors, merged)


@beside(
    "ties",
    **MERGEKIT,
    compared="the merged weights, trimmed by tensor",
    inputs="a base and three models, 3 tensors, a fifth kept, strength 0.7",
    tolerance=1e-6,
)
def ties_by_tensor(draw: Draw) -> tuple[Tensor, Tensor]:
    tensors = drawn(draw)
    return (
        generalized(tensors, 0.7, 0.2, "sum", "magnitude"),
        ours("ties", tensors, 0.7, density=0.2, over="tensor"),
    )


@beside(
    "task-arithmetic",
    **MERGEKIT,
    compared="the merged weights",
    inputs="a base and three models, 3 tensors, strength 0.4",
    tolerance=1e-6,
)
def task_arithmetic(draw: Draw) -> tuple[Tensor, Tensor]:
    tensors = drawn(draw)
    return generalized(tensors, 0.4, 1.0, None, None), ours("task-arithmetic", tensors, 0.4)


@beside(
    "slerp",
    **MERGEKIT,
    compared="the interpolated weights",
    inputs="two models, 3 tensors, a third of the way",
    tolerance=1e-6,
)
def slerp(draw: Draw) -> tuple[Tensor, Tensor]:
    names = ("slerp", "lerp", "maybe_torch", "normalize")
    given = {"np": np, "torch": torch, "Union": Union, "Optional": Optional}
    theirs = taken("arcee-ai/mergekit", "mergekit/merge_methods/slerp.py", *names, **given)["slerp"]
    tensors = drawn(draw, 2)
    their = flat({n: theirs(1 / 3, tensors[1][n], tensors[2][n]) for n in SHAPES})
    return their, flat({n: on_the_sphere(tensors[1][n], tensors[2][n], 1 / 3) for n in SHAPES})


@beside(
    "model-stock",
    **MERGEKIT,
    compared="the merged weights",
    inputs="a base and three models, 3 tensors",
    tolerance=1e-6,
)
def model_stock(draw: Draw) -> tuple[Tensor, Tensor]:
    name, file = "ModelStockMergeTask", "mergekit/merge_methods/model_stock.py"
    theirs = taken("arcee-ai/mergekit", file, name, **NAMED)[name]
    tensors = drawn(draw)

    def merged(held: dict[str, Tensor]) -> Tensor:
        weights = held["base"], [held[name] for name in held if name != "base"]
        task = SimpleNamespace(
            base_model="base", filter_wise=False, get_rectified_weights=lambda tensors: weights
        )
        found: Tensor = theirs.execute(task, held)
        return found

    return by_tensor(tensors, merged), ours("model-stock", tensors)


@beside(
    "dare",
    "random-drop",
    **MERGELM,
    compared="the differences that are left, divided by their share",
    inputs="24 x 32 normal differences, nine tenths dropped, one generator's seed",
    tolerance=0.0,
)
def dare(draw: Draw) -> tuple[Tensor, Tensor]:
    name = "mask_input_with_mask_rate"
    file = "model_merging_methods/mask_weights_utils.py"
    theirs = taken("yule-BUAA/MergeLM", file, name, torch=torch)[name]
    difference = draw.normal(24, 32)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        left = theirs(difference, 0.9, True, "random")
    return left, dropped(difference, 0.9, True, torch.Generator().manual_seed(11))


class Holder(nn.Module):
    """The tensors of a model as its parameters."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))


@beside(
    "ties",
    **MERGELM | {"kind": PEER},
    compared="the merged weights, trimmed over all of a model's numbers",
    inputs="a base and three models, 3 tensors, a quarter kept, strength 0.7",
    tolerance=1e-6,
)
def ties_over_all(draw: Draw) -> tuple[Tensor, Tensor]:
    theirs = loaded("yule-BUAA/MergeLM", "model_merging_methods.merging_methods")
    tensors = drawn(draw)
    held = [Holder(each) for each in tensors]
    made = theirs.MergingMethod("ties_merging")
    found = made.ties_merging(held[0], held[1:], [], param_value_mask_rate=0.75, scaling_coefficient=0.7)
    return flat({n: found[n.replace(".", "_")] for n in SHAPES}), ours("ties", tensors, 0.7, density=0.25)


@beside(
    "pcb-merging",
    **source("duguodong7/pcb-merging"),
    kind=AUTHORS,
    compared="the merged differences",
    inputs="a base and three models, 3 tensors, a tenth weighs",
    tolerance=1e-6,
)
def pcb_merging(draw: Draw) -> tuple[Tensor, Tensor]:
    names = ("PCB_merge", "clamp", "normalize", "act")
    theirs = taken("duguodong7/pcb-merging", "pcb-merging.py", *names, torch=torch)["PCB_merge"]
    tensors = drawn(draw)
    base = flat(tensors[0])
    vectors = torch.stack([flat(each) - base for each in tensors[1:]])
    return base + theirs(vectors, 0.1)[0], ours("pcb-merging", tensors, 1.0, density=0.1)
