"""Compile every kernel for GPUs that are not here, and hold registers,
shared memory and spills to a committed table.

`triton.compile` needs no device: `GPUTarget("cuda", 90, 32)` gives the machine code of an H100 on any Linux
machine. What the code costs is read from the finished cubin (`cuobjdump -res-usage`, shipped with Triton):
registers per thread, stack bytes per thread (Triton uses no local arrays, so stack means spilled registers),
and the shared memory of a block.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import BadInput
from workbench.kernels import backend
from workbench.kernels.registry import Configuration, Kernel
from workbench.storage import replacing

TARGETS = (80, 90, 100)
TABLE = backend.DATA / "resources.json"
#: The compiler's allocation moves by a few registers with unrelated edits; more than this is a regression.
REGISTER_SLACK = 8


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers and spilled bytes per thread,
    shared-memory bytes per block.
    """

    registers: int
    spilled: int
    shared: int


def compile_kernel(kernel: Kernel, configuration: Configuration, capability: int) -> Resources:
    """Machine code of one configuration for one compute capability (80, 90, 100, ...), and what it uses."""
    if not backend.HAS_TRITON:
        raise BadInput("kernels check: Triton is not installed here; it exists for Linux only")
    if backend.INTERPRETED:
        raise BadInput(
            "kernels check: TRITON_INTERPRET is set, so nothing compiles; unset it and start again"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = kernel.signature(configuration)
    # Pointers come from PyTorch's allocator and sizes are multiples of 16 in the shapes that matter:
    # what the launcher would assume.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind[0] == "*" or kind == "i32"
    }
    types = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16}
    constants = {
        name: types.get(value, value) if isinstance(value, str) else value
        for name, value in configuration.constants.items()
    }
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_cubin(compiled.asm["cubin"], shared=compiled.metadata.shared)


def read_cubin(cubin: bytes, shared: int) -> Resources:
    """Registers and stack of the kernel in a cubin; `shared` (dynamic, set at launch)
    comes from Triton's metadata.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text!r}")
    return Resources(registers=int(found[1]), spilled=int(found[2]), shared=shared)


def measure(
    kernels: Iterable[Kernel], targets: Iterable[int] = TARGETS, say: Callable[[str], Any] = print
) -> dict[str, dict[str, int]]:
    """Compile everything; "kernel/configuration/sm_XX" -> resources, in a stable order."""
    table: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        for configuration in kernel.configurations:
            for capability in targets:
                if capability < configuration.capability:
                    continue
                key = f"{kernel.name}/{configuration.name}/sm_{capability}"
                table[key] = asdict(compile_kernel(kernel, configuration, capability)) | {
                    "warps": configuration.warps
                }
                say(
                    f"{key:64} {table[key]['registers']:4d} registers {table[key]['spilled']:5d} B spilled "
                    f"{table[key]['shared'] / 1024:7.1f} KiB shared"
                )
    return table


def regressions(new: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """What got worse, or is not in the recorded table, one line each;
    an empty list means that the check passes.

    >>> before = {"k/c/sm_90": {"registers": 40, "spilled": 0, "shared": 1024}}
    >>> regressions({"k/c/sm_90": {"registers": 44, "spilled": 8, "shared": 1024}}, before)
    ['k/c/sm_90: spilled 0 -> 8']
    """
    lines = []
    for key, now in new.items():
        before = recorded.get(key)
        if before is None:
            lines.append(
                f"{key}: not in the table; run `workbench kernels check --record` and look at what it adds"
            )
            continue
        for name, slack in (("registers", REGISTER_SLACK), ("spilled", 0), ("shared", 0)):
            if now[name] > before[name] + slack:
                lines.append(f"{key}: {name} {before[name]} -> {now[name]}")
    return lines


def load_table(path: Path = TABLE) -> dict[str, Any]:
    """The committed table: {"triton": version, "kernels": {key: resources}}."""
    if not path.exists():
        raise BadInput(f"kernels check: {path} is missing; `workbench kernels check --record` writes it")
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def save_table(kernels: dict[str, dict[str, int]], path: Path = TABLE) -> None:
    """Write the table, one kernel a line so that a diff reads well;
    the Triton version it holds for goes with it.
    """
    import triton

    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(kernels.items()))
    with replacing(path, private=True) as draft:
        draft.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{rows}\n}}}}\n')
