"""Method cards of what trains through a rounding."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "lsq",
        "quantization",
        "LSQ: learned step size",
        "Esser et al. 2020",
        r"s\,\mathrm{round}(\mathrm{clip}(w/s))",
        "training",
        "lower loss than rounding after as many steps",
        None,
        recipe=(("train-quantized", {"method": "lsq", "method.bits": 2}),),
        departs="Inputs are not rounded, nor is a step of theirs learned.",
    ),
    Method(
        "trilm",
        "quantization",
        "TriLM: ternary training",
        "Kaushal et al. 2024",
        r"\gamma\,\mathrm{round}(\mathrm{clip}(W/\gamma)),\ \gamma = \mathrm{mean}|W|",
        "training",
        "lower loss than rounding to ternary after as many steps",
        197,
        recipe=(("train-quantized", {"method": "ternary"}),),
        departs="One model and one linear rate without decay, where the source halves the peak rate "
        "midway, drops weight decay for the last third and fits a family of sizes.",
    ),
    Method(
        "continual-qat",
        "quantization",
        "When to switch from full precision to ternary",
        "Nielsen et al. 2025",
        r"W + \lambda_t (Q(W) - W)",
        "training",
        "an interior switch point is best",
        192,
        recipe=(
            (
                "train-quantized",
                {"method": "ternary", "from_scratch": True, "switch_at": 0.2, "learning_rate": 0.003},
            ),
        ),
        subject="bytelm",
        departs="Inputs stay as they are unless `--activation-bits 8` is given, and one linear decay "
        "of the rate spans both phases.",
    ),
    Method(
        "nipq",
        "quantization",
        "NIPQ: training with noise in the rounding's place",
        "Shin et al. 2023",
        r"\mathrm{clip}(x; -\alpha, \alpha) + \Delta n",
        "training",
        "lower loss than LSQ at 3 bits after as many steps",
        356,
        recipe=(("train-quantized", {"method": "nipq", "method.settle": 0.2}),),
        departs="Noise is uniform, widths are real numbers and weights alone have them, where the "
        "authors draw from the layer's own rounding errors and round widths as they train.",
    ),
    Method(
        "csq",
        "quantization",
        "CSQ: bit planes that close by themselves",
        "Xiao et al. 2023",
        r"\frac{s}{2^n-1}\sum_b (f(m_p^b) - f(m_n^b)) f(m_B^b) 2^b",
        "training",
        "lower loss than LSQ at 3 bits after as many steps",
        276,
        recipe=(("train-quantized", {"method": "csq", "method.strength": 0.3, "method.settle": 0.2}),),
        departs="A row has a scale of its own, where the source has one a layer, and a closed plane between "
        "open ones still costs its bit; that gates grow sharp anew in the second phase is derived here.",
    ),
    Method(
        "fliqs",
        "quantization",
        "FLIQS: a format policy learned while training",
        "Dotzel et al. 2024",
        r"-(r - b)\log\pi(f)",
        "training",
        "lower loss than LSQ at 3 bits after as many steps, with formats int2, int3, int4 and e2m1",
        369,
        recipe=(
            ("train-quantized", {"method": "fliqs", "method.formats": ["int2", "int3", "int4", "e2m1"]}),
        ),
        departs="The reward is the batch's loss and grids span the largest magnitude; shapes of the "
        "network are not searched.",
    ),
    Method(
        "l4q",
        "quantization",
        "L4Q: a low-rank term inside the learned rounding",
        "Jeon et al. 2024",
        r"s\,\mathrm{round}((W_0 + AB)/s)",
        "training",
        "lower loss than adapters beside a rounded weight, merged and rounded, at 2 bits",
        335,
        recipe=(("train-quantized", {"method": "l4q", "method.bits": 2}),),
        departs="The grid has no learned offset; low-rank terms learn at ten times the rate in place "
        "of their scale.",
    ),
    Method(
        "bibert",
        "quantization",
        "BiBERT's balanced binary weights, with binary inputs",
        "Qin et al. 2022",
        r"\alpha\,\mathrm{sign}(W - \bar W)",
        "training",
        "accuracy above the commonest class with binary weights and inputs",
        8,
        recipe=(("train-quantized", {"method": "bibert", "learning_rate": 0.002}),),
        departs="Attention stays as it is, without Boolean maps, and nothing is distilled; embeddings "
        "are not binary.",
    ),
    Method(
        "halo",
        "quantization",
        "HALO: Hadamard rotations around quantized products of training",
        "Ashkboos, Nikdan, Tabesh et al. 2025",
        r"Q(XH)\,Q(WH)^\top,\ K^\top(Q(K E_Y)\,Q(W)),\ Q(E_Y)^\top Q(X)",
        "training",
        "int6 operands, equal steps and tuning: both levels of rotation end nearer to the full-precision "
        "loss than no rotation",
        221,
        recipe=(("train", {"precision": "int6 rotation 2", "start": "random"}),),
        departs="Rotations mix within blocks where a side is no power of two; products are simulated, "
        "without quantized communication.",
    ),
    Method(
        "double-rounding",
        "quantization",
        "Double rounding: one stored integer for every width",
        "Huang et al. 2025; the step's learning-rate scaling is derived here",
        r"W_l = \mathrm{clip}(\mathrm{round}(W_h / 2^{h-l})),\ s_l = 2^{h-l} s_h",
        "training",
        "accuracy within a point of separate LSQ trainings of as many steps in all at 8, 6 and 4 bits, and "
        "at 2 bits a lower loss than truncated 8-bit training",
        207,
        recipe=(("train-quantized", {"method": "double-rounding"}),),
    ),
    Method(
        "hasb",
        "quantization",
        "Widths drawn by Hessian trace while training",
        "after Huang et al. 2025 (HASB); the probabilities are derived here",
        r"p_l(b_k) \propto t_l\,k + (1 - t_l)(n + 1 - k)",
        "training, Hessian-vector products",
        "read at mixed widths of 4 bits on average, lower loss than after training all layers at one width "
        "in turn",
        207,
        recipe=(("train-quantized", {"method": "double-rounding", "method.switching": "by trace"}),),
    ),
    Method(
        "ptq-or-qat",
        "quantization",
        "Training through the rounding or rounding afterwards",
        "after Hasan 2024, whose claims are taken as questions",
        r"L_{QAT}(b) - L_{PTQ}(b)",
        "training",
        "a gap below 0.02 nats at 8 bits, which opens from 4 bits down",
        358,
        recipe=(("ptq-or-qat", {}),),
        departs="Widths are simulated: no latency is measured.",
    ),
    Method(
        "adapt",
        "quantization",
        "AdaPT: fixed-point words that grow and shrink in training",
        "Kummer et al. 2021",
        r"\min b: D_{KL}(h(W)\,\|\,h(Q_b(W))) \approx 0;\ \sum_k |g_k| / |\sum_k g_k|",
        "training",
        "loss within 1 % of training in float32, with words of fewer than 16 bits on average",
        220,
        recipe=(("train-quantized", {"method": "adapt"}),),
        departs="Look-back, bins and the rule for added bits stay fixed, weights alone are rounded, and "
        "there is no sparsifying loss.",
    ),
    Method(
        "qfx",
        "quantization",
        "QFX: trained binary points",
        "Dai et al. 2024",
        r"\mathrm{clip}(\mathrm{round}(w 2^f), -2^{b-1}, 2^{b-1}-1)\,2^{-f}",
        "training",
        "at 4 bits lower loss than one binary point for all tensors after as many dense steps",
        373,
        recipe=(("train-quantized", {"method": "fixed", "method.bits": 4}),),
        departs="Weights alone are in fixed point; inputs, norms and biases are not, and no integer "
        "simulator repeats the products.",
    ),
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
        departs="The student begins as the teacher itself, and maps are compared by 1 - cos, where "
        "the authors pre-train the student apart and add log cos.",
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
        departs="Binary training begins at a dense model, where the source pre-trains in binary.",
    ),
]
