"""The families of methods; importing one registers its instruments and changes."""

from __future__ import annotations

import functools
import importlib.util

FAMILIES = ("curvature", "pruning", "quantization", "latency", "training", "scaling")


@functools.lru_cache(1)
def import_families() -> None:
    """Import every family that is there; importing registers its instruments and changes."""
    for family in FAMILIES:
        if importlib.util.find_spec(f"workbench.{family}") is not None:
            importlib.import_module(f"workbench.{family}")
