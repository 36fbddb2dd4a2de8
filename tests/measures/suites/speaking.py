"""A small random Llama and GPT-2 that read bytes, as subjects with a tokenizer."""

from __future__ import annotations

import torch
import transformers

from workbench.subjects import TASK, Subject
from workbench.subjects.builtin.bytelm import byte_tokenizer

WORDS = 258


def speaking(architecture: str = "llama", noise: float = 0.0, positions: int = 512) -> Subject:
    torch.manual_seed(0)
    if architecture == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                initializer_range=0.3,
            )
        )
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=WORDS,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=positions,
                initializer_range=0.3,
                bos_token_id=256,
                eos_token_id=256,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    ids = torch.randint(0, 256, (4, 16))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    name = f"{architecture} {noise}"
    return Subject(
        name, model.eval(), TASK["causal-lm"].value(), {"test": columns}, tokenizer=byte_tokenizer()
    )
