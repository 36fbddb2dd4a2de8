"""GGUF files written here: blocks against the package that reads them, names, settings, tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import workbench
from workbench.cli import main
from workbench.errors import BadInput, Notice
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize, named, to_gguf
from workbench.quantization.gguf_blocks import encoded, narrowest, plain
from workbench.quantization.gguf_tokenizer import check_tokenizer, tokenizer_fields
from workbench.quantization.number.grid import Grid
from workbench.storage.reopened import answer
from workbench.subjects import Subject
from workbench.subjects.changes import Mask
from workbench.subjects.checkpoints import open_tokenizer
from workbench.subjects.gguf_files import formats

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package 'gguf' (extra 'gguf')")
SMALL = {"calibration_examples": 4, "predict_examples": 0, "test_examples": 0, "group_size": 32}
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rms_norm_eps": 3e-5, "rope_parameters": {"rope_theta": 5e4}},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:gguf. the subject has no tokenizer")


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | MORE[kind] | more))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def splits() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(1))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {"calibration": columns, "test": columns}


def subject_of(model: torch.nn.Module) -> Subject:
    return Subject("small", model, workbench.subjects.tasks.CausalLM(), splits())


@pytest.fixture(scope="module")
def llama() -> Subject:
    return subject_of(made("llama"))


def quantized(on: Subject, **fields: Any) -> Subject:
    found = Quantize(**(SMALL | fields)).run(on, Progress(), cache=False).subject
    assert found is not None
    return found


def matrices(file: Path, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """llama.cpp's name -> numbers of a file, rotated rows put back in halves."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        count = heads.get(tensor.name.split(".")[-2])
        if count:
            values = values.reshape(count, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        found[tensor.name] = torch.from_numpy(np.array(values))
    return found


NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"format": "int4"}, "Q4_0"),
        ({"format": "int", "format.full": False, "group_size": 64}, "Q4_0"),
        ({"format": "int5", "rounding": "gptq"}, "Q5_0"),
        ({"format": "int8", "granularity": "channel"}, "Q8_0"),
        ({"format": "int8", "granularity": "tensor"}, "Q8_0"),
        ({"format": "mxfp4"}, "MXFP4"),
        ({"format": "bf16"}, "BF16"),
        ({"format": "fp16"}, "F16"),
    ],
)
@pytest.mark.filterwarnings("ignore:group_size")
def test_every_weight_comes_out_as_it_is(
    llama: Subject, tmp_path: Path, fields: dict[str, Any], kind: str
) -> None:
    """What ggml has a place for is carried over exactly: the package that reads blocks gets our numbers."""
    on = quantized(llama, **fields)
    file = to_gguf(on, tmp_path / "model.gguf", reopen=False)
    assert next(iter(formats(file))) == kind
    found = matrices(file, {"attn_q": 4, "attn_k": 2})
    model: Any = on.model
    for number, block in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            got = found[f"blk.{number}.{theirs}.weight"]
            assert torch.equal(got, block.get_submodule(ours).weight), (number, theirs)
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert "output.weight" not in found  # tied


def test_minima_are_rounded_to_16_bits_and_said(llama: Subject, tmp_path: Path) -> None:
    on = quantized(llama, format="uint4")
    with pytest.warns(Notice, match="16-bit floats.*a step of its grid"):
        file = to_gguf(on, tmp_path / "model.gguf", reopen=False)
    found = matrices(file, {})
    model: Any = on.model
    layer = model.model.layers[0].mlp.down_proj
    far = (found["blk.0.ffn_down.weight"] - layer.weight).abs().max()
    assert 0 < far < 0.01 * layer.parametrizations.weight[0].scale.max()


def test_zeros_of_a_pruned_layer_stay_zeros(llama: Subject, tmp_path: Path) -> None:
    """A minimum that is rounded turns zeros into something else: such codes are stored without one."""
    pruned = Prune(method="magnitude", sparsity=0.5, calibration_examples=4, predict_examples=0).run(
        llama, Progress(), cache=False
    )
    on = quantized(pruned.subject, format="uint4")
    file = to_gguf(on, tmp_path / "model.gguf", reopen=False)
    assert next(iter(formats(file))) == "Q5_0"
    found, model = matrices(file, {}), on.model
    down: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    assert torch.equal(found["blk.1.ffn_down.weight"], down.weight)
    assert float((down.weight == 0).float().mean()) > 0.4


@pytest.mark.parametrize(
    ("format", "kind", "low", "high", "zero"),
    [
        ("int8", "Q8_0", -127, 127, None),
        ("int4", "Q4_0", -8, 7, None),
        ("int5", "Q5_0", -16, 15, None),
        ("uint4", "Q4_1", 0, 15, 8),
        ("uint5", "Q5_1", 0, 31, 16),
    ],
)
def test_blocks_are_those_of_the_package(
    format: str, kind: str, low: int, high: int, zero: int | None
) -> None:
    """An independent oracle: numbers on a grid that the package finds by itself give its very bytes."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, (6, 4, 32), generator=draw).float()
    codes[..., 3], codes[..., 17] = low, high
    if low < 0:
        codes[..., 5:9].clamp_(-1, 1)
        codes[..., 17] = 1
    scale = torch.rand(6, 4, generator=draw).add(0.1).half().float()
    shift = None if zero is None else torch.full_like(scale, zero)
    weight = ((codes - (zero or 0)) * scale[..., None]).reshape(6, 128)
    grid = Grid(named(format), scale, shift, 32)
    want = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    stored = encoded(weight, grid, kind)
    assert stored.gap == 0 and np.array_equal(stored.rows, want)


def test_powers_of_two_are_those_of_the_package() -> None:
    draw = torch.Generator().manual_seed(0)
    values = named("mxfp4").element.values()
    units = values[torch.randint(0, len(values), (5, 3, 32), generator=draw)]
    units[..., 0] = 6.0
    scale = 2.0 ** torch.randint(-9, 3, (5, 3), generator=draw).float()
    weight = (units * scale[..., None]).reshape(5, 96)
    stored = encoded(weight, Grid(named("mxfp4"), scale, None, 32), "MXFP4")
    want = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert stored.gap == 0 and np.array_equal(stored.rows, want)


def test_other_weights_take_the_narrowest_type_that_holds_them() -> None:
    weight = torch.randn(8, 64)
    assert narrowest(weight) == "F32" and narrowest(weight[0]) == "F32"
    assert narrowest(weight.half().float()) == "F16"
    assert narrowest(weight.bfloat16().float() * 2.0**100) == "BF16"
    assert narrowest(weight.half().float()[:, :63]) == "F16"
    blocks = plain(weight, "Q8_0")
    once = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    assert narrowest(once) == "Q8_0" and np.array_equal(plain(once, "Q8_0"), blocks)


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("format", ["", "int4"])
def test_what_is_written_opens_as_the_same_model(tmp_path: Path, kind: str, format: str) -> None:
    on = subject_of(made(kind))
    on = quantized(on, format=format) if format else on
    again = workbench.subject(to_gguf(on, tmp_path / "m.gguf", reopen=False), data="random", max_length=12)
    batch = next(on.batches("test", 4))
    with torch.no_grad():
        assert torch.equal(again.task.output(again.model, batch), on.task.output(on.model, batch))


def test_a_file_that_gives_another_loss_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of what was written is compared before the file takes its place."""
    monkeypatch.setattr("workbench.storage.reopening.fresh", lambda given: (0, answer(*given[2:]), ""))
    on, told = subject_of(made("llama", initializer_range=0.5)), list[str]()
    to_gguf(on, tmp_path / "good.gguf", told=told.append)
    assert told and "as here" in told[0]
    monkeypatch.setattr("workbench.quantization.export_gguf.row_order", lambda *_: None)
    with pytest.raises(BadInput, match="loss.*nothing was kept"):
        to_gguf(on, tmp_path / "bad.gguf")
    assert not (tmp_path / "bad.gguf").exists()


def test_a_model_without_room_for_it_is_not_opened_again(
    llama: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was streamed because it does not fit is not read whole only to be compared."""
    monkeypatch.setattr("workbench.quantization.export_gguf.free_bytes", lambda: 100_000)
    with pytest.warns(Notice, match="not opened again: that takes 648 kB, 100 kB are free"):
        assert to_gguf(llama, tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": "nf4"}, "q_proj has the format nf4"),
        ({"format": "int3"}, "q_proj has the format int3"),
        ({"format": "e4m3fn"}, "format e4m3fn"),
        ({"format": "nvfp4"}, "format nvfp4"),
        ({"format": "int4", "group_size": 16}, "groups of 16"),
        ({"format": "int4", "transform": "activation-aware"}, "online transform"),
        ({"format": "int4", "adapter": "loftq"}, "Adapter"),
        ({"format": "int8", "activations": "token"}, "ActivationQuant|TokenQuant|computed in another way"),
        ({"format": "int4", "salient": "columns"}, "salient weights"),
    ],
)
def test_what_ggml_cannot_express_is_refused_by_name(
    llama: Subject, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    on = quantized(llama, **fields)
    with pytest.raises(BadInput, match=f"gguf: model[.]layers[.]0.*({reason})"):
        to_gguf(on, tmp_path / "model.gguf", reopen=False)
    assert not list(tmp_path.iterdir())


def test_a_pruned_layer_without_a_code_for_zero_is_refused(llama: Subject, tmp_path: Path) -> None:
    on = quantized(llama, format="uint4", rounding="hqq")
    layer = on.layers()[0]
    layer.attach(Mask(torch.rand(layer.shape) > 0.5))
    with pytest.raises(BadInput, match="zero points that are no integers"):
        to_gguf(on, tmp_path / "model.gguf", reopen=False)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*read as 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ],
)
def test_a_setting_without_a_place_is_refused_by_name(
    tmp_path: Path, kind: str, more: dict[str, Any], reason: str
) -> None:
    """What a reader would take for something else is seen before anything large is written."""
    with pytest.raises(BadInput, match=f"gguf.*{reason}"):
        to_gguf(subject_of(made(kind, **more)), tmp_path / "model.gguf", reopen=False)
    assert not list(tmp_path.iterdir())


def test_other_architectures_and_names_are_refused(checkpoints: dict[str, Path], llama: Subject) -> None:
    for name in ("gpt2", "mixtral", "bert"):
        with pytest.raises(BadInput, match="accepted are LlamaForCausalLM, .*Qwen3ForCausalLM"):
            to_gguf(workbench.subject(checkpoints[name], data="random"), "model.gguf", reopen=False)
    with pytest.raises(BadInput, match="does not end in .gguf"):
        to_gguf(llama, "model.bin")


def byte_level(split: str | None = None) -> Any:
    """Byte-level BPE of 300 words, two of them special."""
    texts = ["the cat and the hat, 12 34", "def f(x): return x", "na\u00efve caf\u00e9  x\n\n"] * 9
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split or "x"), behavior="isolated")
    backend.pre_tokenizer = whole if split is None else tokenizers.pre_tokenizers.Sequence([cut, whole])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=296,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def with_byte_fallback() -> Any:
    """BPE as SentencePiece's models become it: pieces of a text in which blanks are underlined."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", *"thecai", "th", "\u2581th", "\u2581the", "at", "\u2581c", "\u2581cat"]
    pairs = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e"), ("a", "t"), ("\u2581", "c"), ("\u2581c", "at")]
    return transformers.LlamaTokenizer(
        vocab={word: number for number, word in enumerate(dict.fromkeys(words))}, merges=pairs
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("tokenizer", "fields"),
    [
        (byte_level(), {"ggml.model": "gpt2", "ggml.pre": "gpt-2"}),
        (byte_level(LLAMA3), {"ggml.model": "gpt2", "ggml.pre": "llama-bpe"}),
        (with_byte_fallback(), {"ggml.model": "llama", "ggml.add_space_prefix": True}),
    ],
    ids=["byte-level", "llama-3", "byte fall-back"],
)
def test_the_tokenizer_comes_back_with_the_same_ids(
    tmp_path: Path, tokenizer: Any, fields: dict[str, Any]
) -> None:
    found = tokenizer_fields(tokenizer, 300)
    assert found.items() >= fields.items()
    assert len(found["ggml.tokens"]) == 300
    on = subject_of(made("llama"))
    on.tokenizer = tokenizer
    file = to_gguf(on, tmp_path / "model.gguf", reopen=False)
    check_tokenizer(tokenizer, file)
    again = open_tokenizer(file, local=True)
    assert again is not None
    for text in ("the cat, 2048 hats!", " two  blanks", "<|begin|>the<|end|>", "\U0001f600 caf\u00e9"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_tokenizer_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="by a rule that has no name there"):
        tokenizer_fields(byte_level(r"\p{L}+|."), 300)
    words = {"[UNK]": 0, "a": 1, "##b": 2}
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    with pytest.raises(BadInput, match="is WordPiece; accepted are byte-level BPE"):
        tokenizer_fields(transformers.PreTrainedTokenizerFast(tokenizer_object=pieces), 300)
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    bytes_alone.pre_tokenizer = byte_level().backend_tokenizer.pre_tokenizer
    with pytest.raises(BadInput, match="has no merges, of which a GGUF file needs one"):
        tokenizer_fields(transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone), 300)
    with pytest.raises(BadInput, match="word number 293, the model's vocabulary 200"):
        tokenizer_fields(byte_level(), 200)


def test_a_tokenizer_that_is_read_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = subject_of(made("llama"))
    on.tokenizer = byte_level(LLAMA3)
    monkeypatch.setattr("workbench.quantization.gguf_tokenizer.rule_of", lambda *_: "gpt-2")
    with pytest.raises(BadInput, match="comes back with other ids"):
        to_gguf(on, tmp_path / "model.gguf", reopen=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source") / "tiny"
    made("llama").save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.long)])
def test_export_from_the_command_line(
    folder: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: bool,
) -> None:
    """`elsewhere`: the file is opened in a process of its own, which takes ten seconds to begin."""
    monkeypatch.setattr("workbench.storage.reopening.check_saved", lambda *_: "")
    if not elsewhere:
        monkeypatch.setattr("workbench.storage.reopening.fresh", lambda given: (0, answer(*given[2:]), ""))
    out = tmp_path / "out"
    few = ["--calibration-examples", "4", "--test-examples", "4", "--predict-examples", "0"]
    asked = ["run", "quantize", "--subject", str(folder), "--data", "random", "--max-length", "12"]
    asked += ["--group-size", "32", *few, "--export", "gguf", "--out", str(out)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert f"exported as gguf: {out / 'tiny.gguf'} (" in said and "opened again in a fresh process" in said
    saved, file = workbench.subject(out), workbench.subject(out / "tiny.gguf", data="random")
    batch = next(saved.batches("test", 4))
    with torch.no_grad():
        assert float(file.loss(batch)) == pytest.approx(float(saved.loss(batch)), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "--export", "ggfu"], "export: 'ggfu' is unknown; did you mean gguf?"),
        (["quantize", "--export", "gguf"], "give --out FOLDER"),
        (["quantize", "--export", "gguf", "--format", "int3"], "no place for the format int3"),
        (["quantize", "--export", "gguf", "--layer-bits", '{"*v_proj": 3}'], "no place for the format int3"),
        (["quantize", "--export", "onnx", "--format", "nf4"], "no place for the format nf4"),
        (["quantize", "--export", "gguf", "--transform", "hadamard"], "no place for transform hadamard"),
        (["quantize", "--export", "gguf", "--group-size", "48"], "in groups of 48"),
        (["spectrum", "--export", "gguf"], "spectrum changes no model"),
    ],
)
def test_exports_that_cannot_be_are_refused_before_anything_is_computed(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("workbench.instruments.Instrument.run", lambda *_: pytest.fail("it was run"))
    source = ["--subject", str(folder), "--data", "random", "--max-length", "12"]
    out = [] if "give --out" in words else ["--out", str(tmp_path / "out")]
    assert main(["run", *arguments, *source, *out]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
