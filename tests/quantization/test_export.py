"""Packed storage and export round trips on logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Quantize
from workbench.quantization.export import to_compressed_tensors, to_onnx
from workbench.quantization.number.packing import pack, packed_layer, quantizer_of, unpack, unpacked_layer
from workbench.subjects import Subject

SMALL = {"calibration_examples": 8, "predict_examples": 0, "test_examples": 0, "group_size": 16}


def quantized(folder: Path, **fields: object) -> Subject:
    made = (
        Quantize(**(SMALL | fields))
        .run(workbench.subject(folder, data="random"), Progress(), cache=False)
        .subject
    )
    assert made is not None
    return made


@pytest.mark.parametrize("bits", range(1, 17))
def test_pack_and_unpack(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (37,))
    packed = pack(codes, bits)
    assert packed.numel() == -(-37 * bits // 8) and torch.equal(unpack(packed, bits, 37), codes)
    with pytest.raises(BadInput, match="packed"):
        unpack(packed[:-1], bits, 37)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int3"},
        {"format": "uint4"},
        {"format": "nf4"},
        {"format": "mxfp4"},
        {"format": "nvfp4"},
        {"format": "e4m3fn", "granularity": "channel"},
        {"format": "ternary"},
        {"format": "uint4", "rounding": "hqq"},
        {"format": "int4", "transform": "activation-aware"},
        {"format": "int4", "transform": "hadamard"},
        {"format": "bf16"},
        {"format": "fixed8.6"},
        {"format": "uint8", "granularity": "tensor"},
    ],
)
def test_packed_layers_hold_the_weight_in_the_bytes_they_claim(
    checkpoints: dict[str, Path], fields: dict[str, object]
) -> None:
    on = quantized(checkpoints["bert"], layers="*.0.*", **fields)
    for layer in on.layers("*.0.*"):
        change, stored = quantizer_of(layer), packed_layer(layer)
        assert torch.allclose(unpacked_layer(stored, change, layer.shape), layer.weight, atol=1e-6)
        # signs and the transform's scales are kept as floats for speed;
        # their claimed bytes are what a file needs
        size = sum(t.numel() * t.element_size() for k, t in stored.items() if k not in ("smooth", "signs"))
        claimed = change.grid.bytes(layer.shape) - (
            0 if change.grid.transform is None else change.grid.transform.bytes
        )
        assert abs(size - claimed) < 2


@pytest.mark.parametrize("architecture", ["bert", "llama", "vit"])
@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int4"},
        {"format": "int3", "rounding": "gptq"},
        {"format": "uint4"},
        {"format": "int8", "granularity": "channel"},
        {"format": "int8", "granularity": "tensor"},
        {"format": "e4m3fn", "granularity": "channel"},
    ],
)
def test_compressed_tensors_round_trip(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, fields: dict[str, object]
) -> None:
    on = quantized(checkpoints[architecture], **fields)
    folder = to_compressed_tensors(on, tmp_path / "out", reopen=False)
    again = type(on.model).from_pretrained(folder)  # type: ignore[attr-defined]
    batch = next(on.batches("calibration", 4))
    with torch.no_grad():
        expected, found = on.task.output(on.model, batch), on.task.output(again.eval(), batch)
    assert torch.allclose(found.float(), expected, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"format": "uint4"}, {"format": "e4m3fn", "granularity": "channel"}])
def test_our_own_export_opens_again(
    checkpoints: dict[str, Path], tmp_path: Path, fields: dict[str, object]
) -> None:
    """Kind 17: what we export is opened again, decompressed, with the same outputs."""
    on = quantized(checkpoints["llama"], **fields)
    again = workbench.subject(
        to_compressed_tensors(on, tmp_path / "out", reopen=False), data="random", max_length=12
    )
    batch = next(again.batches("test", 3))
    with torch.no_grad():
        assert torch.equal(again.task.output(again.model, batch), on.task.output(on.model, batch))
    assert "decompressed from compressed-tensors" in again.data_note
    again.save(tmp_path / "plain")
    assert workbench.subject(tmp_path / "plain").evaluate("test") == again.evaluate("test")


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int8", "granularity": "channel"},
        {"format": "uint4"},
        {"format": "int8", "granularity": "tensor"},
    ],
)
def test_onnx_round_trip(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, fields: dict[str, object]
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")
    on = quantized(checkpoints[architecture], **fields)
    file = to_onnx(on, tmp_path / "model.onnx", reopen=False)
    options = runtime.SessionOptions()
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "1"
    )  # float32 products, so that logits can be compared
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    batch = next(on.batches("calibration", 3))
    inputs = on.task.inputs(batch)
    width = inputs["input_ids"].shape[1]
    for length in (width, 3, width - 5):  # the file takes texts of every length
        given = {k: torch.nn.functional.pad(v, (0, length - width)) for k, v in inputs.items()}
        given["attention_mask"][0, 2:] = 0
        with torch.no_grad():
            expected = on.task.output(on.model, given | {"labels": batch["labels"]})
        found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})[0]
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)


def test_onnx_says_what_it_cannot_follow(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind 25, another example: an encoder-decoder's file lacked the decoder's inputs (a KeyError); they are
    given, and what the exporter does not follow then is one line.
    """

    def fails(model: torch.nn.Module, arguments: tuple[torch.Tensor, ...], **_: object) -> None:
        model(*arguments)
        raise RuntimeError("<class 'ValueError'>: Cannot view a tensor\n with strides")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(BadInput, match="onnx: the exporter cannot follow T5.*Cannot view a tensor"):
        to_onnx(quantized(checkpoints["t5"], format="int8", granularity="channel"), tmp_path / "t5.onnx")
    assert not (tmp_path / "t5.onnx").exists()


def test_onnx_takes_ids_of_any_width(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Kind 25, another example: int32 columns became int32 inputs, which tokenizers' ids do not fit."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")
    on = quantized(checkpoints["gpt2"], format="int8", granularity="channel")
    for split in on.splits.values():
        split["attention_mask"] = split["attention_mask"].int()
    file = to_onnx(on, tmp_path / "model.onnx", reopen=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.type for i in session.get_inputs()} == {"tensor(int64)"}


@pytest.mark.parametrize(
    ("architecture", "fields", "reason"),
    [
        ("bert", {"format": "nf4"}, "nf4"),
        ("bert", {"transform": "activation-aware"}, "transform"),
        ("bert", {"rounding": "hqq", "format": "uint4"}, "no integers"),
        ("gpt2", {}, "Conv1D"),
        ("mixtral", {}, "experts"),
        ("bert", {"activations": "token"}, "activations"),
        ("bert", {"format": "e4m3fn"}, "group scales"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, fields: dict[str, object], reason: str
) -> None:
    on = quantized(checkpoints[architecture], **fields)
    with pytest.raises(BadInput, match=f"compressed-tensors.*{reason}"):
        to_compressed_tensors(on, tmp_path / "out", reopen=False)
    assert not (tmp_path / "out").exists()


def test_a_dense_subject_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no layer is quantized"):
        to_compressed_tensors(workbench.subject(checkpoints["bert"], data="random"), tmp_path / "out")


def test_a_truncated_file_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = to_compressed_tensors(
        quantized(checkpoints["bert"], format="int4"), tmp_path / "out", reopen=False
    )
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(BadInput):
        workbench.subject(folder, data="random")


@pytest.mark.parametrize("fault", ["shape", "missing"])
def test_a_file_that_does_not_match_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    folder = to_compressed_tensors(
        quantized(checkpoints["bert"], format="int4"), tmp_path / "out", reopen=False
    )
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("weight_packed"))
    if fault == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput):
        workbench.subject(folder, data="random")
