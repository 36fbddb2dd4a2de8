"""Kind (fault 2): what is saved or exported is opened again in a fresh process, and its loss compared, before
it takes its place; what does not open, or computes something else, is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import workbench
from workbench.errors import BadInput, Notice
from workbench.progress import Progress
from workbench.quantization import Quantize, export
from workbench.storage import reopened, reopening
from workbench.subjects import Subject


@pytest.fixture()
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process is this one: starting it takes five seconds, and is tried by one test."""

    def within(arguments: list[str]) -> tuple[int, dict[str, float], str]:
        try:
            return 0, reopened.answer(*arguments[2:]), ""
        except Exception as error:
            return 1, {}, f"{type(error).__name__}: {error}"

    monkeypatch.setattr(reopening, "fresh", within)


def opened(checkpoints: dict[str, Path], architecture: str) -> Subject:
    return workbench.subject(checkpoints[architecture], data="random", max_length=12)


def test_a_saved_subject_is_opened_in_a_process_of_its_own(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    on = opened(checkpoints, "llama")
    on.save(tmp_path / "saved", told=said.append)
    assert said[0].startswith("opened again in a fresh process: loss ")
    code, _, why = reopening.fresh(["-m", "workbench.storage.reopened", "saved", str(tmp_path), "test", "1"])
    assert code == 1 and why.startswith("BadInput: ")


def another_width(folder: Path) -> None:
    """Fault 2: the config named one width, the weights had another."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"intermediate_size": 32}))


def other_numbers(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file(tensors | {name: 2 * tensors[name]}, file, {"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def another_epsilon(folder: Path) -> None:
    """A field of the config that no tensor's shape tells."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1.0}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (another_width, "does not open in a fresh process"),
        (no_weights, "does not open in a fresh process"),
        (other_numbers, "has the loss"),
        (another_epsilon, "has the loss"),
    ],
)
def test_what_is_not_what_was_meant_is_not_kept(
    damage: Callable[[Path], None],
    told: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = opened(checkpoints, "llama")
    target = on.save(tmp_path / "saved", told=str)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    whole = Subject.save_into

    def damaged(self: Subject, folder: Path) -> None:
        whole(self, folder)
        damage(folder)

    monkeypatch.setattr(Subject, "save_into", damaged)
    with pytest.raises(BadInput, match=told) as caught:
        on.save(target, told=str)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def quantized(**fields: Any) -> Subject:
    small = {"calibration_examples": 8, "predict_examples": 0, "test_examples": 0, "group_size": 16}
    found = Quantize(**small, **fields).run(workbench.subject("digits-vit"), Progress(), cache=False).subject
    assert found is not None
    return found


@pytest.mark.parametrize("fields", [{"format": "int4"}, {"format": "e4m3fn", "granularity": "channel"}])
def test_an_exported_checkpoint_too(
    fields: dict[str, str], tmp_path: Path, here: None, monkeypatch: Any
) -> None:
    """An example that was not listed: exports were written and never opened."""
    on = quantized(**fields)
    export.to_compressed_tensors(on, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    fill = export.fill_parameters

    def too_fine(module: Any, grid: Any) -> None:
        fill(module, grid)
        module.weight_scale.data.div_(8)

    monkeypatch.setattr(export, "fill_parameters", too_fine)
    with pytest.raises(BadInput, match="what was exported has the loss"):
        export.to_compressed_tensors(on, tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_an_onnx_file_too(tmp_path: Path, here: None, monkeypatch: Any) -> None:
    """An example that was not listed. What cannot be tried is said."""
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")
    on = quantized(format="int8", granularity="channel")
    parts = export.dequantize_inputs

    def doubled(*arguments: Any) -> Any:
        codes, scale, zero, attributes = parts(*arguments)
        return codes, 2 * scale, zero, attributes

    with monkeypatch.context() as patched:
        patched.setattr(export, "dequantize_inputs", doubled)
        with pytest.raises(BadInput, match="what was exported has the loss"):
            export.to_onnx(on, tmp_path / "other.onnx")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(reopening.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(Notice, match="onnx: not opened again: onnxruntime is not installed"):
        export.to_onnx(on, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()
