"""Heads and neurons taken out of architectures that keep them in ways of their own. Kind (faults 2, 10 and
18): what is removed is compared with what is masked before it is kept, and what is saved opens again.
"""

from __future__ import annotations

import pytest
import torch
import transformers as t

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.pruning.engine import structure_events

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def bigcode(multi_query):
    return t.GPTBigCodeForCausalLM(
        t.GPTBigCodeConfig(
            vocab_size=99,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            n_inner=64,
            multi_query=multi_query,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


MODELS = {
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8)),
    "qwen3-moe-mixed": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, mlp_only_layers=[0])
    ),
    "qwen2-moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32)
    ),
    "llama-multi-query": lambda: t.LlamaForCausalLM(t.LlamaConfig(**(SIZES | {"num_key_value_heads": 1}))),
    "bigcode-multi-query": lambda: bigcode(True),
    "bigcode": lambda: bigcode(False),
}


def opened(name, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "dense")
    return workbench.subject(tmp_path / "dense", data="random")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("qwen3-moe", "neurons"),
        ("qwen3-moe-mixed", "neurons"),
        ("qwen2-moe", "neurons"),
        ("llama-multi-query", "heads"),
        ("bigcode-multi-query", "heads"),
        ("bigcode", "heads"),
    ],
)
def test_removed_is_masked_and_opens_again(name, pattern, tmp_path):
    on = opened(name, tmp_path)
    batch = next(on.batches("test", 4))

    def pruned(remove):
        fields = {"pattern": pattern, "method": "magnitude", "pattern.remove": remove}
        return Prune(**fields).run(on, Progress(), cache=False)

    masked, small = pruned(False), pruned(True)
    assert small.facts["packed_bytes"] < small.facts["dense_bytes"]
    with torch.no_grad():
        expected = on.task.output(masked.subject.model, batch)
        torch.testing.assert_close(on.task.output(small.subject.model, batch), expected)
        small.subject.save(tmp_path / "small")
        again = workbench.subject(tmp_path / "small")
        torch.testing.assert_close(on.task.output(again.model, batch), expected)
        stock = type(small.subject.model).from_pretrained(tmp_path / "small").eval()
        torch.testing.assert_close(on.task.output(stock, batch), expected)


def test_a_norm_over_all_heads_is_refused_before_anything_is_computed(tmp_path):
    for made in (
        t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES, pad_token_id=0)),
        t.OlmoeForCausalLM(t.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, pad_token_id=0)),
    ):
        made.save_pretrained(tmp_path / type(made).__name__)
        on = workbench.subject(tmp_path / type(made).__name__, data="random")
        with pytest.raises(BadInput, match="'q_norm' of model.layers.0.self_attn is a norm over all heads"):
            Prune(pattern="heads", method="magnitude").run(on, Progress())
        fields = {"pattern": "heads", "method": "magnitude", "pattern.remove": False}
        assert Prune(**fields).run(on, Progress(), cache=False).facts["sparsity"] > 0


@pytest.mark.parametrize("how", ["other numbers", "no numbers"])
def test_a_removal_that_computes_something_else_is_not_kept(how, tmp_path, monkeypatch):
    """Two more of the kind: a removal that is silently wrong, and one whose model does not run."""
    on = opened("llama-multi-query", tmp_path)
    whole = structure_events.remove

    def wrong(model, kept):
        whole(model, kept)
        if how == "other numbers":
            model.lm_head.weight.data *= 1.01
        else:
            model.model.layers[0].self_attn.head_dim = 5

    monkeypatch.setattr(structure_events, "remove", wrong)
    told = "differs from the masked model by" if how == "other numbers" else "cannot compute without"
    with pytest.raises(BadInput, match=told):
        Prune(pattern="heads", method="magnitude").run(on, Progress(), cache=False)
