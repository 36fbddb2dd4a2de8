"""Where an operation runs: Triton on a GPU, PyTorch everywhere else, Triton's interpreter in the tests.

Every operation of `workbench.kernels` takes `backend="auto" | "torch" | "triton"`. "auto" means Triton for
tensors on a CUDA device, unless a measurement committed for that device says that PyTorch is faster at
the nearest size (see `measured_slower`), and PyTorch otherwise. Triton is imported by the first call that
needs it (see `Pending`): a product that takes PyTorch's way never loads it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from workbench.errors import BadInput

#: Contracting a * b + c into one rounding is off by default from Triton 3.10 on. Pinned off here, so that
#: the machine code rounds as PyTorch and the interpreter do: the quantizers are then equal bit for bit,
#: and the kernels that fusion would speed up spend their time in tensor cores or in memory.
#: A value already in the environment wins.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Triton reads this variable when a kernel is decorated, so it counts once, at import.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
#: Committed tables: `resources.json` and one `measured_<device>.json` per device that was at hand.
DATA = Path(__file__).parents[2] / "data" / "kernels"

triton: Any = None
#: Inside kernels: `triton.language`, once Triton is loaded.
tl: Any = None
#: The interpreter keeps bfloat16 as raw 16-bit integers and multiplies those, so `mma` widens to fp32 there.
WIDEN: Any = None


class Pending:
    """A kernel that Triton has not seen yet: it is compiled or interpreted once somebody launches it or asks
    for anything of it.

    Kernels find `tl` and each other in their modules' globals; `load` puts the real things there.
    """

    waiting: ClassVar[list[Pending]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.plain, self.made = function, None
        self.waiting.append(self)

    @property
    def kernel(self) -> Any:
        """Triton's own object."""
        load()
        return self.made

    def __getitem__(self, grid: Any) -> Any:
        return self.kernel[grid]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernel(*args, **kwargs)


def load() -> None:
    """Import Triton and hand it every kernel that was defined so far; later ones go to it at once."""
    global triton, tl, WIDEN
    if triton is not None:
        return
    import triton as real
    import triton.language as language

    triton, tl, WIDEN = real, language, language.constexpr(INTERPRETED)
    modules = [pending.plain.__globals__ for pending in Pending.waiting]
    for pending in Pending.waiting:
        pending.made = real.jit(pending.plain)
    for names in modules:
        for name, value in list(names.items()):
            if isinstance(value, Pending):
                names[name] = value.made
        names["tl"] = language
    Pending.waiting.clear()


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, put off until Triton is needed; where it is not installed, the plain function, which is
    then never called.
    """
    if not HAS_TRITON:
        return function
    return Pending(function) if triton is None else triton.jit(function)


@jit
def mma(a, b, acc):
    """acc + a @ b on tensor cores, fp32 accumulation; fp32 inputs are multiplied without truncation to
    TF32.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def narrow(x, KIND: tl.constexpr):
    """fp32 block to the type it is stored in, ties to even;
    the interpreter would cut bfloat16 off instead.
    """
    if WIDEN and tl.bfloat16 == KIND:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(KIND)


@jit
def round_even(x):
    """Nearest integer, ties to even, of an fp32 block: adding 1.5 * 2^23 leaves no fraction bits to keep
    (|x| < 2^22).
    """
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


def use_triton(operation: str, size: int, tensor: torch.Tensor, backend: str = "auto") -> bool:
    """Whether `operation` runs through Triton. `size` is the number the measurements are indexed by
    (elements or FLOPs).

    Raises `BadInput` for an unknown backend, or when Triton is asked for and cannot run on the tensor's
    device.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        fused = (
            tensor.is_cuda
            and HAS_TRITON
            and not measured_slower(operation, size, torch.cuda.get_device_name(tensor.device))
        )
        if fused:
            load()
        return fused
    if backend != "triton":
        raise BadInput(f"backend = {backend!r}: accepted are 'auto', 'torch' and 'triton'")
    if not HAS_TRITON:
        raise BadInput("backend = 'triton': Triton is not installed here (Linux only); use 'torch' or 'auto'")
    if not (tensor.is_cuda or INTERPRETED):
        raise BadInput(
            f"backend = 'triton' on a {tensor.device.type} tensor: "
            "move it to a GPU, use 'torch' or 'auto', or set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    load()
    return True


def measurement_file(device_name: str) -> Path:
    """The table of measured times for one device, named after it."""
    return DATA / f"measured_{''.join(c if c.isalnum() else '_' for c in device_name)}.json"


@functools.lru_cache(maxsize=64)
def _measurements(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text())["rows"]) if path.exists() else ()


def measured_slower(operation: str, size: int, device_name: str) -> bool:
    """True when the committed measurement nearest in log size says that PyTorch was faster on this device."""
    rows = [row for row in _measurements(measurement_file(device_name)) if row["operation"] == operation]
    if not rows:
        return False
    nearest = min(rows, key=lambda row: abs(math.log(max(row["size"], 1)) - math.log(max(size, 1))))
    return nearest["triton_ms"] > nearest["torch_ms"]


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU current for a launch; nothing to do on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Ceiling division.

    >>> cdiv(7, 3)
    3
    """
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`.

    >>> power_of_two(33), power_of_two(3, least=16)
    (64, 16)
    """
    return max(least, 1 << max(0, n - 1).bit_length())
