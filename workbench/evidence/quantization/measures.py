"""Measurements of the quantization methods, by name of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.evidence.quantization.evidence import (
    ROUNDED_INPUTS,
    above_majority,
    against,
    allocations,
    compared,
    interactions,
    learned_rotations,
    merged,
    number_formats,
    rotations,
    switch_over,
    trained,
)
from workbench.evidence.quantization.low_bit_evidence import binarised
from workbench.evidence.quantization.product_evidence import rotated_products
from workbench.evidence.quantization.study_evidence import binary_points, half_precision, what_matters
from workbench.evidence.quantization.taught_measures import MEASURES as TAUGHT_MEASURES
from workbench.evidence.quantization.width_evidence import before_or_after, drawn_by_trace, one_for_all
from workbench.progress import Progress

FAMILY = "quantization"
NEAREST: dict[str, Any] = {"rounding": "nearest"}
FEW = {"steps": 60}
BLOCKS: dict[str, Any] = {"bits": 2, "rounding": "lowrank-adaround", "objective": "block", "steps": 200}
FOUR: dict[str, Any] = {"bits": 4, "granularity": "channel", "activations": "token", "activation_bits": 4}


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "gptq": against({"rounding": "gptq"}, NEAREST),
    "adaround": against({"rounding": "adaround"} | FEW, NEAREST),
    "flexround": against({"rounding": "flexround"} | FEW, NEAREST),
    "signround": against({"rounding": "signround"} | FEW, NEAREST),
    "adaquant": against({"rounding": "adaquant"} | FEW, NEAREST, ("bytelm",)),
    "hqq": against({"rounding": "hqq", "symmetric": False}, {"symmetric": False}),
    "awq": against({"transform": "awq"}, NEAREST),
    "teq": against({"transform": "teq"} | FEW, NEAREST, ("bytelm",)),
    "smoothquant": against(
        {
            "bits": 8,
            "granularity": "channel",
            "activations": "tensor",
            "activation_bits": 6,
            "transform": "smooth",
        },
        {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6},
        test_examples=ROUNDED_INPUTS,
    ),
    "quarot": rotations,
    "outliertune": against(
        {"bits": 8, "granularity": "channel", "activations": "channel", "activation_bits": 6},
        {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6},
        test_examples=ROUNDED_INPUTS,
    ),
    "outlier-split": against(FOUR | {"wide_share": 0.0625}, FOUR, test_examples=ROUNDED_INPUTS),
    "clipping-search": against({"range": "mse"}, NEAREST),
    "asymmetric-calibration": against(
        {"rounding": "gptq", "bits": 2, "range": "mse", "sequential": True},
        {"rounding": "gptq", "bits": 2, "range": "mse"},
        ("bytelm",),
    ),
    "hawq-v2": allocations("trace"),
    "curvature-allocation": allocations("gauss-newton", seeds=(0, 1, 2, 3, 4)),
    "fp8": number_formats,
    "nf4": against({"format": "nf4"}, {"bits": 4}),
    "minifloats": against({"format": "e2m1"}, {"bits": 4}),
    "lsq": trained("lsq", 2),
    "trilm": trained("ternary", 2),
    "continual-qat": switch_over,
    "interactions": interactions,
    "cbq": against(BLOCKS | {"window": 2}, BLOCKS, ("digits-vit",)),
    "spinquant": learned_rotations,
    "flatquant": against(
        FOUR | {"transform": "flatquant"} | FEW,
        FOUR | {"transform": "hadamard"},
        ("bytelm",),
        ROUNDED_INPUTS,
    ),
    "resq": against(
        FOUR | {"transform": "resq", "wide_share": 0.125},
        FOUR | {"transform": "hadamard", "wide_share": 0.125},
        ("bytelm",),
        ROUNDED_INPUTS,
    ),
    "loftq": against(
        {"bits": 2, "adapter_rank": 8}, {"bits": 2, "adapter_rank": 8, "adapter_steps": 0}, ("bytelm",)
    ),
    "nipq": compared({"method": "nipq", "budget": 3.0}, {"method": "lsq", "bits": 3}),
    "csq": compared({"method": "csq", "budget": 3.0, "strength": 0.3}, {"method": "lsq", "bits": 3}),
    "fliqs": compared(
        {"method": "fliqs", "budget": 3.0, "formats": ["int2", "int3", "int4", "e2m1"]},
        {"method": "lsq", "bits": 3},
    ),
    "l4q": merged,
    "bibert": above_majority,
    "halo": rotated_products,
    **TAUGHT_MEASURES,
    "ptq1.61": binarised,
    "double-rounding": one_for_all,
    "hasb": drawn_by_trace,
    "ptq-or-qat": before_or_after,
    "log-variance": allocations("variance", ("bytelm",)),
    "q-bert": allocations("eigenvalue", ("bytelm",)),
    "bfloat16": half_precision,
    "gradient-ptq": what_matters,
    "qfx": binary_points,
}
