"""Memory that is given back holds what it held when it is read again."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbench.storage import resident

pytestmark = pytest.mark.skipif(resident.library() is None, reason="reads Linux's page map")


@pytest.fixture
def opened(tmp_path):
    """(what was saved, what is mapped) of one tensor of 4 MB."""
    saved = torch.randn(1024, 1024)
    save_file({"weight": saved}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        return saved, file.get_slice("weight")[...]


def test_a_mapped_weight_is_given_back_and_read_again(opened):
    saved, mapped = opened
    assert torch.equal(saved, mapped)
    assert resident.let_go([mapped]) > 3_900_000
    assert torch.equal(saved, mapped)


@pytest.mark.parametrize("write", ["in place", "data", "numpy"])
def test_what_was_written_to_a_mapped_weight_stays(write, opened):
    """Kind: memory that is given back takes along what somebody has written to it; however it was written."""
    saved, mapped = opened
    if write == "in place":
        mapped[10:300].mul_(2)
    elif write == "data":
        mapped.data[10:300] = 2 * saved[10:300]
    else:
        mapped.numpy()[10:300] *= 2
    saved[10:300] *= 2
    resident.let_go([mapped])
    assert torch.equal(saved, mapped)


def test_memory_of_no_file_stays():
    made = torch.randn(512, 512)
    kept = made.clone()
    assert resident.let_go([made, torch.empty(0), torch.empty(3, device="meta")]) == 0
    assert torch.equal(made, kept)
