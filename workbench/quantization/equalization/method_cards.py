"""Method cards of input scales folded into the model."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "awq",
        "quantization",
        "AWQ: activation-aware scales, folded, and clipped weights",
        "Lin et al. 2023",
        r"s = \mathrm{mean}|x|^\alpha,\ Q(W \mathrm{diag}(s)) (\mathrm{diag}(s)^{-1} x)",
        "calibration inputs",
        "lower loss than nearest rounding at 3 and 4 bits, groups of 128 with a zero point; clipping weighs "
        "columns by their inputs' energy, where the authors search on the outputs",
        None,
        recipe=(
            ("equalize", {"kind": "awq", "kind.format": "uint3"}),
            ("quantize", {"format": "uint3", "granularity": "group", "group_size": 128, "range": "mse"}),
        ),
        subject="bytelm",
    ),
    Method(
        "smoothquant",
        "quantization",
        "SmoothQuant",
        "Xiao et al. 2023",
        r"s_j = \max|x_j|^\alpha / \max|w_j|^{1-\alpha}",
        "calibration inputs",
        "lower loss than none with 8-bit weights and static 8-bit activations, a scale a tensor",
        None,
        recipe=(
            ("equalize", {"kind": "smoothquant"}),
            ("quantize", {"format": "int8", "granularity": "tensor", "activations": "tensor"}),
        ),
        subject="bytelm",
    ),
]
