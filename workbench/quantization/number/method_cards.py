"""Method cards of number formats and of the numbers kept apart."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "clipping-search",
        "quantization",
        "Clipping by least squared error",
        "the scale search of PACT- and OMSE-style quantizers",
        r"\min_s \|W - Q_s(W)\|_F^2",
        "calibration inputs",
        "lower loss than the largest magnitude at 3 bits",
        None,
        recipe=(("quantize", {"range": "mse", "format": "int3"}),),
    ),
    Method(
        "fp8",
        "quantization",
        "FP8 formats E4M3 and E5M2",
        "Micikevicius et al. 2022",
        r"(-1)^s 2^{e-b} 1.m",
        "nothing",
        "E4M3 has less noise than E5M2 on weights and activations",
        308,
        recipe=(
            (
                "quantize",
                {
                    "format": "e4m3fn",
                    "granularity": "tensor",
                    "activations": "tensor",
                    "activations.format": "e4m3fn",
                },
            ),
        ),
    ),
    Method(
        "nf4",
        "quantization",
        "NF4: the quantiles of a normal",
        "Dettmers et al. 2023",
        r"q_i = \Phi^{-1}(p_i)/\max",
        "nothing",
        "lower loss than symmetric int4 in groups of 64",
        74,
        recipe=(("quantize", {"format": "nf4"}),),
        departs="A group's scale is a 16-bit float, without the source's second quantization of the scales.",
    ),
    Method(
        "minifloats",
        "quantization",
        "Low-precision minifloats",
        "Aggarwal et al. 2024",
        "ExMy without special codes",
        "nothing",
        "E2M1 has lower loss than symmetric int4 in groups of 64",
        284,
        recipe=(("quantize", {"format": "e2m1"}),),
        departs="Of the paper's pipeline bias correction, equalization across layers and the cost "
        "model of hardware are missing, and learned up-or-down rounding takes integers alone.",
    ),
    Method(
        "bfloat16",
        "quantization",
        "Training in bfloat16",
        "Kalamkar et al. 2019",
        r"u + \mathtt{7FFF}_{16} + (u \gg 16 \wedge 1)",
        "training",
        "differs from float32 by less than seeds differ",
        198,
        recipe=(("train", {"precision": "bf16", "start": "random"}),),
        departs="Training runs in torch's autocast, which chooses the operations that are narrowed, where "
        "the paper emulates them.",
    ),
    Method(
        "outlier-split",
        "quantization",
        "LLM.int8(): outlier features apart",
        "Dettmers et al. 2022",
        r"Q(X_{\setminus O})Q(W_{\setminus O}) + Q_8(X_O)Q_8(W_O)",
        "calibration inputs",
        "a sixteenth of the features apart: lower loss than none, 4-bit weights and activations",
        None,
        recipe=(
            (
                "quantize",
                {
                    "format": "int4",
                    "granularity": "channel",
                    "activations": "token",
                    "activations.format": "uint4",
                    "activations.wide_share": 0.0625,
                    "salient": "columns",
                    "salient.share": 0.0625,
                    "salient.bits": 8,
                },
            ),
        ),
        departs="Features are chosen by energy in calibration and both operands kept in 8 bits, where "
        "the authors choose by magnitude as inputs come and keep 16.",
    ),
]
