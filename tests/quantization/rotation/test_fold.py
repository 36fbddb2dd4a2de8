"""Folded rotations keep the function; what cannot be folded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization.activations.activations import input_ranges
from workbench.quantization.rotation.fold import random_rotation, rotate
from workbench.quantization.rotation.rotate import NoiseGains, Rotate
from workbench.subjects import Subject


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


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_drawn_rotations_turn_the_heads_too(checkpoints: dict[str, Path], kind: str) -> None:
    on = workbench.subject(checkpoints["llama"], data="random")
    found = Rotate(kind=kind, calibration_examples=4).run(on, Progress(), cache=False)
    turned = Rotate(kind={"name": kind, "heads": True}, calibration_examples=4).run(
        on, Progress(), cache=False
    )
    for result in (found, turned):
        assert result.facts["largest_change_of_logits"] < 1e-4
    one, other = ({layer.name: layer.weight for layer in r.subject.layers("*")} for r in (found, turned))
    changed = {
        name.rsplit(".", 1)[-1] for name in one if not torch.allclose(one[name], other[name], atol=1e-4)
    }
    assert changed == {"v_proj", "o_proj"}


def gains(subject: Subject) -> dict[str, float]:
    layers = subject.layers("blocks")
    noise = NoiseGains(layers)
    return {name: noise.of(name) for name in input_ranges(subject, layers, examples=4, also=noise.add)}


def test_noise_gain_is_what_white_noise_does_to_the_outputs(checkpoints: dict[str, Path]) -> None:
    """A massive feature that a norm's scale hides raises it once folded; a rotation leaves it as it is."""
    on = workbench.subject(checkpoints["llama"], data="random")
    with torch.no_grad():
        on.model.model.embed_tokens.weight[:, 5] *= 50
        on.model.model.layers[0].post_attention_layernorm.weight[5] = 0.02
    subjects = (on, rotate(on, "identity"), rotate(on, "hadamard"))
    plain, folded, turned = (gains(s) for s in subjects)
    gate = "model.layers.0.mlp.gate_proj"
    assert folded[gate] > 2 * plain[gate]
    assert turned[gate] == pytest.approx(folded[gate], rel=1e-3)
    assert plain["model.layers.0.mlp.down_proj"] == pytest.approx(
        folded["model.layers.0.mlp.down_proj"], rel=1e-3
    )
    layer = next(layer for layer in on.layers("blocks") if layer.name == gate)
    captured: list[torch.Tensor] = []
    handle = layer.module.register_forward_pre_hook(lambda module, args: captured.append(args[0].detach()))
    on.task.output(on.model, next(on.batches("calibration", 4)))
    handle.remove()
    inputs = captured[0].flatten(0, -2)
    noise = torch.randn(400, *layer.weight.shape)
    relative = ((inputs @ noise.mT).square().sum() / 400) / (inputs @ layer.weight.mT).square().sum()
    measured = float(relative / (noise.square().sum() / 400) * layer.weight.square().sum())
    assert plain[gate] == pytest.approx(measured, rel=0.05)
