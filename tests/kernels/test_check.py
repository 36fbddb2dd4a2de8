"""Kernels compile for GPUs that are not here and stay within the committed table;
without Triton everything still runs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import BadInput
from workbench.kernels import backend, bench, check, main, registry, roofline
from workbench.kernels.registry import Configuration, Kernel

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in which kernels compile instead of being interpreted."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_kernels_are_interpreted_in_this_process() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    assert backend.INTERPRETED
    assert all(isinstance(kernel.function, InterpretedFunction) for kernel in registry.kernels())


def test_the_committed_table_names_every_kernel_configuration_and_target() -> None:
    expected = {
        f"{kernel.name}/{configuration.name}/sm_{capability}"
        for kernel in registry.kernels()
        for configuration in kernel.configurations
        for capability in check.TARGETS
        if capability >= configuration.capability
    }
    assert set(check.load_table()["kernels"]) == expected


def test_nothing_spills_badly_and_everything_fits_the_smallest_shared_memory() -> None:
    for key, used in check.load_table()["kernels"].items():
        assert used["registers"] <= 255
        assert used["spilled"] <= 256, key
        assert used["shared"] <= 163 * 1024, key  # a block on compute capability 8.0


def test_every_kernel_compiles_to_what_the_table_says_and_a_worse_one_fails(tmp_path: Path) -> None:
    """First configuration of each kernel for one target; `workbench kernels check` does them all."""
    table = check.load_table()
    key = next(key for key in table["kernels"] if key.startswith("packing.gather/") and key.endswith("sm_90"))
    table["kernels"][key]["registers"] -= 20
    (tmp_path / "resources.json").write_text(json.dumps(table))
    code = f"""
import dataclasses, sys
from pathlib import Path
from workbench.kernels import check, main, registry
first = [dataclasses.replace(k, configurations=k.configurations[:1]) for k in registry.kernels()]
worse = check.regressions(check.measure(first, [90], say=lambda line: None), check.load_table()["kernels"])
print(*worse, sep="\\n")
check.load_table.__defaults__ = (Path({str(tmp_path / "resources.json")!r}),)
sys.exit(10 * len(worse) + main(["check", "--only", "packing.gather", "--target", "90"]))
"""
    done = python(code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"worse: {key}: registers" in done.stdout


def test_without_triton_everything_imports_and_runs_through_pytorch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "workbench" / "kernels").rglob("*.py")
    ]
    assert len(modules) > 30
    code = f"""
import importlib, importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Block())
import torch
for name in {modules!r}:
    importlib.import_module(name)
from workbench.kernels.training.norm import rms_norm
from workbench.kernels.quantized.quantize import quantize_integer
x = torch.randn(3, 8)
print(rms_norm(x, torch.ones(8)).shape, quantize_integer(x, torch.ones(1, 1), -8, 7).shape)
try:
    rms_norm(x, torch.ones(8), backend="triton")
except ValueError as error:
    print(error)
from workbench.kernels import main
try:
    main(["list"])
except ValueError as error:
    sys.exit("Triton is not installed" not in str(error))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


def test_the_package_imports_no_triton_fusion_is_pinned_and_the_cpu_refuses_triton() -> None:
    code = """
import sys, torch, workbench.kernels
assert "triton" not in sys.modules
from workbench.kernels.quantized.hadamard import hadamard
from triton import knobs
print(knobs.language.fp_fusion_enabled(None))
hadamard(torch.randn(2, 4), backend="triton")
"""
    done = python(code)
    assert done.stdout.strip() == "False", done.stderr
    assert "BadInput" in done.stderr and "TRITON_INTERPRET" in done.stderr


def test_regressions_are_found_and_small_moves_are_not() -> None:
    before = {"k": {"registers": 40, "spilled": 0, "shared": 100}}
    assert check.regressions({"k": {"registers": 48, "spilled": 0, "shared": 90}}, before) == []
    assert len(check.regressions({"k": {"registers": 49, "spilled": 4, "shared": 101}}, before)) == 3
    assert "not in the table" in check.regressions({"new": before["k"]}, before)[0]


def test_a_configuration_that_names_no_argument_is_refused() -> None:
    from workbench.kernels.sequence.packing import _gather_rows

    with pytest.raises(ValueError, match="no such argument: z_ptr"):
        Kernel("packing.gather", _gather_rows, ()).signature(Configuration("c", {"z_ptr": "*fp32"}, {}))


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--only", "attention.*"]) == 0
    assert "attention.backward_keys" in capsys.readouterr().out
    for arguments, said in (
        (["check", "--only", "nothing"], "matches no kernel"),
        (["check", "--record", "--only", "attention.*"], "--record"),
        (["bench"], "no CUDA device"),
    ):
        with pytest.raises(BadInput, match=said):
            main(arguments)


def test_a_kernel_measured_slower_is_not_chosen_at_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "DATA", tmp_path)
    rows = [
        {"operation": "norm", "size": 1000, "triton_ms": 2.0, "torch_ms": 1.0},
        {"operation": "norm", "size": 10**8, "triton_ms": 1.0, "torch_ms": 2.0},
    ]
    backend.measurement_file("Some GPU").write_text(json.dumps({"rows": rows}))
    assert backend.measured_slower("norm", 2000, "Some GPU")
    assert not backend.measured_slower("norm", 10**7, "Some GPU")
    assert not backend.measured_slower("attention", 2000, "Some GPU")
    assert not backend.measured_slower("norm", 2000, "Other GPU")


def test_every_case_has_a_roofline_and_a_known_unit() -> None:
    cases = registry.cases()
    assert {case.operation for case in cases} >= {kernel.name.split(".")[0] for kernel in registry.kernels()}
    for device in roofline.DEVICES.values():
        table = roofline.roofline_table(cases, device)
        assert (table["predicted ms"] > 0).all()
    case = next(case for case in cases if case.operation == "scaled_matmul")
    assert roofline.predicted_ms(case, roofline.DEVICES["A100-SXM4-80GB"]) == pytest.approx(
        2 * 4096**3 / 624e12 * 1e3
    )


@pytest.mark.parametrize("module", registry.MODULES)
def test_names_are_the_fields(module: str) -> None:
    loaded = importlib.import_module(f"workbench.kernels.{module}")
    assert loaded.__doc__
    assert all(kernel.name.split(".")[0] == module.split(".")[1] for kernel in loaded.KERNELS)


def test_bench_needs_a_gpu() -> None:
    with pytest.raises(BadInput, match="no CUDA device"):
        bench.run()
