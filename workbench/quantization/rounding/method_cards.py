"""Method cards of rounding after training."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "gptq",
        "quantization",
        "GPTQ: column-wise rounding with compensation",
        "Frantar, Ashkboos, Hoefler, Alistarh 2023",
        r"w_{j>i} \leftarrow w_{j>i} - (w_i - q_i)\,U_{ij}/U_{ii},\ U^\top U = (XX^\top)^{-1}",
        "calibration inputs",
        "lower loss than nearest rounding at 3 bits",
        None,
        recipe=(("quantize", {"rounding": "gptq"}),),
    ),
    Method(
        "adaround",
        "quantization",
        "Up or Down? Adaptive Rounding",
        "Nagel et al. 2020",
        r"W_q = s\,\mathrm{clip}(\lfloor W/s\rfloor + h(V))",
        "calibration inputs, gradients",
        "lower loss than nearest rounding at 3 bits",
        216,
        recipe=(("quantize", {"rounding": "adaround"}),),
        departs="No activation function inside the objective; 300 steps of Adam at 0.05, where the "
        "authors take 20,000 at 0.001.",
    ),
    Method(
        "flexround",
        "quantization",
        "FlexRound: element-wise division",
        "Lee et al. 2023",
        r"W_q = s_1\,\mathrm{round}(W / (s_1 \odot S_2 \odot s_3))",
        "calibration inputs, gradients",
        "lower loss than nearest rounding at 3 bits",
        244,
        recipe=(("quantize", {"rounding": "flexround"}),),
    ),
    Method(
        "signround",
        "quantization",
        "SignRound: offsets by signed gradient descent",
        "Cheng et al. 2023",
        r"W_q = s\,\mathrm{clip}(\mathrm{round}(W/s + z + V))",
        "calibration inputs, gradients",
        "lower loss than nearest rounding at 3 bits",
        295,
        recipe=(("quantize", {"rounding": "signround"}),),
        departs="Layers are learned one by one, where the authors learn blocks (`--rounding.objective "
        "block`).",
    ),
    Method(
        "adaquant",
        "quantization",
        "AdaQuant: weights and step free",
        "Hubara et al. 2021",
        r"\min_{s,V}\|WX - Q_s(W+V)X\|^2",
        "calibration inputs, gradients",
        "lower loss than nearest rounding at 3 bits",
        309,
        recipe=(("quantize", {"rounding": "adaquant"}),),
        departs="The step of the inputs is not learned, and biases and norms are not tuned afterwards.",
    ),
    Method(
        "hqq",
        "quantization",
        "Half-quadratic quantization",
        "Badri and Shaji 2023",
        r"\min_z \|W - s(Q(W) - z)\|_p^p,\ p = 0.7",
        "nothing",
        "lower loss than nearest rounding with a zero point at 3 bits",
        None,
        recipe=(("quantize", {"rounding": "hqq", "format": "uint4"}),),
    ),
    Method(
        "asymmetric-calibration",
        "quantization",
        "Calibration on the quantized prefix",
        "Nagel et al. 2020, section 3.4",
        r"\min_Q \|W X - Q \hat X\|^2",
        "calibration inputs",
        "GPTQ against the dense output on quantized inputs has lower loss than GPTQ on dense inputs at 2 "
        "bits",
        None,
        recipe=(
            (
                "quantize",
                {
                    "rounding": "gptq",
                    "format": "int2",
                    "range": "mse",
                    "sequential": True,
                    "target": "outputs",
                },
            ),
        ),
        departs="The weight itself is replaced by its fit to the dense outputs and then rounded, "
        "where the source moves roundings by less than a step.",
    ),
    Method(
        "cbq",
        "quantization",
        "CBQ: blocks learned in a sliding window",
        "Ding et al. 2025",
        r"\|h - h_q\|^2 + D_{KL}(\sigma(h)\,\|\,\sigma(h_q))",
        "calibration inputs, gradients",
        "lower loss than learning block by block at 2 bits",
        329,
        recipe=(
            (
                "quantize",
                {
                    "format": "int2",
                    "rounding": "lowrank-adaround",
                    "rounding.objective": {"name": "block", "window": 2},
                },
            ),
        ),
        departs="The thin matrices move logits that begin at the weights' own remainders; outliers are "
        "neither truncated nor rescaled first, and inputs are not rounded.",
    ),
    Method(
        "gradient-ptq",
        "quantization",
        "What matters to learned roundings",
        "Yvinec et al. 2023",
        r"\min_\theta \|W X - Q_\theta(W) X\|^2",
        "calibration inputs, gradients",
        "what is learned moves the loss more than the size or the draw of the calibration set",
        301,
        recipe=(
            (
                "quantize",
                {
                    "format": "int3",
                    "granularity": "channel",
                    "rounding": "adaround",
                    "rounding.objective": "block",
                },
            ),
        ),
        departs="Of the paper's factors the rounding, layers or blocks, and the size and draw of the "
        "calibration set are varied; not the loss, the optimizer, the rounding's range, the "
        "source of the data or widths by importance.",
    ),
    Method(
        "loftq",
        "quantization",
        "LoftQ: alternating rounding and low-rank fit",
        "Li et al. 2024",
        r"\min \|W - Q - AB^\top\|_F",
        "nothing",
        "lower loss than a zero low-rank term (QLoRA's start) at 2 bits, before any training",
        345,
        recipe=(("quantize", {"format": "int2", "adapter": "loftq"}),),
        departs="The best pair of the alternations is kept, where the authors keep the last.",
    ),
    Method(
        "ptq1.61",
        "quantization",
        "PTQ1.61: salient input features, the rest binary with learned scales",
        "Zhao et al. 2025",
        r"r_i c_j(\alpha_i\,\mathrm{sign}(w_{ij} - \mu_i) + \mu_i),\ \min \sum_t \|h_t - h_q\|^2 - "
        r"\log\cos(h_t, h_q)",
        "calibration inputs, gradients",
        "every step lowers the loss (salient columns, learned scales, restored weights), columns beat "
        "single weights at equal bits, and the learned scales "
        "nearest rounding to 2 bits",
        374,
        recipe=(
            (
                "quantize",
                {
                    "format": "binary",
                    "range": "centred",
                    "granularity": "channel",
                    "salient": "columns",
                    "salient.share": 0.2,
                    "adapter": "qlora",
                },
            ),
            ("train-quantized", {"method": "adapters"}),
            (
                "quantize",
                {
                    "format": "binary",
                    "range": "centred",
                    "granularity": "channel",
                    "salient": "columns",
                    "salient.share": 0.2,
                    "rounding": "scales",
                    "rounding.objective": "block",
                },
            ),
        ),
        subject="bytelm",
        departs="Scales are learned as logarithms, 300 mini-batch steps at 0.01, where the authors "
        "take 20 epochs of 128 samples at 5e-4 and 1e-3.",
    ),
]
