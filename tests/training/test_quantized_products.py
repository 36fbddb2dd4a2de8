"""Quantized products of training: exact without rounding at every level, the stated formula with it,
smaller errors on heavy tails.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import workbench
from workbench.errors import BadInput
from workbench.quantization.number.formats import named
from workbench.subjects import Mask
from workbench.training import fit
from workbench.training.precision.precision import PRECISION
from workbench.training.quantized_products import (
    QuantizedLinear,
    QuantizedProducts,
    over_features,
    over_tokens,
    relative_errors,
    rounded,
)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 5, 128, 200])
def test_without_rounding_every_level_is_the_plain_layer(level: int, tokens: int) -> None:
    x, weight = torch.randn(3, tokens, 48, requires_grad=True), torch.randn(20, 48, requires_grad=True)
    upstream = torch.randn(3, tokens, 20)
    plain = F.linear(x, weight)
    expected = torch.autograd.grad(plain, (x, weight), upstream)
    found = QuantizedLinear.apply(x, weight, None, level)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, (x, weight), upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_rotations_are_orthogonal_and_their_own_inverses() -> None:
    rows = torch.randn(256, 24, dtype=torch.float64)
    for turn in (over_features, over_tokens):
        assert (
            torch.allclose(turn(turn(rows)), rows)
            and torch.allclose(turn(rows).norm(), rows.norm())
            and not torch.allclose(turn(rows), rows)
        )


def test_rounding_uses_one_scale_a_tensor() -> None:
    x = torch.tensor([[-12.7, 0.04, 0.06], [3.33, 1.0, 0.0]])
    assert torch.allclose(rounded(x, named("int8")), torch.tensor([[-12.7, 0.0, 0.1], [3.3, 1.0, 0.0]]))
    assert torch.equal(rounded(torch.zeros(2, 2), named("int8")), torch.zeros(2, 2))
    tiny = torch.tensor([1e-12, -3e-12])  # gradients are this small: the scale is not kept in 16 bits
    assert torch.allclose(rounded(tiny, named("int8")), tiny, rtol=1e-2)


def test_the_three_products_are_those_of_the_formula() -> None:
    form, x, weight = (
        named("int4"),
        torch.randn(32, 16, requires_grad=True),
        torch.randn(8, 16, requires_grad=True),
    )
    upstream = torch.randn(32, 8)
    turn, mix = over_features(torch.eye(16)), over_tokens(torch.eye(32))
    for level in (0, 1, 2):
        y = QuantizedLinear.apply(x, weight, form, level)
        dx, dw = torch.autograd.grad(y, (x, weight), upstream)
        side = turn if level else torch.eye(16)
        with torch.no_grad():
            torch.testing.assert_close(y, rounded(x @ side, form) @ rounded(weight @ side, form).T)
            expected = (
                mix.T @ rounded(mix @ upstream, form) @ rounded(weight, form)
                if level == 2
                else rounded(upstream, form) @ rounded(weight, form)
            )
            torch.testing.assert_close(dx, expected)
            torch.testing.assert_close(dw, rounded(upstream, form).T @ rounded(x, form))


@pytest.mark.parametrize("level", [0, 2])
def test_gradients_have_a_format_of_their_own(level: int) -> None:
    """FP8 training: X and W in E4M3, dY in E5M2; Micikevicius et al. 2022, section 3."""
    values, gradients = named("e4m3fn"), named("e5m2")
    x, weight = torch.randn(32, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    upstream = torch.randn(32, 8)
    y = QuantizedLinear.apply(x, weight, values, level, gradients)
    dx, dw = torch.autograd.grad(y, (x, weight), upstream)
    with torch.no_grad():
        mix = over_tokens(torch.eye(32)) if level == 2 else torch.eye(32)
        expected = mix.T @ rounded(mix @ upstream, gradients) @ rounded(weight, values)
        torch.testing.assert_close(dx, expected)
        torch.testing.assert_close(dw, rounded(upstream, gradients).T @ rounded(x, values))
        assert not torch.allclose(dw, rounded(upstream, values).T @ rounded(x, values))


def test_both_formats_are_spelled_in_one_word_each() -> None:
    chosen = PRECISION.chosen("e4m3fn rotation 1 gradients e5m2")
    assert (chosen.options.format, chosen.options.rotation) == ("e4m3fn", 1)
    assert chosen.options.gradient_format == "e5m2" and str(chosen) == "e4m3fn rotation 1 gradients e5m2"
    assert str(PRECISION.chosen("e4m3fn gradients e5m2")) == "e4m3fn gradients e5m2"
    with pytest.raises(BadInput):
        PRECISION.chosen("e4m3fn gradients e9")


@pytest.mark.parametrize("format", ["int8", "int6", "e3m2"])
def test_rotation_helps_where_tails_are_heavy(format: str) -> None:
    x, weight, error = torch.randn(256, 128), torch.randn(64, 128), torch.randn(256, 64)
    heavy = relative_errors(
        x * (1 + 50 * (torch.arange(128) % 61 == 3)),
        weight,
        error * (1 + 50 * (torch.arange(256) % 97 == 5))[:, None],
        named(format),
    )
    even = relative_errors(x, weight, error, named(format))
    if format.startswith("int"):
        assert heavy["XH"] < 0.5 * heavy["X"] and heavy["KE"] < 0.5 * heavy["E"]
        assert heavy["Y rotated"] < 0.5 * heavy["Y"] and heavy["dX rotated"] < 0.5 * heavy["dX"]
    assert even["XH"] == pytest.approx(even["X"], rel=0.35) and even["KE"] == pytest.approx(
        even["E"], rel=0.35
    )


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_a_subjects_linears_are_found_masked_or_not(architecture: str, checkpoints) -> None:
    on = workbench.subject(checkpoints[architecture], data="random", max_length=12)
    on.model.eval()
    layers, batch = on.layers(), next(on.batches("train", 4))
    layers[0].attach(Mask(torch.rand(layers[0].shape) < 0.5))
    trained = [p for p in on.model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(on.loss(batch), trained, allow_unused=True)
    for level in (0, 1, 2):
        with QuantizedProducts(layers, "", level):
            found = torch.autograd.grad(on.loss(batch), trained, allow_unused=True)
        assert all(
            (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(found, plain, strict=True)
        )
    calls = []
    with QuantizedProducts(layers, "int3", 1) as products:
        whole = products.found
        products.found = lambda weight: (
            calls.append(1) or whole(weight) if whole(weight) is not None else None
        )  # type: ignore[method-assign]
        rough = on.loss(batch).item()
    assert len(calls) == len(layers) and rough != pytest.approx(on.loss(batch).item(), rel=1e-6)


@pytest.mark.parametrize("rotation", [0, 2])
def test_training_with_quantized_products(rotation: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(128, 4)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    on = workbench.subject(net, data={"inputs": inputs, "labels": (inputs @ torch.randn(4, 3)).argmax(1)})
    run = fit(
        on,
        steps=60,
        learning_rate=1e-2,
        precision={"name": "rounded", "format": "int8", "rotation": rotation},
    )
    assert run.history.loss.iloc[-5:].mean() < 0.7 * run.history.loss.iloc[0]
    assert all(p.dtype == torch.float32 for p in on.model.parameters())


def test_what_cannot_run_is_refused(checkpoints) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    on = workbench.subject(net, data={"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))})
    for fields, field in (
        ({"precision": "int8 rotation 3"}, r"precision\.rotation"),
        ({"precision": {"name": "fp32", "rotation": 1}}, r"precision\.rotation"),
        ({"precision": "mxfp8"}, "precision"),
        ({"precision": "uint8"}, "precision"),
        ({"precision": "tf32"}, "precision"),
    ):
        with pytest.raises(BadInput, match=f"^{field}: "):
            fit(on, steps=1, **fields)
    with pytest.raises(BadInput, match="^precision: .*stack of experts"):
        QuantizedProducts(
            workbench.subject(checkpoints["mixtral"], data="random", max_length=12).layers(), "int8"
        )
