"""Kind: a removal changes a number of the configuration that other parts of an architecture follow too, or
that it ties to something else: what is left opens again, or one line says why it cannot go before anything
is scored or trained.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t

import workbench
from workbench.errors import BadInput
from workbench.latency import count_flops
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.engine import dimensions, structure_events
from workbench.subjects.structure.dimensions import extent, shrink
from workbench.subjects.structure.removal import remove
from workbench.subjects.structure.units import discover

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
SHARED = SIZES | {"num_key_value_heads": 1}
RELATIVE = SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OPT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BIGCODE = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
LINEAR = ["full_attention", "linear_attention"]

MODELS = {
    "minimax": lambda: t.MiniMaxForCausalLM(
        t.MiniMaxConfig(
            **GROUPED,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=LINEAR,
            block_size=8,
        )
    ),
    "diffllama": lambda: t.DiffLlamaForCausalLM(t.DiffLlamaConfig(**GROUPED)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHARED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SHARED, head_dim=8)),
    "bigcode": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**BIGCODE, multi_query=True)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)),
    "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**SIZES, embedding_size=16)),
    "electra-square": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**SIZES, embedding_size=32)),
    "esm": lambda: t.EsmForMaskedLM(t.EsmConfig(**SIZES, mask_token_id=4, position_embedding_type="rotary")),
    "deberta": lambda: t.DebertaForMaskedLM(t.DebertaConfig(**RELATIVE)),
    "deberta-v2": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**RELATIVE, position_buckets=8)),
}


def opened(name, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "dense")
    return workbench.subject(tmp_path / "dense", data="random", max_examples=24, max_length=8)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("minimax", "heads"),
        ("llama", "channels"),
        ("mistral", "channels"),
        ("opt", "channels"),
        ("electra-square", "channels"),
        ("deberta-v2", "layers"),
    ],
)
def test_what_is_left_opens_again(name, pattern, tmp_path):
    on = opened(name, tmp_path)
    if pattern == "heads":
        halves = [torch.tensor([[True, False]]) for _ in discover(on.model, ("heads",))]
        kept = {g.name: half for g, half in zip(discover(on.model, ("heads",)), halves, strict=True)}
        small = on.with_model(remove(copy.deepcopy(on.model), kept))
    else:
        total = extent(on.model, pattern)[0]
        small = on.with_model(shrink(on.model, pattern, torch.arange(total) < total // 2))
    assert small.parameter_count() < on.parameter_count()
    small.save(tmp_path / "small")
    batch = next(on.batches("test", 2))
    stock = type(small.model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected = on.task.output(small.model, batch)
        torch.testing.assert_close(on.task.output(stock, batch), expected)
        again = workbench.subject(tmp_path / "small")
        torch.testing.assert_close(on.task.output(again.model, batch), expected)


@pytest.mark.parametrize(
    ("name", "pattern", "told"),
    [
        ("diffllama", "heads", "DiffLlamaForCausalLM cannot compute without the removed heads"),
        ("bigcode", "channels", "share one key and one value"),
        ("electra", "channels", "ElectraForMaskedLM .* no place for electra.embeddings_project"),
        ("esm", "layers", "EsmForMaskedLM .* esm.contact_head.regression.weight is"),
    ],
)
def test_what_cannot_go_is_one_line_before_anything_is_computed(name, pattern, told, tmp_path, monkeypatch):
    on = opened(name, tmp_path)

    def computed(*given, **more):
        raise AssertionError("something was computed")

    for engine in (dimensions, structure_events.Masked):
        monkeypatch.setattr(engine, "begin" if engine is not dimensions else "reference_of", computed)
    method = "magnitude" if pattern == "heads" else "minitron"
    with pytest.raises(BadInput, match=told) as refused:
        Prune(method=method, pattern=pattern).run(on, Progress(), cache=False)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("pattern: ")


def test_operations_of_a_model_that_gives_a_slice_of_a_parameter_to_a_module(tmp_path):
    on = opened("deberta-v2", tmp_path)
    assert count_flops(on, next(on.batches("test", 2))) > 0


def test_whatever_a_smaller_model_raises_is_one_line(tmp_path, monkeypatch):
    """Of the kind: an error of another library while a removal is tried, of a class nobody has foreseen."""
    on = opened("llama", tmp_path)

    def breaks(*given):
        raise ZeroDivisionError("first\nsecond")

    for pattern, module in (("heads", structure_events), ("layers", dimensions)):
        monkeypatch.setattr(module, "remove" if pattern == "heads" else "shrink", breaks)
        method = "magnitude" if pattern == "heads" else "minitron"
        with pytest.raises(BadInput, match="^pattern: LlamaForCausalLM cannot .* removed .*first") as refused:
            Prune(method=method, pattern=pattern, calibration_examples=8).run(on, Progress(), cache=False)
        assert "\n" not in str(refused.value)


def test_a_model_that_its_configuration_does_not_describe_is_not_saved(tmp_path):
    on = opened("llama", tmp_path)
    on.model.config.intermediate_size = 40
    with pytest.raises(BadInput, match="would not open again .* has to be"):
        on.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
