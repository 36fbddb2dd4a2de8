"""Measurements of the training methods, by name of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.progress import Progress


def _measured(place: str) -> Callable[[str, Progress], dict[str, Any]]:
    """The measurement "module.function" of this folder, imported only when somebody runs it."""
    module, function = place.split(".")

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        from importlib import import_module

        return getattr(import_module(f"workbench.evidence.training.{module}_evidence"), function)(
            name, progress
        )

    return measure


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "rex": _measured("schedule.schedule"),
    "uba": _measured("schedule.schedule"),
    "power": _measured("schedule.power"),
    "infinite": _measured("schedule.infinite_schedule"),
    "rewarm": _measured("schedule.rewarm"),
    "reference-time": _measured("schedule.reference_time"),
    "budgeted-decay": _measured("schedule.budgeted_decay"),
    "lamb": _measured("optimizer.lamb"),
    "muon": _measured("optimizer.optimizer"),
    "soap": _measured("optimizer.optimizer"),
    "lion": _measured("optimizer.optimizer"),
    "galore": _measured("optimizer.galore"),
    "muon-soft-cap": _measured("optimizer.lipschitz"),
    "lipschitz-transformer": _measured("optimizer.lipschitz_transformer"),
    "ghost-batch-norm": _measured("batch.ghost_batch_norm"),
    "adadagrad": _measured("batch.adadagrad"),
    "large-batch-accumulation": _measured("batch.accumulation"),
    "noise-scale": _measured("batch.noise"),
    "step-law": _measured("batch.step_law_surface"),
    "weight-standardization": _measured("batch.weight_standardization"),
    "sophia": _measured("optimizer.optimizer"),
    "kron": _measured("optimizer.optimizer"),
    "mars": _measured("optimizer.optimizer"),
    "scion": _measured("optimizer.optimizer"),
    "mkor": _measured("optimizer.mkor"),
    "one-bit-adam": _measured("optimizer.one_bit"),
    "self-tuning": _measured("optimizer.self_tuned"),
    "concurrent-adversary": _measured("batch.concurrent_adversary"),
    "agvm": _measured("batch.module_rates"),
    "sqrt-rule": _measured("batch.adam_slope"),
}
