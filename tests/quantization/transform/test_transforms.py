"""Equivalent transforms and activation rounding: exact without rounding, helpful with outliers,
saved and opened again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.kernels.quantized.hadamard import hadamard_matrix
from workbench.progress import Progress
from workbench.quantization import Quantize
from workbench.quantization.activations.activations import (
    ActivationQuant,
    KeyValueQuant,
    input_ranges,
    key_value_layers,
    widest,
)
from workbench.quantization.number.formats import named
from workbench.quantization.rounding.nearest import rounded
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.transform.coordinates import Transform, kronecker
from workbench.quantization.transform.flatquant import factor, factors_of
from workbench.quantization.transform.hadamard_orders import power_of_two
from workbench.quantization.transform.transform import TRANSFORM, in_coordinates
from workbench.subjects import Subject
from workbench.subjects.changes import Mask

SMALL = {"calibration_examples": 8, "predict_examples": 0, "test_examples": 4, "group_size": 16}


def coordinates(problem: Problem, name: str, steps: int = 100) -> tuple[Problem, Transform | None]:
    """`steps` where the transform learns."""
    learns = "steps" in TRANSFORM[name].options.model_fields
    return in_coordinates(problem, name, **({"steps": steps} if learns else {}))


@pytest.fixture()
def bert(checkpoints: dict[str, Path]) -> Subject:
    return workbench.subject(checkpoints["bert"], data="random")


def with_outliers() -> Problem:
    inputs = torch.randn(500, 48) @ (torch.eye(48) + 0.2 * torch.randn(48, 48))
    inputs[:, :3] *= 30
    return Problem(
        torch.randn(32, 48),
        inputs.T @ inputs,
        named("int4"),
        "channel",
        largest=inputs.abs().amax(0),
    )


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_symmetric(size: int) -> None:
    matrix = hadamard_matrix(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12) and torch.equal(
        matrix, matrix.T
    )
    assert power_of_two(384) == 128 and power_of_two(1536) == 512 and power_of_two(7) == 1


@pytest.mark.parametrize("name", sorted(set(TRANSFORM) - {"none"}))
def test_products_and_moments_are_kept(name: str) -> None:
    problem = with_outliers()
    moved, transform = coordinates(problem, name)
    assert transform is not None
    x = torch.randn(10, 48)
    assert torch.allclose(moved.weight @ transform.inputs(x).T, problem.weight @ x.T, rtol=1e-3, atol=1e-3)
    assert torch.allclose(transform.weight_back(moved.weight), problem.weight, atol=1e-4)
    assert torch.allclose(transform.inputs_back(transform.inputs(x)), x, atol=1e-4)
    assert moved.error(torch.zeros_like(moved.weight)) == pytest.approx(1.0)
    rows = torch.randn(100, 48)
    there = transform.inputs(rows)
    assert torch.allclose(transform.gram(rows.T @ rows), there.T @ there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["activation-aware", "teq", "flatquant"])
def test_output_error_falls_with_outlying_inputs(name: str) -> None:
    problem = with_outliers()
    plain = problem.error(rounded(problem, "nearest")[0])
    moved, transform = coordinates(problem, name)
    assert transform is not None
    assert problem.error(transform.weight_back(rounded(moved, "nearest")[0])) < 0.7 * plain


def test_a_kronecker_product_is_the_dense_one() -> None:
    left, right, rows = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (6, 6), (7, 24)))
    dense = torch.kron(left, right)
    assert torch.allclose(kronecker(rows, left.T, right), rows @ dense)
    transform = Transform(left=left, right=right)
    assert torch.allclose(transform.weight(rows), rows @ dense)
    assert torch.allclose(transform.inputs(rows), torch.linalg.solve(dense, rows.T).T)
    assert torch.allclose(transform.inputs_back(transform.inputs(rows)), rows)
    assert factors_of(384) == (16, 24) and factors_of(7) == (1, 7) and factors_of(1536) == (32, 48)
    stack = torch.stack([left, 2 * left])
    both = Transform(left=stack, right=torch.stack([right, right])).weight(torch.stack([rows, rows]))
    assert torch.allclose(both[1], 2 * both[0])
    gram = rows.T @ rows
    assert torch.allclose(factor(gram).T @ factor(gram), gram, atol=1e-8)


def test_flatquant_lowers_the_error_of_rounded_weights_and_inputs() -> None:
    """Four-bit weights and inputs with outlying features: below none, scaling and a Hadamard rotation,
    as the paper orders them.
    """
    inputs = torch.randn(300, 48) @ (torch.eye(48) + 0.2 * torch.randn(48, 48))
    inputs[:, :3] *= 30
    weight = torch.randn(32, 48)
    problem = Problem(
        weight,
        inputs.T @ inputs,
        named("int4"),
        "channel",
        largest=inputs.abs().amax(0),
        rows=inputs,
        activation=named("uint4"),
    )
    exact, errors = inputs @ weight.T, {}
    for name in ("none", "smooth", "hadamard", "flatquant"):
        moved, transform = coordinates(problem, name)
        rounded = moved.grid().round(moved.weight)
        change = ActivationQuant(
            **(transform or Transform()).tensors, format="uint4", block=transform.block if transform else 0
        )
        back = rounded if transform is None else transform.weight_back(rounded)
        errors[name] = float((change.round(inputs) @ back.T - exact).square().sum() / exact.square().sum())
    assert errors["flatquant"] < 0.8 * min(errors["none"], errors["smooth"], errors["hadamard"])


def test_resq_keeps_the_principal_eighth_wide() -> None:
    """Correlated inputs, four bits with an eighth of the features at eight:
    principal components beat picking features, and no split.
    """
    inputs = torch.randn(400, 32) @ torch.randn(32, 32) * 0.05 + torch.randn(400, 4) @ torch.randn(4, 32)
    problem = Problem(torch.randn(16, 32), inputs.T @ inputs, named("int8"), "channel")
    errors = {}
    for name, share in (("none", 0.0), ("none", 0.125), ("hadamard", 0.125), ("resq", 0.125)):
        moved, transform = coordinates(problem, name)
        wide = widest(moved.gram, share) if share else None
        assert wide is None or int(wide.sum()) == 4
        found = transform or Transform()
        change = ActivationQuant(
            **found.tensors, wide=wide, format="uint4", block=found.block, orthogonal=found.orthogonal
        )
        errors[name, share] = float((change.round(inputs) - inputs).square().sum() / inputs.square().sum())
    assert errors["resq", 0.125] < 0.3 * min(v for k, v in errors.items() if k[0] != "resq")


@pytest.mark.parametrize("transform", ["smooth", "hadamard"])
def test_activation_error_falls_with_outlying_features(transform: str) -> None:
    """8-bit inputs with three features thirty times the others: a shared scale wastes its steps on them."""
    inputs = torch.randn(500, 64)
    inputs[:, :3] *= 30
    problem = Problem(
        torch.randn(16, 64), inputs.T @ inputs, named("int8"), "channel", largest=inputs.abs().amax(0)
    )
    _, found = in_coordinates(problem, transform, **({"alpha": 0.8} if transform == "smooth" else {}))
    assert found is not None
    exact = inputs @ problem.weight.T
    errors = []
    for coordinates in (Transform(), found):
        change = ActivationQuant(
            None, None, coordinates.scale, coordinates.signs, format="uint6", block=coordinates.block
        )
        errors.append(float((change.round(inputs) @ problem.weight.T - exact).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("transform", ["smooth", "activation-aware", "teq", "hadamard"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_with_every_rounding_and_saved(bert: Subject, tmp_path: Path, transform: str, rounding: str) -> None:
    result = Quantize(**SMALL, transform=transform, rounding=rounding, activations="token").run(
        bert, Progress(), cache=False
    )
    result.save(tmp_path / "out")
    again = workbench.subject(tmp_path / "out")
    assert result.subject is not None
    assert again.evaluate("test")["loss"] == pytest.approx(result.subject.evaluate("test")["loss"], abs=1e-6)
    layer = result.subject.layers()[0]
    assert torch.allclose(layer.changes[0].change(layer.weight), layer.weight, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("granularity", ["token", "tensor", "channel"])
def test_eight_bit_activations_stay_close(
    checkpoints: dict[str, Path], architecture: str, granularity: str
) -> None:
    on = workbench.subject(checkpoints[architecture], data="random")
    made = Quantize(**SMALL, format="bf16", activations=granularity).run(on, Progress(), cache=False).subject
    coarse = (
        Quantize(**SMALL, format="bf16", activations={"name": granularity, "format": "uint2"})
        .run(on, Progress(), cache=False)
        .subject
    )
    assert made is not None and coarse is not None
    batch = next(iter(on.batches("calibration", 4)))
    with torch.no_grad():
        exact, near, far = (s.task.output(s.model, batch) for s in (on, made, coarse))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm() and (near - exact).norm() < (far - exact).norm()


def test_the_hook_rounds_exactly_what_the_layer_reads(bert: Subject) -> None:
    made = (
        Quantize(**SMALL, format="bf16", activations={"name": "token", "format": "uint3"})
        .run(bert, Progress(), cache=False)
        .subject
    )
    assert made is not None
    layer, seen = made.layers()[0], []
    layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made.task.output(made.model, next(iter(made.batches("calibration", 2))))
    tokens = seen[0].detach().reshape(-1, seen[0].shape[-1])
    assert all(len(torch.unique(row)) <= 8 for row in tokens[:10])


@pytest.mark.parametrize(
    "fields",
    [
        {"transform": "resq", "activations.wide_share": 0.125},
        {"transform": "flatquant", "transform.steps": 5},
        {"activations.wide_share": 0.25, "activations": "tensor"},
        {"transform": "resq", "activations.wide_share": 0.125, "activations": "channel"},
    ],
)
def test_mixed_and_learned_coordinates_run_and_open_again(
    bert: Subject, fields: dict[str, object], tmp_path: Path
) -> None:
    result = Quantize(**(SMALL | {"activations": "token", "activations.format": "uint4"} | fields)).run(
        bert, Progress(), cache=False
    )
    result.save(tmp_path / "out")
    assert result.subject is not None
    again = workbench.subject(tmp_path / "out")
    assert again.evaluate("test")["loss"] == pytest.approx(result.subject.evaluate("test")["loss"], abs=1e-6)


def test_again_replaces_the_hook(bert: Subject) -> None:
    once = Quantize(**SMALL, activations="token").run(bert, Progress(), cache=False).subject
    assert once is not None
    twice = Quantize(**SMALL, activations="tensor").run(once, Progress(), cache=False).subject
    assert twice is not None
    for layer in twice.layers():
        assert len(layer.module._forward_pre_hooks) == 1
        assert [c.granularity for c in layer.changes if isinstance(c, ActivationQuant)] == ["tensor"]


def test_key_value_rounding(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    made = Quantize(**SMALL, format="bf16", kv_bits=4).run(on, Progress(), cache=False).subject
    assert made is not None
    names = {
        layer.name.rsplit(".", 1)[-1]
        for layer in made.layers()
        if any(isinstance(c, KeyValueQuant) for c in layer.changes)
    }
    assert names == {"k_proj", "v_proj"}
    layer = key_value_layers(made.layers())[0]
    out = layer.module(torch.randn(1, 3, 32)).reshape(-1, 8)  # groups of one head
    assert all(len(torch.unique(row)) <= 16 for row in out.detach())


def test_ranges_equal_a_direct_computation(bert: Subject) -> None:
    layer, seen = bert.layers()[0], []
    handle = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = input_ranges(bert, [layer], examples=6, batch_size=3)[layer.name]
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in bert.batches("calibration", 3, 6)]
    rows = torch.cat([x[m] for x, m in zip(seen, masks, strict=True)])
    assert torch.equal(found.high[0], rows.amax(0).clamp_min(0)) and int(found.tokens) == len(rows)
    assert float(found.kurtosis) == pytest.approx(
        float(rows.pow(4).mean() / rows.pow(2).mean() ** 2), rel=1e-4
    )


def test_refusals(bert: Subject, checkpoints: dict[str, Path]) -> None:
    layer = bert.layers()[0]
    layer.attach(Mask(torch.rand(layer.shape) < 0.5))
    with pytest.raises(BadInput, match="transform: hadamard"):
        Quantize(**SMALL, transform="hadamard").run(bert, Progress(), cache=False)
    with pytest.raises(BadInput, match="activations"):
        Quantize(**SMALL, activations="token").run(
            workbench.subject(checkpoints["mixtral"], data="random"), Progress(), cache=False
        )
    with pytest.raises(BadInput, match="activations.wide_share"):
        Quantize(**SMALL, **{"activations.wide_share": 0.125}).run(bert, Progress(), cache=False)
    with pytest.raises(BadInput, match="kv_bits"):
        Quantize(**SMALL, kv_bits=4, layers="*.output.dense").run(bert, Progress(), cache=False)
    with pytest.raises(BadInput, match="objective"):
        Quantize(
            **SMALL, rounding={"name": "signround", "objective": "block"}, transform="activation-aware"
        ).run(bert, Progress(), cache=False)


def test_hadamard_rotates_the_layers_it_is_told_to(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    fields = {"format": "int4", "granularity": "channel", "calibration_examples": 4, "predict_examples": 0}
    errors = {}
    for name, transform in (
        ("none", "none"),
        ("down", {"name": "hadamard", "only": "*.down_proj"}),
        ("all", "hadamard"),
    ):
        table = Quantize(**fields, transform=transform).run(on, Progress(), cache=False).table
        errors[name] = table.set_index("layer")["weight_error"]
    same = errors["none"] == errors["down"]
    assert {name.rsplit(".", 1)[-1] for name in same.index[~same]} == {"down_proj"}
    assert not (errors["none"] == errors["all"]).any()
