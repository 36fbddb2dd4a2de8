"""Catalog cards of the quantization methods; `evidence.py` measures their claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.instruments import Method
from workbench.quantization import taught_cards
from workbench.quantization.evidence import (
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
from workbench.quantization.low_bit_evidence import binarised

FAMILY = "quantization"
NEAREST: dict[str, Any] = {"rounding": "nearest"}
FEW = {"steps": 60}
BLOCKS: dict[str, Any] = {"bits": 2, "rounding": "lowrank-adaround", "objective": "block", "steps": 200}
FOUR: dict[str, Any] = {"bits": 4, "granularity": "channel", "activations": "token", "activation_bits": 4}


def card(name: str, title: str, source: str, formula: str, needs: str, claim: str, measure: Callable[..., dict[str, Any]],
         row: int | None = None) -> Method:  # fmt: skip
    return Method(name=name, family=FAMILY, title=title, source=source, formula=formula, needs=needs, claim=claim, row=row, measure=measure)


CARDS = [
    card("gptq", "GPTQ: column-wise rounding with compensation", "Frantar, Ashkboos, Hoefler, Alistarh 2023",
         r"w_{j>i} \leftarrow w_{j>i} - (w_i - q_i)\,U_{ij}/U_{ii},\ U^\top U = (XX^\top)^{-1}", "calibration inputs",
         "lower loss than nearest rounding at 3 bits",
         against({"rounding": "gptq"}, NEAREST)),
    card("adaround", "Up or Down? Adaptive Rounding", "Nagel et al. 2020", r"W_q = s\,\mathrm{clip}(\lfloor W/s\rfloor + h(V))",
         "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"rounding": "adaround"} | FEW, NEAREST), 216),
    card("flexround", "FlexRound: element-wise division", "Lee et al. 2023", r"W_q = s_1\,\mathrm{round}(W / (s_1 \odot S_2 \odot s_3))",
         "calibration inputs, gradients", "lower loss than nearest rounding at 3 bits", against({"rounding": "flexround"} | FEW, NEAREST), 244),
    card("signround", "SignRound: offsets by signed gradient descent", "Cheng et al. 2023", r"W_q = s\,\mathrm{clip}(\mathrm{round}(W/s + z + V))",
         "calibration inputs, gradients", "lower loss than nearest rounding at 3 bits", against({"rounding": "signround"} | FEW, NEAREST), 295),
    card("adaquant", "AdaQuant: weights and step free", "Hubara et al. 2021", r"\min_{s,V}\|WX - Q_s(W+V)X\|^2", "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"rounding": "adaquant"} | FEW, NEAREST, ("bytelm",)), 309),
    card("hqq", "Half-quadratic quantization", "Badri and Shaji 2023", r"\min_z \|W - s(Q(W) - z)\|_p^p,\ p = 0.7", "nothing",
         "lower loss than nearest rounding with a zero point at 3 bits", against({"rounding": "hqq", "symmetric": False}, {"symmetric": False})),
    card("awq", "AWQ: activation-aware scaling", "Lin et al. 2023", r"s = \mathrm{rms}(x)^\alpha,\ Q(W s) s^{-1}", "calibration inputs",
         "lower loss than nearest rounding at 3 bits", against({"transform": "awq"}, NEAREST)),
    card("teq", "TEQ: trainable equivalent transformation", "Cheng et al. 2023", r"Y = Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1}X",
         "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"transform": "teq"} | FEW, NEAREST, ("bytelm",)), 387),
    card("smoothquant", "SmoothQuant", "Xiao et al. 2023", r"s_j = \max|x_j|^\alpha / \max|w_j|^{1-\alpha}", "calibration inputs",
         "lower loss than none with 8-bit weights by channel and 6-bit activations by tensor",
         against({"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6, "transform": "smooth"},
                 {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6}, test_examples=ROUNDED_INPUTS)),
    card("quarot", "QuaRot: folded Hadamard rotation of the residual stream", "Ashkboos et al. 2024", r"W R^\top, R W", "nothing",
         "lower loss than none with 4-bit weights and activations", rotations),
    card("outliertune", "OutlierTune: static channel-wise activation scales", "Wang et al. 2024", r"s_k = (\max_k - \min_k)/(2^b - 1)",
         "calibration inputs",
         "lower loss than one activation scale a tensor at 6 bits",
         against({"bits": 8, "granularity": "channel", "activations": "channel", "activation_bits": 6},
                 {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6}, test_examples=ROUNDED_INPUTS), 327),
    card("clipping-search", "Clipping by least squared error", "the scale search of PACT- and OMSE-style quantizers",
         r"\min_s \|W - Q_s(W)\|_F^2", "calibration inputs",
         "lower loss than the largest magnitude at 3 bits", against({"range": "mse"}, NEAREST)),
    card("asymmetric-calibration", "Calibration on the quantized prefix", "Nagel et al. 2020, section 3.4", r"\min_Q \|W X - Q \hat X\|^2",
         "calibration inputs",
         "GPTQ against the dense output on quantized inputs has lower loss than GPTQ on dense inputs at 2 bits",
         against({"rounding": "gptq", "bits": 2, "range": "mse", "sequential": True}, {"rounding": "gptq", "bits": 2, "range": "mse"}, ("bytelm",))),
    card("hawq-v2", "HAWQ-V2: trace-weighted allocation", "Dong et al. 2020",
         r"\Omega = \sum_l \frac{\mathrm{Tr}(H_l)}{n_l}\|Q(W_l) - W_l\|^2", "Hessian-vector products",
         "at an average of 3 bits lower loss than uniform, random and reversed allocations", allocations("trace"), 348),
    card("curvature-allocation", "Integer program over exact second-order costs", "Yao et al. 2021 (HAWQ-V3), with d.Hd in place of the trace",
         r"\min_c \sum_l \tfrac12 \delta_l^\top H_l \delta_l", "Hessian-vector products",
         "at an average of 3 bits lower loss than uniform, random and reversed allocations",
         allocations("curvature"), 266),
    card("fp8", "FP8 formats E4M3 and E5M2", "Micikevicius et al. 2022", r"(-1)^s 2^{e-b} 1.m", "nothing",
         "E4M3 has less noise than E5M2 on weights and activations",
         number_formats, 308),
    card("nf4", "NF4: the quantiles of a normal", "Dettmers et al. 2023", r"q_i = \Phi^{-1}(p_i)/\max", "nothing",
         "lower loss than symmetric int4 in groups of 64",
         against({"format": "nf4"}, {"bits": 4}), 74),
    card("minifloats", "Low-precision minifloats", "Aggarwal et al. 2024", "ExMy without special codes", "nothing",
         "E2M1 has lower loss than symmetric int4 in groups of 64", against({"format": "e2m1"}, {"bits": 4}), 284),
    card("lsq", "LSQ: learned step size", "Esser et al. 2020", r"s\,\mathrm{round}(\mathrm{clip}(w/s))", "training",
         "lower loss than rounding after as many steps",
         trained("lsq", 2)),
    card("trilm", "TriLM: ternary training", "Kaushal et al. 2024",
         r"\gamma\,\mathrm{round}(\mathrm{clip}(W/\gamma)),\ \gamma = \mathrm{mean}|W|", "training",
         "lower loss than rounding to ternary after as many steps", trained("ternary", 2), 197),
    card("continual-qat", "When to switch from full precision to ternary", "Nielsen et al. 2025", r"W + \lambda_t (Q(W) - W)", "training",
         "an interior switch point is best", switch_over, 192),
    card("interactions", "Inter-layer terms in the allocation", "after Schaefer et al. 2023; the terms are derived here", r"\sum_{ij} \tfrac12 \delta_i^\top H_{ij} \delta_j",
         "Hessian-vector products", "at an average of 3 bits lower loss than the additive integer program", interactions, 307),
    card("cbq", "CBQ: blocks learned in a sliding window", "Ding et al. 2025", r"\|h - h_q\|^2 + D_{KL}(\sigma(h)\,\|\,\sigma(h_q))", "calibration inputs, gradients",
         "lower loss than learning block by block at 2 bits",
         against(BLOCKS | {"window": 2}, BLOCKS, ("digits-vit",)), 329),
    card("spinquant", "SpinQuant: rotations learned on the Stiefel manifold", "Liu et al. 2025",
         r"R' = (I + \tfrac{a}{2}Y)^{-1}(I - \tfrac{a}{2}Y)R,\ Y = \hat G - \hat G^\top", "calibration inputs, gradients",
         "lower loss than the Hadamard rotation it starts from, 4-bit weights and activations", learned_rotations, 385),
    card("flatquant", "FlatQuant: learned Kronecker transforms", "Sun et al. 2025", r"Q(X P)\,Q(P^{-1}W^\top),\ P = P_1 \otimes P_2",
         "calibration inputs, gradients", "lower loss than an online Hadamard rotation, 4-bit weights and activations",
         against(FOUR | {"transform": "flatquant"} | FEW, FOUR | {"transform": "hadamard"}, ("bytelm",), ROUNDED_INPUTS), 310),
    card("resq", "ResQ: an eighth of principal coordinates in 8 bits", "Saxena et al. 2025", r"U = [P_l R_l,\ P_h R_h]", "calibration inputs",
         "lower loss than keeping an eighth of the features wide after a Hadamard rotation, 4-bit weights and activations",
         against(FOUR | {"transform": "resq", "wide_share": 0.125}, FOUR | {"transform": "hadamard", "wide_share": 0.125}, ("bytelm",), ROUNDED_INPUTS), 357),
    card("loftq", "LoftQ: alternating rounding and low-rank fit", "Li et al. 2024", r"\min \|W - Q - AB^\top\|_F", "nothing",
         "lower loss than a zero low-rank term (QLoRA's start) at 2 bits, before any training",
         against({"bits": 2, "adapter_rank": 8}, {"bits": 2, "adapter_rank": 8, "adapter_steps": 0}, ("bytelm",)), 345),
    card("nipq", "NIPQ: training with noise in the rounding's place", "Shin et al. 2023", r"\mathrm{clip}(x; -\alpha, \alpha) + \Delta n", "training",
         "lower loss than LSQ at 3 bits after as many steps", compared({"method": "nipq", "budget": 3.0}, {"method": "lsq", "bits": 3}), 356),
    card("csq", "CSQ: bit planes that close by themselves", "Xiao et al. 2023",
         r"\frac{s}{2^n-1}\sum_b (f(m_p^b) - f(m_n^b)) f(m_B^b) 2^b", "training",
         "lower loss than LSQ at 3 bits after as many steps", compared({"method": "csq", "budget": 3.0, "strength": 0.3}, {"method": "lsq", "bits": 3}), 276),
    card("fliqs", "FLIQS: a format policy learned while training", "Dotzel et al. 2024", r"-(r - b)\log\pi(f)", "training",
         "lower loss than LSQ at 3 bits after as many steps, with formats int2, int3, int4 and e2m1",
         compared({"method": "fliqs", "budget": 3.0, "formats": ["int2", "int3", "int4", "e2m1"]}, {"method": "lsq", "bits": 3}), 369),
    card("l4q", "L4Q: a low-rank term inside the learned rounding", "Jeon et al. 2024", r"s\,\mathrm{round}((W_0 + AB)/s)", "training",
         "lower loss than adapters beside a rounded weight, merged and rounded, at 2 bits", merged, 335),
    card("bibert", "BiBERT's balanced binary weights, with binary inputs", "Qin et al. 2022", r"\alpha\,\mathrm{sign}(W - \bar W)", "training",
         "accuracy above the commonest class with binary weights and inputs", above_majority, 8),
    *taught_cards.CARDS,
    card("ptq1.61", "PTQ1.61: salient input features, the rest binary with learned scales", "Zhao et al. 2025",
         r"r_i c_j(\alpha_i\,\mathrm{sign}(w_{ij} - \mu_i) + \mu_i),\ \min \sum_t \|h_t - h_q\|^2 - \log\cos(h_t, h_q)", "calibration inputs, gradients",
         "every step lowers the loss (salient columns, learned scales, restored weights), columns beat single weights at equal bits, and the learned scales "
         "nearest rounding to 2 bits", binarised, 374),
]  # fmt: skip
