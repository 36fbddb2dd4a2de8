"""Every kernel with the configurations it is compiled in, and every operation with the shapes it is timed at.

A module of `workbench.kernels` that owns Triton kernels lists them in `KERNELS`, and what its operations must
move and compute in `cases()`; everything else (compilation check, list, benchmark, roofline notebook)
is derived from those two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Modules with kernels, in the order in which they are listed.
MODULES: tuple[str, ...] = (
    "sequence.packing",
    "sequence.rotary",
    "sequence.attention",
    "sparse.block_sparse",
    "sparse.semi_structured",
    "quantized.low_bit_linear",
    "quantized.scaled_matmul",
    "quantized.int8_flow",
    "quantized.quantize",
    "quantized.round_columns",
    "quantized.hadamard",
    "quantized.kronecker",
    "training.optimizer_step",
    "training.linear_cross_entropy",
    "training.activation",
    "training.norm",
    "sparse.block_fisher",
    "sparse.threshold",
    "sequence.fft_convolution",
)


@dataclass(frozen=True)
class Configuration:
    """One way to compile a kernel.

    `types` gives the Triton type of every pointer and float argument ("*bf16", "fp32"); arguments not named
    here or in `constants` are 32-bit integers. `capability` is the least compute capability the configuration
    is meant for.
    """

    name: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    capability: int = 80


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: `name` is "operation.pass", `decorated` what `jit` made of it."""

    name: str
    decorated: Any
    configurations: tuple[Configuration, ...]

    @property
    def function(self) -> Any:
        """Triton's object; loads Triton."""
        return getattr(self.decorated, "kernel", self.decorated)

    def signature(self, configuration: Configuration) -> dict[str, str]:
        """Argument name -> Triton type, in the kernel's order, as the compiler wants it."""
        known = set(self.function.arg_names)
        unknown = (set(configuration.types) | set(configuration.constants)) - known
        if unknown:
            raise ValueError(
                f"{self.name}/{configuration.name}: no such argument: {', '.join(sorted(unknown))}"
            )
        return {
            name: "constexpr" if name in configuration.constants else configuration.types.get(name, "i32")
            for name in self.function.arg_names
        }


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `bytes` and `flops` are the least it must move and compute, `peak` the unit that computes it ("fp32",
    "bf16", "fp8", "int8"), `size` the number its measurements are indexed by. `make(device)` returns
    the Triton call and the PyTorch call that does the same work the usual way;
    it draws its inputs on `device`.
    """

    operation: str
    shape: str
    size: int
    bytes: float
    flops: float
    make: Callable[[torch.device], tuple[Callable[[], Any], Callable[[], Any]]] = field(repr=False)
    peak: str = "fp32"
    comparator: str = "torch"


def kernels() -> list[Kernel]:
    """Every kernel, imported on demand.

    >>> all(kernel.name.count(".") == 1 for kernel in kernels())
    True
    """
    found: list[Kernel] = []
    for module in MODULES:
        found.extend(importlib.import_module(f"workbench.kernels.{module}").KERNELS)
    return found


def cases() -> list[Case]:
    """Every operation at every shape of the benchmark and of the roofline."""
    found: list[Case] = []
    for module in MODULES:
        found.extend(importlib.import_module(f"workbench.kernels.{module}").cases())
    return found
