"""Weights as arithmetic: several models become one, a difference is stored, a small model grows."""

from __future__ import annotations

from workbench.arithmetic.conflicts import conflict_table
from workbench.arithmetic.delta import Delta
from workbench.arithmetic.delta_result import reloaded
from workbench.arithmetic.difference.difference import DIFFERENCE
from workbench.arithmetic.grow import Grow
from workbench.arithmetic.growth.depth import stacking_tokens
from workbench.arithmetic.growth.growth import GROWTH
from workbench.arithmetic.interference import Interference
from workbench.arithmetic.merge import Merge
from workbench.arithmetic.merged_files import merge_checkpoints
from workbench.arithmetic.merging.merging import MERGE
from workbench.arithmetic.models import Models, Parts, side_by_side
from workbench.arithmetic.sources import Source, of_folder, of_subject, source_of
from workbench.arithmetic.v_cycle import VCycle

__all__ = [
    "DIFFERENCE",
    "GROWTH",
    "MERGE",
    "Delta",
    "Grow",
    "Interference",
    "Merge",
    "Models",
    "Parts",
    "Source",
    "VCycle",
    "conflict_table",
    "merge_checkpoints",
    "of_folder",
    "of_subject",
    "reloaded",
    "side_by_side",
    "source_of",
    "stacking_tokens",
]
