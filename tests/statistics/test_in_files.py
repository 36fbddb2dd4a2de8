"""Runs that hold one block and put the others into files give the same numbers, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.storage.resident import Disk, disk, library, of_files, on_disk

pytestmark = pytest.mark.skipif(library() is None, reason="Linux tells what is resident")
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")
FEW: dict[str, Any] = {"calibration_examples": 8, "predict_examples": 0}
RUNS = {
    "gptq": Quantize(rounding="gptq", format="int4", group_size=16, test_examples=8, **FEW),
    "wanda": Prune(method="wanda", **FEW),
}


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    mine, yours = dict(one.state_dict()), dict(two.state_dict())
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_memory_and_in_files_every_weight_is_the_same(
    architecture: str, name: str, checkpoints: Any, tmp_path: Path
) -> None:
    """Kind: what a budget of memory decides changes a number."""
    on = workbench.subject(checkpoints[architecture], data="random", max_length=16)
    here = RUNS[name].run(on, Progress(), cache=False)
    with on_disk(tmp_path):
        there = RUNS[name].run(on, Progress(), cache=False)
    assert same(here.subject.model, there.subject.model)
    assert here.facts == there.facts
    layers = there.subject.layers()
    assert of_files(layer.original for layer in layers)
    changes = [change for layer in layers for change in layer.changes]
    assert of_files(buffer for change in changes for buffer in change.buffers() if buffer.numel())
    assert not list(tmp_path.iterdir()) and disk() is None  # files without names


def test_below_what_fits_in_memory_it_goes_on_in_files(checkpoints: Any, cache: Path) -> None:
    on = workbench.subject(checkpoints["llama"], data="random", max_length=16)
    run = RUNS["wanda"]
    foretold = run.foretold_memory(on)
    assert foretold is not None and foretold.streamed is not None
    small, large = foretold.streamed.total, foretold.total
    assert small < large
    here = run.run(on, Progress(), cache=False, memory=large)
    there = run.run(on, Progress(), cache=False, memory=large - 1)
    assert not here.provenance["in_files"] and there.provenance["in_files"]
    assert same(here.subject.model, there.subject.model)
    for name, result in (("here", here), ("there", there)):
        result.save(cache / name)
    saved = [workbench.subject(cache / name) for name in ("here", "there")]
    assert same(saved[0].model, saved[1].model) and saved[0].fingerprint == saved[1].fingerprint
    with pytest.raises(
        BadInput, match=r"^memory: .* too little: prune holds .* the others in files.*--memory"
    ):
        run.run(on, Progress(), cache=False, memory=small - 1)
    assert run.key(on) == here.provenance["key"] == there.provenance["key"]


def test_a_narrow_checkpoint_lies_in_files_with_the_numbers_it_has(checkpoints: Any, tmp_path: Path) -> None:
    """Kind: a checkpoint of two bytes a number takes four in memory, unasked."""
    import transformers

    made = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "narrow", max_shard_size="20KB")
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 1
    plain = workbench.subject(tmp_path / "narrow", data="random", max_length=16)
    wide = workbench.subject(tmp_path / "narrow", data="random", max_length=16, memory="1GB")
    assert same(plain.model, wide.model) and plain.fingerprint == wide.fingerprint
    assert of_files(wide.model.parameters()) and not of_files(plain.model.parameters())
    result = RUNS["wanda"].run(wide, Progress(), cache=False)
    result.subject.save(tmp_path / "out")
    assert workbench.subject(tmp_path / "out").evaluate() == result.subject.evaluate()


def test_a_disk_without_room_is_one_line(tmp_path: Path) -> None:
    """Kind: memory in a file that the disk has no room for ends the process when it is written to."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(BadInput, match=r"^memory: "):
            Disk(tmp_path).placed(torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_what_lies_in_files_is_written_to_and_keeps_its_type(tmp_path: Path) -> None:
    place = Disk(tmp_path)
    for value in (
        torch.arange(6.0).view(2, 3),
        torch.tensor([True, False]),
        torch.tensor(3, dtype=torch.int8),
    ):
        kept = place.placed(value)
        assert torch.equal(kept, value) and kept.dtype == value.dtype and of_files([kept])
    kept = place.placed(torch.zeros(1000, 1000))
    kept[3] = 1.0
    assert kept.sum() == 1000 and not os.listdir(tmp_path)
    assert place.placed("text") == "text" and place.placed(torch.zeros(0, 3)).shape == (0, 3)
