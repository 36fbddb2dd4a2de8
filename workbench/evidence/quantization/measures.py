"""Measurements of the quantization methods, by name of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.evidence.quantization.allocation_evidence import allocations, interactions
from workbench.evidence.quantization.evidence import ROUNDED_INPUTS, against, number_formats
from workbench.evidence.quantization.low_bit_evidence import binarised
from workbench.evidence.quantization.product_evidence import rotated_products
from workbench.evidence.quantization.rotation_evidence import learned_rotations
from workbench.evidence.quantization.study_evidence import binary_points, half_precision, what_matters
from workbench.evidence.quantization.taught_measures import MEASURES as TAUGHT_MEASURES
from workbench.evidence.quantization.trained_evidence import (
    above_majority,
    compared,
    merged,
    switch_over,
    trained,
)
from workbench.evidence.quantization.width_evidence import before_or_after, drawn_by_trace, one_for_all
from workbench.evidence.real_model import QUANTIZATION
from workbench.progress import Progress

NEAREST: dict[str, Any] = {"rounding": "nearest"}
FEW = {"rounding.steps": 60}
FEW_FOR_TRANSFORM = {"transform.steps": 60}
BLOCKS: dict[str, Any] = {
    "format": "int2",
    "rounding": "lowrank-adaround",
    "rounding.objective": "block",
    "rounding.steps": 200,
}
FOUR: dict[str, Any] = {
    "format": "int4",
    "granularity": "channel",
    "activations": "token",
    "activations.format": "uint4",
}
EIGHT = {"format": "int8", "granularity": "channel", "activations.format": "uint6"}


def wide(share: float) -> dict[str, Any]:
    """The input features with the most energy in 8 bits, and the weights that they meet."""
    columns = {"salient": "columns", "salient.share": share, "salient.bits": 8}
    return {"activations.wide_share": share} | columns


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "adaround": against({"rounding": "adaround"} | FEW, NEAREST),
    "flexround": against({"rounding": "flexround"} | FEW, NEAREST),
    "signround": against({"rounding": "signround"} | FEW, NEAREST),
    "adaquant": against({"rounding": "adaquant"} | FEW, NEAREST, ("bytelm",)),
    "teq": against({"transform": "teq"} | FEW_FOR_TRANSFORM, NEAREST, ("bytelm",)),
    "outliertune": against(
        EIGHT | {"activations": "channel", "transform": "smooth", "transform.alpha": 1.0},
        EIGHT | {"activations": "tensor"},
        test_examples=ROUNDED_INPUTS,
    ),
    "outlier-split": against(FOUR | wide(0.0625), FOUR, test_examples=ROUNDED_INPUTS),
    "clipping-search": against({"range": "mse"}, NEAREST),
    "asymmetric-calibration": against(
        {"rounding": "gptq", "format": "int2", "range": "mse", "sequential": True, "target": "outputs"},
        {"rounding": "gptq", "format": "int2", "range": "mse", "sequential": False},
        ("bytelm",),
    ),
    "hawq-v2": allocations("trace"),
    "curvature-allocation": allocations("gauss-newton", seeds=(0, 1, 2, 3, 4)),
    "fp8": number_formats,
    "nf4": against({"format": "nf4"}, {"format": "int4"}),
    "minifloats": against({"format": "e2m1"}, {"format": "int4"}),
    "lsq": trained("lsq", 2),
    "trilm": trained("ternary", 2),
    "continual-qat": switch_over,
    "interactions": interactions,
    "cbq": against(BLOCKS | {"rounding.objective.window": 2}, BLOCKS, ("digits-vit",)),
    "spinquant": learned_rotations,
    "flatquant": against(
        FOUR | {"transform": "flatquant"} | FEW_FOR_TRANSFORM,
        FOUR | {"transform": "hadamard"},
        ("bytelm",),
        ROUNDED_INPUTS,
    ),
    "resq": against(
        FOUR | {"transform": "resq"} | wide(0.125),
        FOUR | {"transform": "hadamard"} | wide(0.125),
        ("bytelm",),
        ROUNDED_INPUTS,
    ),
    "loftq": against(
        {"format": "int2", "adapter": "loftq"}, {"format": "int2", "adapter": "qlora"}, ("bytelm",)
    ),
    "nipq": compared({"method": "nipq", "method.settle": 0.2}, {"method": "lsq"}),
    "csq": compared({"method": "csq", "method.strength": 0.3, "method.settle": 0.2}, {"method": "lsq"}),
    "fliqs": compared(
        {"method": "fliqs", "method.formats": ["int2", "int3", "int4", "e2m1"]},
        {"method": "lsq"},
    ),
    "l4q": merged,
    "bibert": above_majority,
    "halo": rotated_products,
    **QUANTIZATION,
    **TAUGHT_MEASURES,
    "ptq1.61": binarised,
    "double-rounding": one_for_all,
    "hasb": drawn_by_trace,
    "ptq-or-qat": before_or_after,
    "log-variance": allocations("variance", ("bytelm",)),
    "higgs-allocation": allocations("linearity", ("bytelm",), solver="dynamic-program"),
    "q-bert": allocations("eigenvalue", ("bytelm",)),
    "bfloat16": half_precision,
    "gradient-ptq": what_matters,
    "qfx": binary_points,
}
