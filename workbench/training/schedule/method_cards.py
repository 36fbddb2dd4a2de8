"""Method cards of learning-rate schedules and of budgets."""

from __future__ import annotations

from workbench.names import Method

METHODS: list[Method] = [
    Method(
        "rex",
        "training",
        "REX schedule",
        "Chen, Wolfe & Kyrillidis 2022",
        r"\eta_t = \eta_0 \frac{1 - t/T}{1/2 + (1 - t/T)/2}",
        "a step budget",
        "best average rank among common schedules over budgets",
        181,
        recipe=(("train", {"schedule": "rex", "start": "random"}),),
    ),
    Method(
        "uba",
        "training",
        "Unified budget-aware schedule",
        "Tang et al. 2025",
        r"\eta_t = \eta \frac{2(1+\cos \pi t/T)}{2\varphi + (2-\varphi)(1+\cos \pi t/T)}",
        "a step budget",
        "beats the commonly used schedules at every budget",
        173,
        recipe=(("train", {"schedule": "uba", "schedule.phi": 0.5, "start": "random"}),),
    ),
    Method(
        "power",
        "training",
        "Power schedule",
        "Shen et al. 2024",
        r"\eta(n) = \min(\eta_{max}, \beta a n^b)",
        "tokens per step and batch size",
        "one setting for every batch size and token count",
        117,
        recipe=(
            (
                "train",
                {
                    "schedule": "power",
                    "schedule.batch": 32,
                    "schedule.tokens": 8192.0,
                    "schedule.a": 1.79,
                    "schedule.b": -0.7,
                    "learning_rate": 0.04,
                    "start": "random",
                },
            ),
        ),
        subject="bytelm",
        departs="Without muP: the peak learning rate is that of one model size.",
    ),
    Method(
        "infinite",
        "training",
        "Infinite schedule",
        "Singh et al. 2025",
        r"cool down to \eta_c, hold, anneal \eta_c (\eta_{min}/\eta_c)^q",
        "nothing: no budget",
        "continual pre-training without re-warming: less forgetting at an equal or lower loss",
        328,
        recipe=(("train", {"schedule": "infinite", "start": "random"}),),
    ),
    Method(
        "rewarm",
        "training",
        "Re-warming for continual pre-training",
        "Gupta et al. 2023",
        r"\eta: 0 \to \eta_{max} \text{ over } w T, \text{ then cosine to } \eta_{max}/10",
        "a checkpoint and its optimizer's rate",
        "warm-up length hardly matters, a larger peak is better downstream and worse upstream, "
        "and both beat training from scratch",
        340,
        recipe=(("train", {"schedule": "cosine", "schedule.final": 0.1, "warmup": 0.1}),),
        subject="bytelm",
        departs="Every phase starts with an empty optimizer: the moments that the checkpoint was trained "
        "with are not carried over.",
    ),
    Method(
        "reference-time",
        "training",
        "Reference system time",
        "Kaddour et al. 2023",
        r"RST = \sum_t \text{seconds of step } t \text{ on the reference machine}",
        "the time of a step on one machine",
        "gains over an undecayed baseline vanish against one that decays within the budget",
        349,
        recipe=(("optimizer-comparison", {"equal": "time", "optimizers": ["adamw", "lion", "sophia"]}),),
        departs="Optimizers alone are compared, without layer stacking, selective backpropagation or RHO "
        "loss, by the time of a step on this machine.",
    ),
    Method(
        "budgeted-decay",
        "training",
        "Decay to zero at the budget",
        "Izsak, Berchansky & Levy 2021; Kaddour et al. 2023",
        r"\eta(\text{budget}) = 0",
        "a budget of steps or seconds",
        "decaying within the budget beats a constant rate and a schedule too long for it",
        321,
        recipe=(("train", {"schedule": "linear", "warmup": 0.0, "start": "random"}),),
        departs="The budget is in steps: a schedule over seconds is `TimeBudgetLR` in Python alone, and "
        "the paper's masked language model is not trained.",
    ),
    Method(
        "step-law",
        "training",
        "Step law",
        "Li et al. 2025",
        r"\eta^* = c N^{-x} D^{y}, \; B^* = k D^{z}",
        "a grid of small runs",
        "best learning rate falls with size; loss is convex in (log lr, log batch) with a wide plateau",
        20,
        recipe=(
            (
                "learning-rate-batch-size",
                {"learning_rate_low": 0.001, "learning_rate_high": 0.064, "learning_rate_points": 7},
            ),
        ),
    ),
]
