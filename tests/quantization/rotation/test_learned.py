"""Rotations that are learned or principal: orthogonal, the function kept,
and better than where they started.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.activations.activations import rounded_inputs
from workbench.quantization.number.formats import named
from workbench.quantization.rotation.fold import random_rotation, rotate
from workbench.quantization.rotation.learned import (
    cayley_step,
    learned_rotation,
    principal,
    principal_rotation,
)
from workbench.quantization.rotation.rotate import Rotate
from workbench.quantization.transform.hadamard_orders import mixed
from workbench.subjects import Subject


def logits(on: Subject) -> torch.Tensor:
    with torch.no_grad():
        return on.task.output(on.model, next(on.batches("calibration", 2)))


def with_outliers(checkpoints: dict[str, Path], architecture: str) -> Subject:
    on = workbench.subject(checkpoints[architecture], data="random")
    with torch.no_grad():
        for name, parameter in on.model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                parameter[:, 3] += 1.0
    return on


def test_a_cayley_step_stays_orthogonal_and_descends() -> None:
    """Maximise tr(A^T R): the optimum is A's orthogonal factor, known from its SVD."""
    target = torch.randn(12, 12, dtype=torch.float64)
    left, values, right = torch.linalg.svd(target)
    rotation = random_rotation(12, "orthogonal", torch.Generator().manual_seed(1))
    if torch.det(rotation) * torch.det(left @ right) < 0:
        rotation[0] *= -1  # a continuous path does not change the determinant's sign
    scores = [float((target * rotation).sum())]
    for step in range(300):
        rotation = cayley_step(rotation, -target, 0.8 * (1 - step / 300))
        scores.append(float((target * rotation).sum()))
    assert torch.allclose(rotation @ rotation.T, torch.eye(12, dtype=torch.float64), atol=1e-10)
    assert scores[5] > scores[0] and scores[-1] == pytest.approx(float(values.sum()), rel=1e-3)
    small = cayley_step(rotation, -torch.randn(12, 12, dtype=torch.float64), 0.0)
    assert torch.allclose(small, rotation)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rotations_of_heads_keep_the_logits(checkpoints: dict[str, Path], architecture: str) -> None:
    on = with_outliers(checkpoints, architecture)
    generator = torch.Generator().manual_seed(0)
    heads = [random_rotation(8, "orthogonal", generator) for _ in range(2)]
    made = rotate(on, "orthogonal", 1, heads=heads)
    expected = logits(on)
    assert (logits(made) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    plain = rotate(on, "orthogonal", 1)
    name = "v_proj" if architecture == "llama" else "c_attn"
    first, second = (
        next(layer.weight for layer in s.layers() if layer.name.endswith(name)) for s in (made, plain)
    )
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(BadInput, match="heads"):
        rotate(on, heads=[torch.eye(4)] * 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_learned_rotation_keeps_the_logits_and_lowers_the_loss_it_minimises(
    checkpoints: dict[str, Path], architecture: str
) -> None:
    on = with_outliers(checkpoints, architecture)
    made, losses = learned_rotation(on, steps=10, examples=8, batch_size=8, activation_bits=3, rate=0.5)
    expected = logits(on)
    assert (logits(made) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert len(losses) == 10 and min(losses[1:]) < losses[0]


def test_principal_coordinates_put_the_energy_last() -> None:
    mixing = torch.randn(16, 16, dtype=torch.float64) * torch.logspace(0, 2, 16, dtype=torch.float64)
    gram = mixing.T @ mixing
    found = principal(gram, 0.25, torch.Generator().manual_seed(0))
    assert torch.allclose(found.T @ found, torch.eye(16, dtype=torch.float64), atol=1e-10)
    energy = (found.T @ gram @ found).diagonal()
    values = torch.linalg.eigvalsh(gram)
    assert float(energy[-4:].sum()) == pytest.approx(float(values[-4:].sum()))
    between = found[:, :12].T @ gram @ found[:, 12:]
    assert between.abs().max() < 1e-8 * float(values[-1])  # the two parts are uncorrelated


def test_a_principal_rotation_keeps_the_logits(checkpoints: dict[str, Path]) -> None:
    on = with_outliers(checkpoints, "llama")
    made = principal_rotation(on, examples=8)
    expected = logits(on)
    assert (logits(made) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["hadamard", "learned", "principal"])
def test_the_instrument_measures_the_spread_before_and_after(
    checkpoints: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    on = with_outliers(checkpoints, "llama")
    result = Rotate(
        kind=kind, calibration_examples=8, **({"kind.steps": 3} if kind == "learned" else {})
    ).run(on, Progress(), cache=False)
    assert result.facts["largest_change_of_logits"] < 1e-5 * max(1.0, float(logits(on).abs().max()))
    assert len(result.table) == len(on.layers())
    readers = result.table[result.table["layer"].str.endswith("q_proj")]
    if kind == "hadamard":
        assert (readers["kurtosis_rotated"] < readers["kurtosis"]).all()
    assert result.figure().data and result.figure(column="spread").data
    assert result.subject is not None
    result.save(tmp_path / "out")
    assert torch.allclose(logits(workbench.subject(tmp_path / "out")), logits(on), atol=1e-4)


def test_post_norm_models_are_refused_before_anything_runs(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="stays online"):
        Rotate().run(workbench.subject(checkpoints["bert"], data="random"), Progress(), cache=False)


def test_learning_sees_the_online_rotation_before_down_projections(checkpoints: dict[str, Path]) -> None:
    """The first loss is that of the Hadamard rotations, down-projections' inputs rounded in turned form."""
    on = with_outliers(checkpoints, "llama")
    with torch.no_grad():
        for block in on.model.model.layers:
            block.mlp.down_proj.weight.mul_(100.0)
    fields = {"steps": 1, "examples": 8, "batch_size": 8, "activation_bits": 3}
    generator = torch.Generator().manual_seed(0)
    width, head = on.model.config.hidden_size, on.model.model.layers[0].self_attn.head_dim
    stream = random_rotation(width, "hadamard", generator)
    heads = [random_rotation(head, "hadamard", generator) for _ in on.model.model.layers]
    made = rotate(on, rotation=stream, heads=heads)

    def turned_and_rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        order = args[0].shape[-1]
        rounded = rounded_inputs(mixed(args[0], order), named("uint3"), None, None)
        return (mixed(rounded, order, back=True),)

    def plainly_rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (rounded_inputs(args[0], named("uint3"), None, None),)

    for layer in made.layers("blocks"):
        hook = turned_and_rounded if layer.name.endswith("down_proj") else plainly_rounded
        layer.module.register_forward_pre_hook(hook)
    with torch.no_grad():
        expected = float(made.task.loss(made.model, next(made.batches("calibration", 8, 8))))
    _, (online,) = learned_rotation(on, **fields, online=True)
    _, (without,) = learned_rotation(on, **fields)
    assert online == pytest.approx(expected, rel=1e-4) and without != pytest.approx(online, rel=1e-4)
