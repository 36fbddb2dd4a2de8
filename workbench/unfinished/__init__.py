"""Runs that were interrupted: what they leave on disk, so that the same run goes on where it stopped."""

from workbench.unfinished.journal import (
    DamagedCheckpoint,
    Journal,
    Unfinished,
    current,
    journal,
    left_behind,
    without_journal,
)

__all__ = [
    "DamagedCheckpoint",
    "Journal",
    "Unfinished",
    "current",
    "journal",
    "left_behind",
    "without_journal",
]
