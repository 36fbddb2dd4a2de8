"""What every study that sweeps is told about its runs."""

from __future__ import annotations

from typing import Any, Literal

from workbench.axis import parameter
from workbench.instruments import SubjectInstrument


class SweptInstrument(SubjectInstrument):
    """A study whose runs are trials of a sweep."""

    seeds: int = parameter(1, "runs per cell, with different weights and data order", ge=1, le=20)
    workers: int = parameter(2, "worker processes", ge=1, le=256, group="Machine and seed")
    storage: str = parameter(
        "",
        "database of the sweep, an SQLAlchemy URL that several machines may share; empty: "
        "SQLite in the cache",
        group="Machine and seed",
    )
    backend: Literal["loky", "dask", "ray"] = parameter(
        "loky",
        "where workers run: processes here, or a Dask or Ray cluster that is already joined",
        group="Machine and seed",
    )

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Where the runs happen comes last, before device and seed."""
        last = ("workers", "storage", "backend", "device", "seed")
        found = super().parameters()
        return {k: v for k, v in found.items() if k not in last} | {k: found[k] for k in last}
