"""What the product computes as a kernel does, it computes by the kernel's entry; nothing is defined twice."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from workbench.kernels.quantized import hadamard, kronecker, quantize, round_columns
from workbench.kernels.sequence import unpadded
from workbench.kernels.sparse import block_fisher, threshold
from workbench.kernels.training import linear_cross_entropy, optimizer_step
from workbench.pruning import pattern
from workbench.pruning.pattern import Tiles, make_mask
from workbench.pruning.solvers import fisher, obs, ziplm
from workbench.quantization.activations import sequential
from workbench.quantization.number import grid
from workbench.quantization.number.elements import Minifloat
from workbench.quantization.number.formats import named
from workbench.quantization.rounding import feedback, gptq
from workbench.quantization.transform import coordinates, hadamard_orders
from workbench.statistics import damping
from workbench.statistics.factors import StackedGradients
from workbench.subjects import TASK, Subject, vocabulary
from workbench.training import quantized_products
from workbench.training.optimizer import lamb, lion

ROOT = Path(__file__).parents[2]
#: the module, whose name in its package is a function's
subject = sys.modules[Subject.__module__]

#: (product module, name, the one definition)
ENTRIES: list[tuple[Any, str, Any]] = [
    (hadamard_orders, "hadamard", hadamard.hadamard),
    (coordinates, "kronecker", kronecker.kronecker),
    (quantized_products, "hadamard", hadamard.hadamard),
    (quantized_products, "quantize_dequantize", quantize.quantize_dequantize),
    (hadamard_orders, "hadamard_matrix", hadamard.hadamard_matrix),
    (grid, "quantize_dequantize", quantize.quantize_dequantize),
    (gptq, "round_columns", round_columns.round_columns),
    (fisher, "block_fisher", block_fisher.block_fisher),
    (fisher, "block_fisher_inverse", block_fisher.block_fisher_inverse),
    (pattern, "kth_smallest", threshold.kth_smallest),
    (lamb, "optimizer_step", optimizer_step.optimizer_step),
    (lion, "optimizer_step", optimizer_step.optimizer_step),
    (vocabulary, "linear_cross_entropy", linear_cross_entropy.linear_cross_entropy),
    (
        vocabulary,
        "linear_cross_entropy_and_hits",
        linear_cross_entropy.linear_cross_entropy_and_hits,
    ),
    (subject, "unpadded", unpadded.unpadded),
    (obs, "damped", damping.damped),
    (ziplm, "damped", damping.damped),
    (feedback, "factor_from_the_last", damping.factor_from_the_last),
    (obs, "factor_from_the_last", damping.factor_from_the_last),
    (sequential, "damped", damping.damped),
]


@pytest.mark.parametrize(("module", "name", "entry"), ENTRIES, ids=lambda e: getattr(e, "__name__", str(e)))
def test_the_product_holds_the_entry_itself(module: Any, name: str, entry: Any) -> None:
    assert getattr(module, name) is entry


def language_subject() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(1, 99, (6, 12))
    mask = torch.ones_like(ids)
    mask[1::2, 7:] = 0
    mask[0, 3:] = 0
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = transformers.LlamaForCausalLM(config).eval()
    return Subject("llama", model, TASK["causal-lm"].value(), {"test": columns, "train": columns})


def transformed() -> Any:
    signs = torch.ones(16)
    factors = {"left": torch.eye(2), "right": torch.eye(8)}
    return coordinates.Transform(signs=signs, block=16, **factors).weight(torch.randn(3, 16))


def stepped(kind: Callable[..., torch.optim.Optimizer]) -> Callable[[], Any]:
    def step() -> None:
        weight = nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.ones(3, 2)
        kind([weight]).step()

    return step


USES: list[tuple[Any, str, Callable[[], Any]]] = [
    (
        gptq,
        "round_columns",
        lambda: gptq.gptq(torch.randn(4, 8), torch.eye(8), grid.fit(torch.randn(4, 8), named("int4"))),
    ),
    (hadamard_orders, "hadamard", transformed),
    (coordinates, "kronecker", transformed),
    (quantized_products, "hadamard", lambda: quantized_products.over_features(torch.randn(4, 8))),
    (quantized_products, "hadamard", lambda: quantized_products.over_tokens(torch.randn(4, 8))),
    (
        quantized_products,
        "quantize_dequantize",
        lambda: quantized_products.rounded(torch.randn(4, 8), named("int8")),
    ),
    *(
        (
            grid,
            "quantize_dequantize",
            lambda name=name: grid.fit(torch.randn(4, 64), named(name)).round(torch.randn(4, 64)),
        )
        for name in ("int4", "uint4", "e4m3fn", "nf4", "mxfp4", "nvfp4", "ternary")
    ),
    (
        fisher,
        "block_fisher_inverse",
        lambda: fisher.saliency(torch.ones(2, 8), StackedGradients(torch.randn(5, 2, 8)), 0.1, 8),
    ),
    (
        fisher,
        "block_fisher",
        lambda: fisher.update(
            torch.ones(2, 8), torch.eye(8)[:2] == 0, StackedGradients(torch.randn(5, 2, 8)), 0.1, 8
        ),
    ),
    (pattern, "kth_smallest", lambda: make_mask(torch.randn(4, 8), Tiles(1, 1), 0.5)),
    (lamb, "fuses", stepped(lamb.LAMB)),
    (lion, "fuses", stepped(lion.Lion)),
    (vocabulary, "linear_cross_entropy", lambda: language_loss()),
    (vocabulary, "linear_cross_entropy_and_hits", lambda: language_subject().evaluate()),
    (subject, "unpadded", lambda: language_subject().evaluate()),
]


def language_loss() -> Tensor:
    on = language_subject()
    return on.loss(next(on.batches("test", 6)))


@pytest.mark.parametrize(("module", "name", "use"), USES)
def test_the_product_calls_the_entry(
    module: Any, name: str, use: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(module, name), []

    def recorded(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*args, **options)

    monkeypatch.setattr(module, name, recorded)
    use()
    assert calls


@pytest.mark.parametrize("name", ["hadamard", "kronecker", "damped", "Grid"])
def test_it_is_defined_once(name: str) -> None:
    found = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "workbench").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    ]
    assert len(found) == 1, found


def test_the_product_loads_no_triton() -> None:
    code = """
import sys
import workbench.quantization
from workbench.kernels.quantized import hadamard, kronecker, quantize
from workbench.kernels.sequence import unpadded
from workbench.kernels.sparse import block_fisher, threshold
from workbench.kernels.training import optimizer_step
import torch
hadamard.hadamard(torch.randn(2, 4))
assert "triton" not in sys.modules
import workbench.pruning, workbench.training, workbench.curvature
assert hadamard.use_triton.__globals__["triton"] is None  # torch's own counters may have loaded it by now
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kind", "options"), [(lamb.LAMB, {"largest": 0.5}), (lion.Lion, {})])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("triton", [True, False])
def test_fused_steps_are_the_products_steps(
    kind: Any, options: dict[str, Any], corrected: bool, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[kind.__module__]
    if kind is lamb.LAMB:
        options = options | {"bias_correction": corrected}
    found = []
    for fused in (False, True):
        monkeypatch.setattr(module, "fuses", lambda weights, fused=fused: fused)
        if triton and fused:
            interpreted = functools.partial(optimizer_step.optimizer_step, backend="triton")
            monkeypatch.setattr(module, "optimizer_step", interpreted)
        draw = torch.Generator().manual_seed(2)
        weights = [nn.Parameter(torch.randn(s, generator=draw)) for s in ((30, 7), (5,))]
        optimizer = kind(weights, lr=0.01, weight_decay=0.1, **options)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw)
            optimizer.step()
        ratios = [optimizer.state[w].get("trust_ratio", torch.ones(())) for w in weights]
        found.append([*(w.detach() for w in weights), *ratios])
    for plain, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["int4", "uint4", "e4m3fn", "e2m1", "nf4", "ternary", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64)])
def test_a_grid_rounds_by_the_kernel_as_by_the_reference(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape)
    made = grid.fit(weight, named(name), group_size=16)
    want = made.round(weight)
    element = made.format.element
    assert isinstance(element, Minifloat) or element.numbers is not None
    entry = quantize.quantize_dequantize
    monkeypatch.setattr(grid, "quantize_dequantize", lambda *a: entry(*a, backend="triton"))
    assert torch.equal(made.round(weight), want)


def test_evaluation_without_padding_is_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    on = language_subject()
    want = on.evaluate(batch_size=6)
    seen: list[Tensor] = []
    real = unpadded.varlen_attention
    monkeypatch.setattr(
        unpadded, "varlen_attention", lambda q, *a, **k: (seen.append(q), real(q, *a, **k))[1]
    )
    monkeypatch.setattr(unpadded, "worthwhile", lambda model: True)
    found = on.evaluate(batch_size=6)
    assert seen and not unpadded.is_unpadded(on.model)
    assert {len(q) for q in seen} == {int(on.split("test")["attention_mask"].sum())}
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-5)
    moe = workbench.subject("bytemoe")  # not one of the trunks: left as it is
    with unpadded.unpadded(moe.model):
        assert not unpadded.is_unpadded(moe.model)
