"""Method cards of stored differences."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "bitdelta",
        "arithmetic",
        "BitDelta",
        "Liu et al. 2024",
        r"w_0 + \alpha\, \mathrm{sign}(d),\ \min_\alpha \|z - z(\alpha)\|^2",
        "a base and a fine-tune; calibration inputs for the scales",
        "one bit a weight keeps the fine-tune, where as many bits of singular vectors do not",
        228,
        recipe=(("delta", {"method": "bitdelta"}),),
        departs="Only the scales are distilled, as the paper says; the authors' code lets embeddings, norms "
        "and the head move as well.",
    ),
    Method(
        "compeft",
        "arithmetic",
        "ComPEFT",
        "Yadav et al. 2023",
        r"w_0 + \alpha\, \mathrm{std}(d)\, \mathrm{sign}(d)\, 1[|d| \text{ in the top } k]",
        "a base and a fine-tune; a validation split for the multiple",
        "ternary differences at an eighth of the bytes and less keep the fine-tune",
        397,
        recipe=(("delta", {"method": "compeft", "strengths": (0.5, 1.0, 2.0, 3.0, 4.0)}),),
        departs="The whole fine-tune's matrices are compressed, where the paper compresses adapters (give a "
        "merged one); multiples up to 4 are tried, where it tries up to 10.",
    ),
    Method(
        "delta-come",
        "arithmetic",
        "Delta-CoMe",
        "Ping et al. 2024",
        r"\sum_g Q_{b_g}(U_g) S_g Q_{b_g}(V_g)^T",
        "a base and a fine-tune; calibration inputs",
        "at the bytes of one bit a weight nearer to the fine-tune than BitDelta and low rank",
        343,
        recipe=(("delta", {"method": "delta-come"}),),
        departs="Inputs are those of the fine-tune and all matrices are rounded on them, where the authors "
        "go block after block on what the rounded ones give; columns keep their order.",
    ),
    Method(
        "random-drop",
        "arithmetic",
        "DARE, one difference stored",
        "Yu et al. 2024",
        r"w_0 + m \odot d / (1 - p)",
        "a base and a fine-tune",
        "nine tenths of a small difference can be left out",
        382,
        recipe=(("delta", {"method": "random-drop"}),),
        departs="What is left is stored in 16 bits.",
    ),
    Method(
        "graft",
        "arithmetic",
        "Grafting: skill localization",
        "Panigrahi et al. 2023",
        r"w_0 + \gamma \odot (w_1 - w_0),\ \gamma \text{ learned}",
        "a base and a fine-tune; gradients of the task",
        "a hundredth of the parameters carries most of what fine-tuning gained",
        316,
        recipe=(("delta", {"method": "graft"}),),
        departs="Logits of the mask begin at zero and the best mask has the least validation loss, where the "
        "authors draw them and take the sum of training and validation accuracy.",
    ),
]
