"""Kind: bytes, files and arithmetic follow the number format that a model has or was opened from."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

import workbench
from workbench.latency import Latency, saved_size
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.subjects.structure.dimensions import shrink


def plain(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(48, 16)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)).to(dtype)
    data = {"inputs": inputs.to(dtype), "labels": inputs[:, :5].argmax(-1)}
    return workbench.subject(net, data=data, loss="cross_entropy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_exchanges_of_weights_in_every_format(dtype):
    fields = {"method": "icbs", "method.gradients": 8, "sparsity": 0.5, "predict_examples": 0}
    found = Prune(**fields).run(plain(dtype), Progress(), cache=False)
    assert found.facts["sparsity"] == pytest.approx(0.5)
    assert {p.dtype for p in found.subject.model.parameters()} == {dtype}
    size, weights = dtype.itemsize, 16 * 24 + 24 * 5
    assert found.facts["dense_bytes"] == size * weights
    assert found.facts["packed_bytes"] == size * weights // 2 + weights // 8


def narrow_bytes(subject):
    """2 for each parameter, 4 for each number of a buffer (rotary frequencies)."""
    return 2 * subject.parameter_count() + 4 * sum(b.numel() for b in subject.model.buffers())


def opened(dtype, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=60, **sizes)).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    return workbench.subject(tmp_path / "dense", data="random", max_examples=24, max_length=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layers", "channels"])
def test_a_smaller_model_of_a_narrow_checkpoint_is_a_smaller_file(kind, dtype, tmp_path):
    on = opened(dtype, tmp_path)
    kept = torch.arange(2 if kind == "layers" else 32) < (1 if kind == "layers" else 16)
    small = on.with_model(shrink(on.model, kind, kept))
    assert saved_size(on.model) == narrow_bytes(on)
    assert saved_size(small.model) == narrow_bytes(small)
    small.save(tmp_path / "small")
    files = [tmp_path / folder / "model.safetensors" for folder in ("dense", "small")]
    assert files[1].stat().st_size < 0.75 * files[0].stat().st_size


def test_bytes_of_a_narrow_checkpoint_in_facts(tmp_path):
    on = opened(torch.bfloat16, tmp_path)
    found = Prune(method="minitron", pattern="layers", calibration_examples=8, predict_examples=0).run(
        on, Progress(), cache=False
    )
    assert found.facts["dense_bytes"] == 2 * found.facts["dense_parameters"]
    assert found.facts["packed_bytes"] == 2 * found.facts["parameters"]
    told = Latency(repeats=3, formats=False).run(on, Progress(), cache=False).facts
    assert told["dense_bytes"] == told["packed_bytes"] == narrow_bytes(on)


def test_a_wider_checkpoint_says_that_it_is_opened_narrower(tmp_path):
    on = opened(torch.float64, tmp_path)
    assert "float64 weights of the file are opened, and saved, in float32" in on.data_note


def test_heads_are_counted_beside_the_weights(tmp_path):
    on = opened(torch.float32, tmp_path)
    found = Prune(method="magnitude", pattern="heads", predict_examples=0).run(on, Progress(), cache=False)
    assert (found.facts["units"], found.facts["units_left"]) == (8, 4)
    assert found.facts["sparsity"] < 0.5
