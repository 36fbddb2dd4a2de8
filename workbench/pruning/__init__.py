"""Pruning: saliency x pattern x allocation x compensation x schedule x recovery; and training with masks."""

from workbench.pruning.damp import DampDoctor
from workbench.pruning.fisher_sweep import FisherSweep
from workbench.pruning.landscape import SaliencyMap
from workbench.pruning.prune import Prune
from workbench.pruning.subtune import Subtune
from workbench.pruning.train_sparse import TrainSparse

__all__ = ["DampDoctor", "FisherSweep", "Prune", "SaliencyMap", "Subtune", "TrainSparse"]
