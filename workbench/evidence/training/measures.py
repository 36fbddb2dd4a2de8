"""Measurements of the training methods, by name of the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.evidence.training.batch_evidence import (
    accumulation,
    adadagrad,
    adam_slope,
    module_rates,
    noise,
    step_law_surface,
)
from workbench.evidence.training.continual_evidence import infinite_schedule, rewarm
from workbench.evidence.training.model_evidence import lipschitz, lipschitz_transformer, self_tuned
from workbench.evidence.training.normalisation_evidence import (
    concurrent_adversary,
    ghost_batch_norm,
    weight_standardization,
)
from workbench.evidence.training.optimizer_evidence import galore, lamb, mkor, one_bit, optimizer
from workbench.evidence.training.schedule_evidence import budgeted_decay, power, reference_time, schedule
from workbench.progress import Progress

MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "rex": schedule,
    "uba": schedule,
    "power": power,
    "infinite": infinite_schedule,
    "rewarm": rewarm,
    "reference-time": reference_time,
    "budgeted-decay": budgeted_decay,
    "lamb": lamb,
    "muon": optimizer,
    "soap": optimizer,
    "lion": optimizer,
    "galore": galore,
    "muon-soft-cap": lipschitz,
    "lipschitz-transformer": lipschitz_transformer,
    "ghost-batch-norm": ghost_batch_norm,
    "adadagrad": adadagrad,
    "large-batch-accumulation": accumulation,
    "noise-scale": noise,
    "step-law": step_law_surface,
    "weight-standardization": weight_standardization,
    "sophia": optimizer,
    "kron": optimizer,
    "mars": optimizer,
    "scion": optimizer,
    "mkor": mkor,
    "one-bit-adam": one_bit,
    "self-tuning": self_tuned,
    "concurrent-adversary": concurrent_adversary,
    "agvm": module_rates,
    "sqrt-rule": adam_slope,
}
