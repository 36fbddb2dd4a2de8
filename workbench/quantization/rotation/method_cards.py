"""Method cards of rotations folded into the model."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "quarot",
        "quantization",
        "QuaRot: Hadamard rotation, folded into the stream, online before its writers",
        "Ashkboos et al. 2024",
        r"W R^\top, R W",
        "nothing",
        "lower loss than none with 4-bit weights and activations",
        None,
        recipe=(
            ("rotate", {"kind": "hadamard"}),
            (
                "quantize",
                {
                    "format": "int4",
                    "granularity": "channel",
                    "rounding": "gptq",
                    "transform": "hadamard",
                    "transform.only": "*.o_proj,*.down_proj",
                    "activations": "token",
                    "activations.format": "int4",
                },
            ),
        ),
        subject="bytelm",
        departs="Keys are not rotated, and keys and values not rounded.",
    ),
    Method(
        "spinquant",
        "quantization",
        "SpinQuant: rotations learned on the Stiefel manifold",
        "Liu et al. 2025",
        r"R' = (I + \tfrac{a}{2}Y)^{-1}(I - \tfrac{a}{2}Y)R,\ Y = \hat G - \hat G^\top",
        "calibration inputs, gradients",
        "lower loss than the Hadamard rotation it starts from, 4-bit weights and activations",
        385,
        recipe=(
            ("rotate", {"kind": "learned", "kind.online": True}),
            (
                "quantize",
                {
                    "format": "int4",
                    "granularity": "channel",
                    "rounding": "gptq",
                    "transform": "hadamard",
                    "transform.only": "*.down_proj",
                    "activations": "token",
                    "activations.format": "uint4",
                },
            ),
        ),
        subject="bytelm",
        departs="Keys are not rotated, and keys and values not rounded; 50 steps, the authors take 100.",
    ),
]
