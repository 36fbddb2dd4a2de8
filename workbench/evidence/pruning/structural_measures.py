"""Measurements of what removes heads, neurons, channels, layers and experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from workbench.evidence.harness import compare
from workbench.evidence.pruning import structural_evidence as evidence
from workbench.progress import Progress

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


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "minitron": evidence.minitron,
    "minitron-depth": functools.partial(
        compare,
        arms={
            "block influence": {"method": "minitron", "pattern": "layers", "sparsity": 0.33},
            "random": {"method": "random", "pattern": "layers", "sparsity": 0.33},
            "magnitude": {"method": "magnitude", "pattern": "layers", "sparsity": 0.33},
        },
        claims=[("block influence", "random"), ("block influence", "magnitude")],
    ),
    "adapt-pruner": functools.partial(
        compare,
        arms={
            "adaptive": HN | {"method": "adapt-pruner", "sparsity": 0.5},
            "equal shares": HN | {"method": "adapt-pruner", "sparsity": 0.5, "allocation": "layer"},
            "in five steps": HN
            | TUNE
            | {
                "method": "adapt-pruner",
                "sparsity": 0.5,
                "sparsity_schedule": {"name": "linear", "events": 5},
            },
            "at once": HN | TUNE | {"method": "adapt-pruner", "sparsity": 0.5},
        },
        claims=[("adaptive", "equal shares"), ("in five steps", "at once")],
    ),
    "deeper-layers": functools.partial(
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
    "pat": functools.partial(
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
    "heapr": evidence.heapr,
    "premoe": evidence.premoe,
    "slimmoe": functools.partial(
        evidence.language_model,
        source="bytemoe",
        arms={
            "two stages": DISTIL
            | {
                "method": "slimmoe",
                "pattern": "neurons",
                "sparsity": 0.5,
                "sparsity_schedule": {"name": "linear", "events": 2},
                "saliency.gradients": 32,
            },
            "one stage": DISTIL
            | {"method": "slimmoe", "pattern": "neurons", "sparsity": 0.5, "saliency.gradients": 32},
            "half of the experts": DISTIL | {"method": "premoe", "pattern": "experts", "sparsity": 0.5},
        },
        claims=[("two stages", "one stage"), ("one stage", "half of the experts")],
    ),
    "ziplm-minilm": evidence.speed_targets,
}
