"""GGUF files made here from a small random Llama: weights on the grid, the tokenizer, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import workbench
from workbench import BadInput
from workbench.subjects.gguf_files import formats

gguf = pytest.importorskip("gguf", reason="GGUF files are read by the package 'gguf' (extra 'gguf')")
WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "Ġth", "Ċ"]


def small_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def paired_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection in the order of the format, which pairs neighbours and not halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    file: Path, model: transformers.LlamaForCausalLM, kind: str = "F32", architecture: str = "llama"
) -> Path:
    """The model as llama.cpp's converter lays it out, matrices in the tensor type `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = WORDS + [f"<extra{i}>" for i in range(config.vocab_size - len(WORDS))]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["t h", "Ġ th"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for number, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            tensors[f"blk.{number}.{theirs}.weight"] = block.get_submodule(ours).weight
    for name, tensor in tensors.items():
        weight = tensor.detach().numpy()
        part = name.split(".")[-2]
        if part in heads:
            weight = paired_halves(weight, heads[part])
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(weight))
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return write_gguf(folder / "plain.gguf", small_llama())


def test_a_file_of_floats_is_the_model_it_was_written_from(plain):
    on = workbench.subject(plain, data="random", max_length=16)
    want = small_llama()
    assert on.task.name == "causal-lm" and on.name == "plain"
    for name, tensor in want.state_dict().items():
        assert torch.equal(on.model.state_dict()[name], tensor), name
    batch = next(on.batches("test", 4))
    with torch.no_grad():
        assert torch.equal(on.task.output(on.model, batch), want(batch["input_ids"]).logits)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_blocks_are_expanded_exactly(folder, kind):
    file = write_gguf(folder / f"{kind}.gguf", small_llama(), kind)
    on = workbench.subject(str(file), data="random", max_length=16)
    stored = gguf.GGMLQuantizationType[kind]
    for name, tensor in small_llama().state_dict().items():
        got = on.model.state_dict()[name]
        assert got.dtype == torch.float32
        if tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), stored)
            assert torch.equal(got, torch.from_numpy(gguf.quants.dequantize(blocks, stored))), name
    assert list(formats(file)) == [kind, "F32"]


def test_an_opened_file_is_an_ordinary_subject(folder, tmp_path):
    file = write_gguf(folder / "ordinary.gguf", small_llama(), "Q4_1")
    on = workbench.subject(file, data="random", max_length=16)
    assert not hasattr(on.model.config, "quantization_config")
    on.save(tmp_path / "saved")
    again = workbench.subject(tmp_path / "saved")
    batch = next(on.batches("test", 4))
    with torch.no_grad():
        assert torch.equal(again.task.output(again.model, batch), on.task.output(on.model, batch))
    assert on.copy().fingerprint == on.fingerprint


def test_the_tokenizer_comes_with_the_file(plain):
    on = workbench.subject(plain, data="random", max_length=16)
    ids = on.tokenizer("a the", add_special_tokens=False)["input_ids"]
    assert [on.tokenizer.convert_ids_to_tokens(i) for i in ids] == ["a", "Ġth", "e"]


def test_text_of_a_file_goes_through_its_tokenizer(plain, tmp_path):
    (tmp_path / "text.csv").write_text("text\n" + "the cat and the hat\n" * 10)
    on = workbench.subject(plain, data=tmp_path / "text.csv", text_column="text", max_length=16)
    assert on.evaluate("test")["loss"] > 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"GGML" + bytes(64), "does not begin with 'GGUF'"),
        (b"", "does not begin with 'GGUF'"),
        (b"GGUF", "is not a complete GGUF file"),
        (b"GGUF" + (3).to_bytes(4, "little") + (2**40).to_bytes(8, "little") * 2, "is not a complete"),
        (b"GGUF" + (99).to_bytes(4, "little") + bytes(64), "is not a complete GGUF file"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "holds no tensors"),
    ],
)
def test_what_is_no_gguf_file_is_named_in_one_line(tmp_path, content, message):
    """A file that does not hold what its first bytes promise is refused before a model is built."""
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        workbench.subject(tmp_path / "bad.gguf", data="random")
    assert "\n" not in str(caught.value) and "bad.gguf" in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_named_in_one_line(plain, tmp_path, share):
    content = plain.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadInput, match="is not a complete GGUF file") as caught:
        workbench.subject(tmp_path / "cut.gguf", data="random")
    assert "\n" not in str(caught.value)


def test_a_header_that_promises_more_than_the_file_holds(plain, tmp_path):
    """Kind: numbers of a stranger's header that a loop would run to: a list's length, a number of blocks."""
    content = plain.read_bytes()
    words = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    long = content[:words] + (2**61).to_bytes(8, "little") + content[words + 8 :]
    blocks = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    deep = content[:blocks] + (2**31).to_bytes(4, "little") + content[blocks + 4 :]
    for damaged, message in (
        (long, "its header goes on to byte"),
        (deep, "block_count 2147483648 and holds"),
    ):
        (tmp_path / "long.gguf").write_bytes(damaged)
        with pytest.raises(BadInput, match=message) as caught:
            workbench.subject(tmp_path / "long.gguf", data="random")
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_architecture(tmp_path):
    with pytest.raises(BadInput, match="is not a file"):
        workbench.subject(tmp_path / "none.gguf", data="random")
    odd = write_gguf(tmp_path / "odd.gguf", small_llama(), architecture="quokka")
    with pytest.raises(
        BadInput, match="the architecture 'quokka', which transformers does not read"
    ) as caught:
        workbench.subject(odd, data="random")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_command_is_named(plain, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(BadInput, match="pip install gguf"):
        workbench.subject(plain, data="random")
