"""Method cards of what trains through a rounding beside a teacher."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "fbi-llm",
        "quantization",
        "FBI-LLM: binary from random weights by autoregressive distillation",
        "Ma, Sun, Shen 2024",
        r"\tilde W = \alpha\,\mathrm{sign}(W) + \beta;\ -\tfrac1n\sum_i\sum_c p_T(c \mid x_{<i})\log p(c "
        r"\mid x_{<i})",
        "training, a teacher",
        "binary from random weights, equal steps: the teacher's distribution alone gives a lower loss on "
        "the text than the text itself",
        252,
        recipe=(("train-quantized", {"method": "fbi", "distillation": 1.0, "from_scratch": True}),),
        subject="bytelm",
    ),
    Method(
        "edgeqat",
        "quantization",
        "EdgeQAT: informative queries and keys, the teacher's attention maps",
        "Shen et al. 2024",
        r"-\log\sum\log(1 + \mathrm{var}\,q) + \log(1 + \mathrm{var}\,k);\ 1 - \cos(A, "
        r"A_T);\ 8\ \mathrm{or}\ b\ \mathrm{bits\ by}\ q_t \cdot k_0",
        "training, a teacher, transformers' attention interface",
        "4-bit weights, inputs and attention, equal steps: "
        "the two terms give a lower loss and nearer maps than distillation alone",
        80,
        recipe=(
            (
                "train-quantized",
                {
                    "method": "lsq",
                    "method.bits": 4,
                    "activation_bits": 4,
                    "rounded_attention": True,
                    "distillation": 0.5,
                    "temperature": 2.0,
                    "entropy": 0.5,
                    "attention_match": 1.0,
                },
            ),
        ),
        subject="bytelm",
    ),
    Method(
        "bipft",
        "quantization",
        "BiPFT: low-rank estimates of what binary attention loses",
        "Xing et al. 2024",
        r"Q_bK_b^\top + Q_bR_k^\top + R_qK_b^\top + R_qR_k^\top,\ A_b(V_b + R_v)",
        "training, transformers' attention interface",
        "binary weights, inputs and attention, equal steps from a dense model: "
        "estimates of rank 1 give a lower loss than none",
        193,
        recipe=(("train-quantized", {"method": "bipft", "method.rank": 1}),),
    ),
]
