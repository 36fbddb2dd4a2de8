"""Measurements of the pruning methods, by name of the method.

Evidence is taken on `digits-vit` (three networks from three seeds, seconds each) for every composition, so
that a claim can be checked again anywhere, and on `minilm-docstrings` where a card says so. Choices are made
on the validation split, numbers are from the test split, and a claim that fails is stored as failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from workbench.evidence.harness import compare
from workbench.evidence.pruning.structural_measures import MEASURES as STRUCTURAL
from workbench.evidence.pruning.training_measures import MEASURES as TRAINED
from workbench.evidence.real_model import PRUNING
from workbench.progress import Progress


def arms_at(sparsity: float, **methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {label.replace("_", " "): {"sparsity": sparsity} | fields for label, fields in methods.items()}


HN = {"pattern": "heads+neurons"}
TUNE = {"recovery": {"name": "finetune", "steps": 60, "learning_rate": 1e-3}}
ADAPTERS = {"recovery": {"name": "low-rank", "steps": 60, "learning_rate": 2e-3}}
GRADUAL = TUNE | {"sparsity_schedule": {"name": "cubic", "events": 6}}

MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "obert": functools.partial(
        compare,
        arms=arms_at(
            0.8,
            obert={"method": "obert"},
            without_update={"method": "obert", "compensation": "none"},
            diagonal={"method": "obd"},
            magnitude={"method": "magnitude"},
        ),
        claims=[("obert", "diagonal"), ("diagonal", "magnitude"), ("obert", "without update")],
    ),
    "obert-minilm": functools.partial(
        compare,
        arms=arms_at(
            0.7,
            obert={"method": "obert"},
            without_update={"method": "obert", "compensation": "none"},
            wanda={"method": "wanda"},
            magnitude={"method": "magnitude"},
        ),
        claims=[("obert", "wanda"), ("wanda", "magnitude"), ("obert", "without update")],
        subject="minilm-docstrings",
        seeds=(0,),
    ),
    "obert-greedy": functools.partial(
        compare,
        arms=arms_at(0.8, greedy={"method": "obert-greedy"}, once={"method": "obert"}),
        claims=[("greedy", "once")],
    ),
    "magnitude": functools.partial(
        compare,
        arms=arms_at(0.5, magnitude={"method": "magnitude"}, random={"method": "random"}),
        claims=[("magnitude", "random")],
    ),
    "magnitude-global": functools.partial(
        compare,
        arms=arms_at(
            0.5,
            all_layers={"method": "magnitude", "allocation": "global"},
            each_layer={"method": "magnitude"},
        ),
        claims=[("all layers", "each layer")],
    ),
    "snip": functools.partial(
        compare,
        arms=arms_at(0.7, gradient={"method": "gradient"}, magnitude={"method": "magnitude"}),
        claims=[("gradient", "magnitude")],
    ),
    "obd": functools.partial(
        compare,
        arms=arms_at(0.8, obd={"method": "obd"}, magnitude={"method": "magnitude"}),
        claims=[("obd", "magnitude")],
    ),
    "icbs": functools.partial(
        compare,
        arms=arms_at(
            0.5, icbs={"method": {"name": "icbs", "gradients": 128, "damp": 1.0}}, wanda={"method": "wanda"}
        ),
        claims=[("icbs", "wanda")],
    ),
    "gradual-magnitude": functools.partial(
        compare,
        arms=arms_at(0.9, cubic=GRADUAL | {"method": "magnitude"}, one_shot=TUNE | {"method": "magnitude"}),
        claims=[("cubic", "one shot")],
    ),
    "flap": functools.partial(
        compare,
        arms=arms_at(
            0.3,
            flap=HN | {"method": "flap"},
            without_bias=HN | {"method": "flap", "compensation": "none"},
            wanda=HN | {"method": "wanda"},
            magnitude=HN | {"method": "magnitude"},
        ),
        claims=[("flap", "without bias"), ("flap", "wanda"), ("flap", "magnitude")],
    ),
    "llm-pruner": functools.partial(
        compare,
        arms=arms_at(
            0.3,
            taylor=HN | {"method": "llm-pruner"},
            magnitude=HN | {"method": "magnitude"},
            random=HN | {"method": "random"},
            recovered=HN | ADAPTERS | {"method": "llm-pruner", "recovery.steps": 40},
        ),
        claims=[("taylor", "magnitude"), ("taylor", "random"), ("recovered", "taylor")],
    ),
    "ziplm": functools.partial(
        compare,
        arms=arms_at(
            0.5,
            ziplm=HN | {"method": "ziplm"},
            without_update=HN | {"method": "ziplm", "compensation": "none"},
            flap=HN | {"method": "flap"},
            magnitude=HN | {"method": "magnitude"},
        ),
        claims=[("ziplm", "without update"), ("ziplm", "flap"), ("ziplm", "magnitude")],
    ),
    "perp": functools.partial(
        compare,
        arms=arms_at(
            0.7,
            adapters=ADAPTERS | {"method": "magnitude"},
            none={"method": "magnitude"},
            full=TUNE | {"method": "magnitude"},
        ),
        claims=[("adapters", "none"), ("full", "none")],
    ),
    "sparse-peft": functools.partial(
        compare,
        arms=arms_at(
            0.6,
            adapted=ADAPTERS | {"method": "wanda"},
            wanda={"method": "wanda"},
        ),
        claims=[("adapted", "wanda")],
    ),
    "distillation": functools.partial(
        compare,
        arms=arms_at(
            0.9,
            distil={"method": "obert", "recovery": TUNE["recovery"] | {"name": "distil"}},
            task=TUNE | {"method": "obert"},
            none={"method": "obert"},
        ),
        claims=[("distil", "task"), ("task", "none")],
    ),
    "erdos-renyi": functools.partial(
        compare,
        arms=arms_at(
            0.6,
            erdos_renyi={"method": "magnitude", "allocation": "erdos-renyi"},
            each_layer={"method": "magnitude"},
        ),
        claims=[("erdos renyi", "each layer")],
    ),
    "least-squares": functools.partial(
        compare,
        arms=arms_at(
            0.6, refitted={"method": "wanda", "compensation": "least-squares"}, wanda={"method": "wanda"}
        ),
        claims=[("refitted", "wanda")],
    ),
    **PRUNING,
    **STRUCTURAL,
    **TRAINED,
}
