"""The installed version, and what else a number depends on that is not in anybody's code:
libraries, threads, the kind of processor, switches of torch.
"""

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("model-workbench")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.1.0"

#: Distributions whose arithmetic, sampling or tokenizing ends up in results.
LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "tokenizers",
    "optuna",
    "peft",
    "pytorch-optimizer",
    "triton",
)


@functools.lru_cache(1)
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version_of(name) for name in LIBRARIES}


def versions() -> dict[str, str]:
    """Version of Python and of each of `LIBRARIES`; empty for one that is not installed."""
    return dict(_versions())


@functools.lru_cache(256)
def version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def surroundings(device: Any = None) -> dict[str, Any]:
    """What the same code with the same libraries rounds by: threads, processor, switches of torch.

    `device` is the torch device of a run on a subject; None for a run that does not use torch.
    """
    if device is None:
        return {"machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS", "")}
    import torch

    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "machine": kind,
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "onednn": torch.backends.mkldnn.enabled,
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
    }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads: sums are then added up in the order that this count gives."""
    import torch

    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
