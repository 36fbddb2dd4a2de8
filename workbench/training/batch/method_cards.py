"""Method cards of batch sizes, of what large batches need, and of normalisation."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "ghost-batch-norm",
        "training",
        "Ghost batch norm and regime adaptation",
        "Hoffer, Hubara & Soudry 2017",
        r"batch norm over ghosts; \eta_L = \sqrt{B_L/B_S} \eta_S",
        "batch norm",
        "closes the generalisation gap of large batches step by step",
        109,
        recipe=(
            (
                "train",
                {
                    "model_change": "ghost-batch-norm",
                    "batch_size": 256,
                    "optimizer": "sgd",
                    "learning_rate": 0.2,
                    "start": "random",
                },
            ),
        ),
    ),
    Method(
        "adadagrad",
        "training",
        "Norm-test batch growth (AdAdaGrad)",
        "Lau et al. 2024",
        r"B \leftarrow \lceil \mathrm{Var}_i(\nabla l_i) / (\eta^2 \|g_B\|^2) \rceil",
        "per-example gradients of a sample",
        "fewer updates than a small fixed batch at the same accuracy",
        116,
        recipe=(
            (
                "train",
                {
                    "optimizer": "adagrad",
                    "learning_rate": 0.05,
                    "schedule": "constant",
                    "warmup": 0.0,
                    "clip": 0.0,
                    "batch_size": 8,
                    "batch_rule": "norm-test",
                    "batch_rule.eta": 0.3,
                    "batch_rule.largest": 512,
                },
            ),
        ),
        departs="The variance is that of a sample of the batch just used, and a batch never shrinks; the "
        "coordinate-wise test and AdaGrad's norm variant are left out.",
    ),
    Method(
        "large-batch-accumulation",
        "training",
        "Large batches by accumulation",
        "Ott, Edunov, Grangier & Auli 2018",
        r"g = \frac{1}{k} \sum_{i=1}^k g_i, \; B = k b",
        "memory for one micro-batch",
        "large accumulated batches with a larger rate reach the loss in fewer steps, "
        "and fp16 needs loss scaling",
        278,
        recipe=(("train", {"batch_size": 128, "micro_batch": 8, "learning_rate": 0.032, "start": "random"}),),
    ),
    Method(
        "noise-scale",
        "training",
        "Gradient noise scale and critical batch",
        "McCandlish et al. 2018; Su et al. 2024",
        r"B_{simple} = \mathrm{tr}\,\Sigma / |G|^2",
        "gradients of several batches",
        "the noise scale predicts the critical batch of the steps-to-target hyperbola",
        140,
        recipe=(("gradient-noise", {"groups": 32, "size": 32}),),
    ),
    Method(
        "weight-standardization",
        "training",
        "Weight standardization",
        "Qiao et al. 2019",
        r"\hat W = (W - \mu_W) / \sigma_W",
        "nothing; a change on the weight",
        "lets group norm match batch norm at micro-batches of one or two",
        148,
        recipe=(
            (
                "train",
                {
                    "model_change": "weight-standardization",
                    "micro_batch": 2,
                    "optimizer": "sgd",
                    "learning_rate": 0.05,
                    "weight_decay": 0.0,
                    "start": "random",
                },
            ),
        ),
    ),
    Method(
        "concurrent-adversary",
        "training",
        "ConAdv",
        "Liu et al. 2022",
        r"\tfrac12 L(\theta_t; x) + \tfrac12 L(\theta_t; x + \epsilon\,\mathrm{sign} \nabla_x "
        r"L(\theta_{t-\tau}; x))",
        "a continuous input; the weights of a step ago",
        "at the largest batch at least the plain accuracy, as good as synchronous adversaries, and flatter",
        112,
        recipe=(
            (
                "train",
                {
                    "loss": "concurrent-adversary",
                    "batch_size": 512,
                    "optimizer": "lars",
                    "learning_rate": 4.0,
                    "start": "random",
                },
            ),
        ),
        departs="Clean and disturbed examples are normalised apart but share scale and shift, where "
        "AdvProp keeps norms of their own.",
    ),
    Method(
        "sqrt-rule",
        "training",
        "Square-root rule for Adam",
        "Granziol, Zohren & Roberts 2022",
        r"\eta^* \propto B^{1/2}",
        "a grid of learning rates and batch sizes",
        "Adam's best learning rate grows as the square root of the batch",
        115,
        recipe=(
            (
                "learning-rate-batch-size",
                {
                    "optimizer": "adamw",
                    "learning_rate_low": 0.002,
                    "learning_rate_high": 0.256,
                    "batch_sizes": (8, 16, 32, 64, 128),
                    "weight_decay": 0.0,
                },
            ),
        ),
    ),
]
