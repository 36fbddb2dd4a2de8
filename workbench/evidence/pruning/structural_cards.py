"""Catalog cards of the methods that remove heads, neurons, channels, layers and experts."""

from __future__ import annotations

import functools
from typing import Any

from workbench.catalog import Method
from workbench.evidence.pruning import structural_evidence as evidence

HN = {"pattern": "heads+neurons"}
HEAL = {"recovery": {"name": "low-rank", "steps": 40, "learning_rate": 2e-3}}
TUNE = {"recovery": {"name": "finetune", "steps": 60, "learning_rate": 1e-3}}
DISTIL = {"recovery": {"name": "distil", "steps": 24, "learning_rate": 1e-3, "batch_size": 4}}


def depth(sparsity: float, **more: Any) -> dict[str, dict[str, Any]]:
    """The same share of blocks, chosen in four ways."""
    shared = {"pattern": "layers", "sparsity": sparsity} | more
    return {
        "angular": shared | {"method": "deeper-layers"},
        "deepest": shared | {"method": "deeper-layers", "saliency": "deepest"},
        "random": shared | {"method": "random"},
    }


def healed(sparsity: float) -> dict[str, dict[str, Any]]:
    return {f"{label}, healed": fields | HEAL for label, fields in depth(sparsity).items()}


CARDS: list[Method] = [
    Method(
        "minitron",
        "pruning",
        "Minitron: width pruning with distillation",
        "Muralidharan et al. 2024",
        "channel: L2 over examples of the mean |norm output| over tokens, added up over norms",
        "calibration inputs, distillation",
        "half the channels: distilled better than fine-tuned, "
        "far better than the same size from random weights; importance better than random",
        64,
        evidence.minitron,
    ),
    Method(
        "minitron-depth",
        "pruning",
        "Minitron: depth pruning by Block Influence",
        "Muralidharan et al. 2024; Men et al. 2024",
        "BI_l = 1 - E[cos(x^l, x^l+1)]",
        "calibration inputs",
        "one block of three removed: Block Influence better than random and no worse than magnitude",
        64,
        functools.partial(
            evidence.compared,
            arms={
                "block influence": {"method": "minitron", "pattern": "layers", "sparsity": 0.33},
                "random": {"method": "random", "pattern": "layers", "sparsity": 0.33},
                "magnitude": {"method": "magnitude", "pattern": "layers", "sparsity": 0.33},
            },
            claims=[("block influence", "random"), ("block influence", "magnitude")],
        ),
    ),
    Method(
        "adapt-pruner",
        "pruning",
        "Adapt-Pruner",
        "Wang et al. 2025",
        "s_b = s - A (I_b - mean I) / max |I - mean I|, I_b = 1 - cos(input, output); units by Taylor score",
        "calibration gradients, fine-tuning",
        "half of heads and neurons: adaptive shares better than equal ones; "
        "five steps with training between better than one before it",
        84,
        functools.partial(
            evidence.compared,
            arms={
                "adaptive": HN | {"method": "adapt-pruner", "sparsity": 0.5},
                "equal shares": HN | {"method": "adapt-pruner", "sparsity": 0.5, "allocation": "layer"},
                "in five steps": HN
                | TUNE
                | {"method": "adapt-pruner", "sparsity": 0.5, "schedule": {"name": "linear", "events": 5}},
                "at once": HN | TUNE | {"method": "adapt-pruner", "sparsity": 0.5},
            },
            claims=[("adaptive", "equal shares"), ("in five steps", "at once")],
        ),
    ),
    Method(
        "deeper-layers",
        "pruning",
        "The unreasonable ineffectiveness of the deeper layers",
        "Gromov et al. 2024",
        "drop the n blocks from l on with the smallest arccos(cos(x^l, x^l+n)) / pi",
        "calibration inputs, low-rank healing",
        "the run of smallest angular distance is no worse than random or deepest blocks, "
        "and healing closes most of the gap",
        354,
        functools.partial(
            evidence.on_several,
            closes=("angular", "angular, healed"),
            parts={
                "digits-vit": {
                    "arms": depth(0.33) | healed(0.33),
                    "claims": [("angular", "random"), ("angular", "deepest"), ("angular, healed", "angular")],
                },
                "bytelm": {
                    "arms": depth(0.25)
                    | {
                        "angular, healed": depth(0.25)["angular"]
                        | HEAL
                        | {"recovery.steps": 20, "recovery.batch_size": 4}
                    },
                    "source": "bytelm",
                    "claims": [("angular", "random"), ("angular", "deepest"), ("angular, healed", "angular")],
                },
            },
        ),
    ),
    Method(
        "pat",
        "pruning",
        "PAT: pruning-aware tuning",
        "Liu et al. 2024",
        "y = s m (I + U V)(W x + b), m = sigmoid(T M) + c shared by all layers",
        "fine-tuning",
        "a quarter of the channels: better than pruning by activation and then as many steps of adapters "
        "with as many parameters",
        58,
        functools.partial(
            evidence.rates_compared,
            arms={
                "pat": {
                    "method": "pat",
                    "pattern": "channels",
                    "sparsity": 0.25,
                    "saliency.rank": 28,
                    "recovery": {"name": "low-rank", "steps": 60},
                },
                "prune, then adapters": {
                    "method": "minitron",
                    "pattern": "channels",
                    "sparsity": 0.25,
                    "recovery": {"name": "low-rank", "steps": 60},
                },
            },
            claims=[("pat", "prune, then adapters")],
        ),
    ),
    Method(
        "heapr",
        "pruning",
        "HEAPr: atomic experts",
        "Li et al. 2025",
        "s_k = 1/2 E[h_k^2] w_k^T E[g g^T] w_k",
        "calibration gradients",
        "25 % and 50 % of the experts' neurons: better than magnitude, random and whole experts; "
        "the scores predict the loss",
        31,
        evidence.heapr,
    ),
    Method(
        "premoe",
        "pruning",
        "PreMoe: experts for a task",
        "Pei et al. 2025",
        "TCESS_e = E[z_e 1(e in top K) 1(confidence >= r)]",
        "calibration inputs",
        "half of the experts: TCESS better than usage, random and other domains' patterns; "
        "queries find their pattern",
        86,
        evidence.premoe,
    ),
    Method(
        "slimmoe",
        "pruning",
        "SlimMoE: slimmer experts in stages",
        "Li et al. 2025",
        "experts' neurons by Taylor score, pruned and distilled in stages",
        "calibration gradients, distillation",
        "half of the experts' width: two stages better than one, and both better than half of the experts, "
        "equal steps",
        96,
        functools.partial(
            evidence.language_model,
            source="bytemoe",
            arms={
                "two stages": DISTIL
                | {
                    "method": "slimmoe",
                    "pattern": "neurons",
                    "sparsity": 0.5,
                    "schedule": {"name": "linear", "events": 2},
                    "saliency.gradients": 32,
                },
                "one stage": DISTIL
                | {"method": "slimmoe", "pattern": "neurons", "sparsity": 0.5, "saliency.gradients": 32},
                "half of the experts": DISTIL | {"method": "premoe", "pattern": "experts", "sparsity": 0.5},
            },
            claims=[("two stages", "one stage"), ("one stage", "half of the experts")],
        ),
    ),
    Method(
        "ziplm-minilm",
        "pruning",
        "ZipLM to measured speed-ups of a pretrained BERT",
        "Kurtic, Frantar and Alistarh 2023",
        "rho_S with a measured latency table",
        "calibration inputs",
        "1.5, 2 and 3 times faster on this CPU, within a tenth, "
        "and more accurate than magnitude and FLAP at the same target",
        94,
        evidence.speed_targets,
    ),
]
