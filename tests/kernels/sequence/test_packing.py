"""Packing: gathers are inverses of one another, bins hold what they may, work is balanced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.sequence.packing import (
    balance,
    bin_pack,
    gather_rows,
    pack,
    pack_lengths,
    pack_mask,
    unpack,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from(["torch", "triton"]))
def test_unpack_undoes_pack(lengths: list[int], backend: str) -> None:
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    x = torch.randn(len(lengths), 9, 5)
    packing = pack_mask(mask)
    assert packing.lengths == tuple(sorted(n for n in lengths if n))
    assert packing.cu_seqlens.diff().tolist() == list(packing.lengths)
    packed = pack(x, packing, backend)
    assert packed.shape == (sum(lengths), 5)
    assert torch.equal(unpack(packed, packing, backend), x * mask[..., None])


def test_padding_on_the_left_and_holes_keep_their_columns() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
    packing = pack_mask(mask)
    assert packing.columns.tolist() == [2, 3, 0, 2, 3]
    assert packing.padding_fraction == pytest.approx(3 / 8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_flow_back_through_both_gathers(backend: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    packing = pack_mask(mask)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: unpack(pack(t, packing, backend) ** 2, packing, backend), (x,))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_of_a_strided_input(kind: torch.dtype) -> None:
    x = torch.randn(6, 7).to(kind).t()  # columns not contiguous
    rows = torch.tensor([4, -1, 0, 6])
    y = gather_rows(x, rows, "triton")
    assert torch.equal(y, gather_rows(x, rows, "torch"))
    assert not y[1].any()


def test_tiles_cover_every_token_once() -> None:
    packing = pack_lengths([3, 70, 33])
    seen = []
    for sequence, start in packing.tiles(32).tolist():
        seen += [(sequence, i) for i in range(start, min(start + 32, packing.lengths[sequence]))]
    assert sorted(seen) == [(s, i) for s, n in enumerate(packing.lengths) for i in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=30))
def test_bins_hold_every_sequence_once_and_are_few(lengths: list[int]) -> None:
    rows = bin_pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    fewest = -(-sum(lengths) // 20)
    assert len(rows) <= 11 / 9 * max(fewest, sum(n > 10 for n in lengths)) + 4


def test_balancing_evens_out_a_skewed_load() -> None:
    lengths = [int(16 * 1.07**i) for i in range(64)]
    shares = balance(lengths, 8)
    loads = [sum(lengths[i] for i in share) for share in shares]
    naive = [sum(lengths[i : i + 8]) for i in range(0, 64, 8)]
    assert sum(loads) == sum(lengths)
    assert max(loads) / (sum(loads) / 8) < 1.05 < max(naive) / (sum(naive) / 8)


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    with pytest.raises(BadInput, match="capacity = 4"):
        bin_pack([5], 4)
    with pytest.raises(BadInput, match=r"\(batch, length\)"):
        pack_mask(torch.ones(3))
    with pytest.raises(BadInput, match="at least one token"):
        pack_lengths([2, 0])
    with pytest.raises(BadInput, match="backend = 'cuda'"):
        gather_rows(torch.zeros(2, 2), torch.tensor([0]), "cuda")
