"""The training methods of the catalog: what each is, where it is from, what its source claims, and how it was checked here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.instruments import Method, Progress


def _measured(function: str) -> Callable[[str, Progress], dict[str, Any]]:
    """The measurement, imported only when somebody runs it."""

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        from workbench.training import evidence

        return getattr(evidence, function)(name, progress)

    return measure


def _card(name: str, row: int | None, title: str, source: str, formula: str, needs: str, claim: str, measure: str = "") -> Method:
    return Method(name=name, family="training", title=title, source=source, formula=formula, needs=needs, claim=claim, row=row,
                  measure=_measured(measure) if measure else None)  # fmt: skip


CARDS = [
    _card(
        "rex",
        181,
        "REX schedule",
        "Chen, Wolfe & Kyrillidis 2022",
        r"\eta_t = \eta_0 \frac{1 - t/T}{1/2 + (1 - t/T)/2}",
        "a step budget",
        "best average rank among common schedules over budgets",
        "schedule",
    ),
    _card(
        "uba",
        173,
        "Unified budget-aware schedule",
        "Tang et al. 2025",
        r"\eta_t = \eta \frac{2(1+\cos \pi t/T)}{2\varphi + (2-\varphi)(1+\cos \pi t/T)}",
        "a step budget",
        "beats the commonly used schedules at every budget",
        "schedule",
    ),
    _card(
        "power",
        117,
        "Power schedule",
        "Shen et al. 2024",
        r"\eta(n) = \min(\eta_{max}, \beta a n^b)",
        "tokens per step and batch size",
        "one setting for every batch size and token count",
    ),
    _card(
        "infinite",
        328,
        "Infinite schedule",
        "Singh et al. 2025",
        r"cool down to \eta_c, hold, anneal \eta_c (\eta_{min}/\eta_c)^q",
        "nothing: no budget",
        "continual pre-training without re-warming",
    ),
    _card(
        "budgeted-decay",
        321,
        "Decay to zero at the budget",
        "Izsak, Berchansky & Levy 2021; Kaddour et al. 2023",
        r"\eta(\text{budget}) = 0",
        "a budget of steps or seconds",
        "decaying within the budget beats a constant rate and a schedule too long for it",
        "budgeted_decay",
    ),
    _card(
        "lamb",
        6,
        "LAMB",
        "You et al. 2020",
        r"w \leftarrow w - \eta \phi(\|w\|) / \|u\| \, u",
        "nothing beyond Adam's state",
        "smaller degradation than AdamW at the largest batch",
        "lamb",
    ),
    _card(
        "muon",
        28,
        "Muon",
        "Jordan et al. 2024; Wen et al. 2025",
        r"w \leftarrow w - \eta s \, \mathrm{NS}(g + \mu m)",
        "matrices; AdamW for the rest",
        "lower loss than AdamW at equal tuning",
        "optimizer",
    ),
    _card(
        "soap",
        28,
        "SOAP",
        "Vyas et al. 2024; Wen et al. 2025",
        r"Adam in the eigenbasis of \overline{GG^T}, \overline{G^TG}",
        "two square matrices per weight",
        "lower loss than AdamW at equal tuning",
        "optimizer",
    ),
    _card(
        "lion",
        28,
        "Lion",
        "Chen et al. 2023; Wen et al. 2025",
        r"w \leftarrow w - \eta (\mathrm{sign}(\beta_1 m + (1-\beta_1) g) + \lambda w)",
        "one moment",
        "lower loss than AdamW with half the state",
        "optimizer",
    ),
    _card(
        "galore",
        332,
        "GaLore",
        "Zhao et al. 2024",
        r"w \leftarrow w - \eta \alpha P \,\mathrm{Adam}(P^T g)",
        "an SVD of the gradient every few hundred steps",
        "loss within a few per cent of Adam with much less optimizer state",
        "galore",
    ),
    _card(
        "muon-soft-cap",
        26,
        "Muon with a spectral soft cap",
        "Newhouse et al. 2025",
        r"\sigma \to y + a y^3, \; y = \sigma - a \sigma^3",
        "Muon; a cap per matrix",
        "an enforced Lipschitz bound at little cost in accuracy",
        "lipschitz",
    ),
    _card(
        "ghost-batch-norm",
        109,
        "Ghost batch norm and regime adaptation",
        "Hoffer, Hubara & Soudry 2017",
        r"batch norm over ghosts; \eta_L = \sqrt{B_L/B_S} \eta_S",
        "batch norm",
        "closes the generalisation gap of large batches step by step",
        "ghost_batch_norm",
    ),
    _card(
        "adadagrad",
        116,
        "Norm-test batch growth (AdAdaGrad)",
        "Lau et al. 2024",
        r"B \leftarrow \lceil \mathrm{Var}_i(\nabla l_i) / (\eta^2 \|g_B\|^2) \rceil",
        "per-example gradients of a sample",
        "fewer updates than a small fixed batch at the same accuracy",
        "adadagrad",
    ),
    _card(
        "noise-scale",
        140,
        "Gradient noise scale and critical batch",
        "McCandlish et al. 2018; Su et al. 2024",
        r"B_{simple} = \mathrm{tr}\,\Sigma / |G|^2",
        "gradients of several batches",
        "the noise scale predicts the critical batch of the steps-to-target hyperbola",
        "noise",
    ),
    _card(
        "step-law",
        20,
        "Step law",
        "Li et al. 2025",
        r"\eta^* = c N^{-x} D^{y}, \; B^* = k D^{z}",
        "a grid of small runs",
        "best learning rate falls with size; loss is convex in (log lr, log batch) with a wide plateau",
        "step_law_surface",
    ),
    _card(
        "weight-standardization",
        148,
        "Weight standardization",
        "Qiao et al. 2019",
        r"\hat W = (W - \mu_W) / \sigma_W",
        "nothing; a change on the weight",
        "lets group norm match batch norm at micro-batches of one or two",
    ),
]
