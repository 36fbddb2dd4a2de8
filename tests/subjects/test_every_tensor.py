"""What opening a checkpoint finds is said, and what would compute something else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import workbench
from workbench import BadInput
from workbench.cli import main
from workbench.errors import Notice
from workbench.subjects.contents.every_tensor import is_inside

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def stored(
    folder: Path, kind: str, drop: str = "", add: dict[str, Tensor] | None = None, **fields: Any
) -> Path:
    """A tiny checkpoint of a class, without the tensors whose name has `drop`, with more of them, and with
    other fields in its config.
    """
    config = getattr(
        transformers, f"{kind.split('For')[0].replace('EncoderModel', '').replace('Model', '')}Config"
    )
    getattr(transformers, kind)(config(**(T5 if "T5" in kind else SIZES))).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if not drop or drop not in name} | (add or {})
    save_file(tensors, file, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))
    return folder


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    "kind, fields, named",
    [
        ("Qwen2ForCausalLM", LLAMA, "layers.0.self_attn.k_proj.bias"),
        ("Qwen3ForCausalLM", LLAMA | {"head_dim": 128}, "layers.0.self_attn.k_norm.weight"),
        ("Starcoder2ForCausalLM", {"use_bias": False}, "layers.0.mlp.c_fc.bias"),
        ("PhiForCausalLM", {"qk_layernorm": False}, ""),
    ],
)
def test_tensors_in_blocks_that_the_class_does_not_use(kind, fields, named, tmp_path):
    """Kind: tensors in modules of the model that its class does not use change what it computes."""
    more = {} if named else {"model.layers.1.self_attn.q_layernorm.weight": torch.ones(8)}
    stored(tmp_path / "m", kind, add=more, **fields)
    with pytest.raises(BadInput, match=f"holds model.{named or next(iter(more))[6:]}.*do not use them"):
        workbench.subject(tmp_path / "m", data="random")


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.0.attn.bias", False),
        ("ema.model.layers.0.mlp.weight", False),
        ("score.weight", False),
        ("model.layers.0.mlp.weight.exp_avg", False),
        ("layers.0.mlp.bias", True),
        ("model.layers.0.gate.correction", True),
        ("lm_head.bias", True),
    ],
)
def test_which_leftovers_change_the_function(name, wanted):
    """The same kind: heads of other tasks, tables and states of optimizers are harmless."""
    names = {"model.layers.0.mlp.weight", "model.norm.weight", "lm_head.weight"}
    assert is_inside(name, names, "model.") == wanted


def test_what_opening_finds_is_a_line_of_the_command(tmp_path, capsys):
    """Kind: what is new or left over was in the data note only, which the command line does not print."""
    stored(tmp_path / "m", "BertForMaskedLM", architectures=["BertModel"])
    asked = [
        "magnitude",
        "--subject",
        str(tmp_path / "m"),
        "--data",
        "random",
        "--task",
        "sequence-classification",
    ]
    assert main(["run", *asked, "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "workbench: subject: the head of BertForSequenceClassification is new and untrained" in told
    assert "workbench: subject: left over: cls.predictions" in told
    with pytest.warns(Notice, match="subject: left over"):
        workbench.subject(tmp_path / "m", data="random", task="sequence-classification")


@pytest.mark.parametrize(
    "kind, drop, task",
    [
        ("T5Model", "encoder.block.1", "seq2seq-lm"),
        ("T5EncoderModel", "nothing", "seq2seq-lm"),
        ("MT5Model", "decoder.block.0", "seq2seq-lm"),
        ("BertModel", "layer.1.output.dense", "masked-lm"),
    ],
)
def test_only_a_head_may_be_new(kind, drop, task, tmp_path):
    """Kind: a tensor of the body that is missing was called a new head where the class has no prefix."""
    stored(tmp_path / "m", kind, drop)
    with pytest.raises(BadInput, match="lacks .*(block|layer).*needs; copy or save it again"):
        workbench.subject(tmp_path / "m", data="random", task=task)


@pytest.mark.parametrize("whose", ["lora alone", "lora beside", "base_layer", "ia3 alone", "modules_to_save"])
def test_an_adapter_by_any_file_name(whose, tmp_path):
    """Kind: an adapter is told by its tensors, whatever their file is called."""
    q = "model.layers.0.self_attn.q_proj"
    add, drop = {
        "lora alone": ({f"base_model.model.{q}.lora_A.weight": torch.ones(2, 16)}, "model."),
        "lora beside": ({f"{q}.lora_A.default.weight": torch.ones(2, 16)}, ""),
        "base_layer": ({f"{q}.base_layer.weight": torch.ones(16, 16)}, f"{q}.weight"),
        "ia3 alone": ({f"{q}.ia3_l": torch.ones(16, 1)}, "model."),
        "modules_to_save": ({"lm_head.modules_to_save.default.weight": torch.ones(61, 16)}, "lm_head"),
    }[whose]
    stored(tmp_path / "m", "LlamaForCausalLM", drop, add)
    with pytest.raises(BadInput, match="holds an adapter .*merge_and_unload.* or give the base"):
        workbench.subject(tmp_path / "m", data="random")
