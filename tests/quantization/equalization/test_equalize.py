"""Scales folded into norms and linear layers: the function stays, the scales are the authors',
and what cannot be folded is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Equalize, Quantize, fit, rotate
from workbench.quantization.equalization.scale_groups import scale_groups
from workbench.quantization.number.formats import named
from workbench.results import Result
from workbench.subjects import Subject

SEARCH = {"name": "awq", "format": "uint3", "group_size": 16, "ratios": 5}


def with_scales(on: Subject) -> Subject:
    """Norms' scales and biases that matter, and an input feature that is larger than the others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in on.model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
                if "norm" in name or "ln_" in name:
                    parameter[3] *= 20
    return on


def equalized(on: Subject, kind: Any) -> Result:
    return Equalize(kind=kind, calibration_examples=8).run(on, Progress(), cache=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["smoothquant", SEARCH])
def test_the_function_is_kept(checkpoints: dict[str, Path], architecture: str, kind: Any) -> None:
    on = with_scales(workbench.subject(checkpoints[architecture], data="random"))
    result = equalized(on, kind)
    made = result.subject
    batch = next(on.batches("test", 2))
    with torch.no_grad():
        expected, found = on.task.output(on.model, batch), made.task.output(made.model, batch)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    one, other = on.layers("blocks")[0].weight, made.layers("blocks")[0].weight
    assert not torch.allclose(one, other, atol=1e-2)
    assert set(result.table["group"]) <= {group.giver for group in scale_groups(on.model)}


def inputs_of(on: Subject, name: str) -> Tensor:
    """(tokens, in) of the calibration examples that every test here takes, by a hook."""
    seen: list[Tensor] = []
    module = on.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in on.batches("calibration", 4, 8):
            on.task.output(on.model, batch)
    handle.remove()
    return torch.cat(seen)


def test_smoothquant_scales_are_equation_4_over_all_readers(checkpoints: dict[str, Path]) -> None:
    on = with_scales(workbench.subject(checkpoints["llama"], data="random"))
    made = equalized(on, {"name": "smoothquant", "alpha": 0.7}).subject
    block = "model.layers.1."
    names = [f"{block}self_attn.{part}_proj" for part in "qkv"]
    largest = inputs_of(on, names[0]).abs().amax(0)
    weights = {name: on.model.get_submodule(name).weight.detach() for name in names}
    scale = largest**0.7 / torch.cat(list(weights.values())).abs().amax(0) ** 0.3
    for name in names:
        assert torch.allclose(made.model.get_submodule(name).weight, weights[name] * scale, rtol=1e-5)
    norm = f"{block}input_layernorm"
    assert torch.allclose(
        made.model.get_submodule(norm).weight, on.model.get_submodule(norm).weight / scale, rtol=1e-5
    )
    for name in (f"{block}self_attn.o_proj", f"{block}mlp.down_proj"):  # they read no norm
        assert torch.equal(made.model.get_submodule(name).weight, on.model.get_submodule(name).weight)


def test_awq_takes_the_power_with_the_least_error_of_the_network_it_is_in(
    checkpoints: dict[str, Path],
) -> None:
    """By brute force: the feed-forward network called by itself with every power's weights."""
    on = with_scales(workbench.subject(checkpoints["llama"], data="random"))
    result = equalized(on, SEARCH)
    name = "model.layers.1.mlp"
    inputs = inputs_of(on, f"{name}.gate_proj")
    network: Any = on.copy().model.get_submodule(name)
    size = inputs.abs().mean(0)
    errors, scales = [], []
    with torch.no_grad():
        dense = network(inputs)
        kept = {part: getattr(network, part).weight.clone() for part in ("gate_proj", "up_proj")}
        for step in range(5):
            scale = (size ** (step / 5)).clamp_min(1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            for part, weight in kept.items():
                grid = fit(weight * scale, named("uint3"), "group", 16, "minmax")
                getattr(network, part).weight.copy_(grid.round(weight * scale) / scale)
            errors.append(float((network(inputs) - dense).square().sum() / dense.square().sum()))
            scales.append(scale)
    found = result.table.set_index("group").loc["model.layers.1.post_attention_layernorm"]
    best = min(range(5), key=errors.__getitem__)
    assert found["exponent"] == best / 5 > 0  # the large feature is worth a scale
    assert found["error"] == pytest.approx(errors[best], rel=1e-3)
    assert found["error_unscaled"] == pytest.approx(errors[0], rel=1e-3)
    assert found["scale_high"] == pytest.approx(float(scales[best].max()), rel=1e-4)
    assert list(result.figure("error").data[0].y) == list(result.table["error_unscaled"])


def test_values_are_scaled_where_every_query_head_has_its_own(checkpoints: dict[str, Path]) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for heads, groups in ((4, True), (2, False)):
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=heads)
        givers = [group.giver for group in scale_groups(LlamaForCausalLM(config))]
        assert ("model.layers.0.self_attn.v_proj" in givers) is groups
        assert "model.layers.0.mlp.up_proj" in givers


def test_what_is_scaled_is_plain_and_rounds_better(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    on = with_scales(workbench.subject(checkpoints["llama"], data="random"))
    made = equalized(on, SEARCH).subject
    grid = {"format": "uint3", "granularity": "group", "group_size": 16, "calibration_examples": 8}
    before, after = (Quantize(**grid, range="minmax").run(s, Progress(), cache=False) for s in (on, made))
    error = "output_error"
    assert after.table[error].mean() < before.table[error].mean()
    after.subject.save(tmp_path / "saved")
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    batch = next(on.batches("test", 2))
    with torch.no_grad():
        expected = after.subject.task.output(after.subject.model, batch)
        assert torch.allclose(opened(input_ids=batch["input_ids"]).logits, expected, atol=1e-5)


def test_post_norm_models_are_told_to_stay_online(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="stays online"):
        equalized(workbench.subject(checkpoints["bert"], data="random"), "smoothquant")


@pytest.mark.parametrize("fold", [lambda on: equalized(on, "smoothquant"), rotate])
def test_norms_that_add_one_to_their_weight_are_refused(fold: Any, tmp_path: Path) -> None:
    """A module that looks like one that is known and computes something else: what was folded is compared
    with what the model gave before. Gemma's norms multiply by 1 + weight, and Gemma 2 has two more a block.
    """
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="does not keep its function"):
        fold(workbench.subject(tmp_path, data="random"))


def test_the_transform_of_one_release_ago_says_its_new_name() -> None:
    with pytest.warns(FutureWarning, match="equalize"):
        assert Quantize(transform="awq").transform == "activation-aware"
