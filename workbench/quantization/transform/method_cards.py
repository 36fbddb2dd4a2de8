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
        departs="Every layer learns a scale of its own on its own output and keeps it online, where "
        "the authors learn one a norm on the model's loss and fold it.",
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
                    "transform": "smooth",
                    "transform.alpha": 1.0,
                    "activations": "channel",
                    "format": "int8",
                    "granularity": "channel",
                    "activations.format": "uint6",
                },
            ),
        ),
        departs="A feature's scale is its largest magnitude, not its range, and stays online, where "
        "the authors fold it into the norm; zero points stay a feature's own.",
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
                    "activations.format": "uint4",
                    "transform": "flatquant",
                },
            ),
        ),
        departs="Every layer learns a P of its own on its own output and clips by the grid's rule, "
        "where the authors share P among the layers that read a norm, learn clipping "
        "thresholds on the blocks' outputs and turn keys and values as well.",
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
                    "activations.format": "uint4",
                    "transform": "resq",
                    "activations.wide_share": 0.125,
                    "salient": "columns",
                    "salient.share": 0.125,
                    "salient.bits": 8,
                },
            ),
        ),
        departs="Every layer is turned online by a dense matrix of its own, which counts in its size, "
        "and rounded to the nearest; the authors fold one rotation into the stream, turn "
        "down-projections by blocked Hadamard matrices, keys and values by head, and round "
        "with GPTQ.",
    ),
]
