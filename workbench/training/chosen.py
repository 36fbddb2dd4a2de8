"""What an instrument that trains on the way has chosen for its run."""

from __future__ import annotations

from typing import Any

#: Field of an instrument -> setting of a run. Pruning has a schedule of sparsity, hence the long name.
FIELDS = {
    "optimizer": "optimizer",
    "learning_rate_schedule": "schedule",
    "precision": "precision",
    "micro_batch": "micro_batch",
    "clip": "clip",
}


def chosen_settings(instrument: Any) -> dict[str, Any]:
    """Settings of a run from the fields that the instrument has; the others stay as the run has them."""
    found = {
        setting: getattr(instrument, name) for name, setting in FIELDS.items() if hasattr(instrument, name)
    }
    if found.get("clip") == 0:
        found["clip"] = None
    return found
