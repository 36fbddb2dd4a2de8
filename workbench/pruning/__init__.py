"""Pruning: saliency x pattern x allocation x compensation x schedule x recovery; and training with masks."""

from workbench.pruning.axes import (
    COMPENSATION,
    PATTERN,
    PRUNING_METHOD,
    RECOVERY,
    SALIENCY,
    SPARSITY_ALLOCATION,
    SPARSITY_SCHEDULE,
)
from workbench.pruning.prune import Prune
from workbench.pruning.sparse_training.train_sparse import TrainSparse
from workbench.pruning.studies.damp_doctor import DampDoctor
from workbench.pruning.studies.fisher_sweep import FisherSweep
from workbench.pruning.studies.saliency_map import SaliencyMap
from workbench.pruning.studies.subtune import Subtune

__all__ = [
    "COMPENSATION",
    "PATTERN",
    "PRUNING_METHOD",
    "RECOVERY",
    "SALIENCY",
    "SPARSITY_ALLOCATION",
    "SPARSITY_SCHEDULE",
    "DampDoctor",
    "FisherSweep",
    "Prune",
    "SaliencyMap",
    "Subtune",
    "TrainSparse",
]
