"""Pruning: saliency x pattern x allocation x compensation x schedule x recovery."""

from workbench.pruning.damp import DampDoctor
from workbench.pruning.landscape import SaliencyMap
from workbench.pruning.prune import Prune

__all__ = ["DampDoctor", "Prune", "SaliencyMap"]
