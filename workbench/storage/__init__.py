"""Where things are kept, and how everything is written."""

from workbench.storage.places import (
    VERDICTS,
    cache_folder,
    data_folder,
    evidence_folders,
    evidence_record,
    evidence_target,
    measured_methods,
    verdict,
)
from workbench.storage.writing import CannotWrite, check_target, damage, replacing, settle

__all__ = [
    "VERDICTS",
    "CannotWrite",
    "cache_folder",
    "check_target",
    "damage",
    "data_folder",
    "evidence_folders",
    "evidence_record",
    "evidence_target",
    "measured_methods",
    "replacing",
    "settle",
    "verdict",
]
