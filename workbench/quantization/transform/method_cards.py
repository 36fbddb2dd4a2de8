"""Method cards of transforms of a layer's inputs."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "teq",
        "quantization",
        "TEQ: trainable equivalent transformation",
        "Cheng et al. 2023",
        r"Y = Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1}X",
        "calibration inputs, gradients",
        "lower loss than nearest rounding at 3 bits",
        387,
        recipe=(("quantize", {"transform": "teq", "format": "int3"}),),
    ),
    Method(
        "outliertune",
        "quantization",
        "OutlierTune: static channel-wise activation scales",
        "Wang et al. 2024",
        r"s_k = (\max_k - \min_k)/(2^b - 1)",
        "calibration inputs",
        "lower loss than one activation scale a tensor at 6 bits",
        327,
        recipe=(
            (
                "quantize",
                {
                    "activations": "channel",
                    "format": "int8",
                    "granularity": "channel",
                    "activations.format": "int6",
                },
            ),
        ),
    ),
    Method(
        "flatquant",
        "quantization",
        "FlatQuant: learned Kronecker transforms",
        "Sun et al. 2025",
        r"Q(X P)\,Q(P^{-1}W^\top),\ P = P_1 \otimes P_2",
        "calibration inputs, gradients",
        "lower loss than an online Hadamard rotation, 4-bit weights and activations",
        310,
        recipe=(
            (
                "quantize",
                {
                    "format": "int4",
                    "granularity": "channel",
                    "activations": "token",
                    "activations.format": "int4",
                    "transform": "flatquant",
                },
            ),
        ),
    ),
    Method(
        "resq",
        "quantization",
        "ResQ: an eighth of principal coordinates in 8 bits",
        "Saxena et al. 2025",
        r"U = [P_l R_l,\ P_h R_h]",
        "calibration inputs",
        "lower loss than keeping an eighth of the features wide after a Hadamard rotation, "
        "4-bit weights and activations",
        357,
        recipe=(
            (
                "quantize",
                {
                    "format": "int4",
                    "granularity": "channel",
                    "activations": "token",
                    "activations.format": "int4",
                    "transform": "resq",
                    "activations.wide_share": 0.125,
                },
            ),
        ),
    ),
]
