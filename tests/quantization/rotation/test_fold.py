"""Folded rotations keep the function; what cannot be folded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.quantization.rotation.fold import random_rotation, rotate


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bytelm"])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_logits_are_kept(checkpoints: dict[str, Path], architecture: str, kind: str) -> None:
    on = (
        workbench.subject("bytelm")
        if architecture == "bytelm"
        else workbench.subject(checkpoints[architecture], data="random")
    )
    with torch.no_grad():
        for parameter in (p for n, p in on.model.named_parameters() if p.ndim == 1):
            parameter.add_(0.1 * torch.randn(parameter.shape))  # scales and biases that matter
    turned = rotate(on, kind, seed=3)
    batch = next(on.batches("calibration", 2))
    with torch.no_grad():
        expected, found = on.task.output(on.model, batch), turned.task.output(turned.model, batch)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    before, after = (s.layers("*")[0].weight for s in (on, turned))
    assert not torch.allclose(before, after, atol=1e-2)


def test_rotations_spread_an_outlying_direction(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    with torch.no_grad():
        on.model.model.embed_tokens.weight[:, 5] += 2.0
    batch = next(on.batches("calibration", 2))

    def peak(subject: object) -> float:
        with torch.no_grad():
            states = subject.model(**subject.task.inputs(batch), output_hidden_states=True).hidden_states[1]  # type: ignore[attr-defined]
        return float(states.abs().amax() / states.square().mean().sqrt())

    assert peak(rotate(on, "hadamard")) < 0.6 * peak(on)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "identity"])
def test_rotations_are_orthogonal(kind: str) -> None:
    matrix = random_rotation(48, kind, torch.Generator().manual_seed(0))
    assert torch.allclose(matrix @ matrix.T, torch.eye(48, dtype=torch.float64), atol=1e-12)


def test_post_norm_models_are_told_to_stay_online(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="stays online"):
        rotate(workbench.subject(checkpoints["bert"], data="random"))


def test_a_matrix_that_is_no_rotation_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="orthogonal"):
        rotate(workbench.subject(checkpoints["llama"], data="random"), rotation=torch.ones(32, 32))
