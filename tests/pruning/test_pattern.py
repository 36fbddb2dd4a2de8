from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import BadInput
from workbench.pruning.pattern import (
    NM,
    Tiles,
    expand,
    make_mask,
    obeys,
    parse,
    reduce,
    sizes,
    smallest,
    yield_to,
)

PATTERNS = st.sampled_from(
    [
        "unstructured",
        "2:4",
        "1:4",
        "3:5 outputs",
        "4:8",
        "block 4x4",
        "block 3x5",
        "block 16x1",
        "row",
        "column",
    ]
)
SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 23)) | st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)
)


@settings(max_examples=80, deadline=None)
@given(PATTERNS, SHAPES, st.floats(0, 0.99), st.integers(0, 5), st.booleans())
def test_masks_obey_their_pattern_for_any_shape_and_pruning_twice_changes_nothing(
    text, shape, sparsity, seed, ties
):
    pattern = parse(text)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 3).round() if ties else scores
    mask = make_mask(scores, pattern, sparsity)
    assert mask.shape == scores.shape and obeys(mask, pattern)
    zeros = (~mask).flatten(-2).sum(-1).float()
    if isinstance(pattern, Tiles):
        largest = sizes(pattern, shape).max()
        assert ((zeros - sparsity * shape[-1] * shape[-2]).abs() <= largest / 2 + 1e-3).all()
    elif shape[pattern.along] % pattern.of == 0:
        assert (zeros == shape[-1] * shape[-2] * (pattern.of - pattern.keep) // pattern.of).all()
    again = make_mask(yield_to(scores * mask, ~mask, pattern), pattern, sparsity) & mask
    assert torch.equal(again, mask)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 6), st.integers(0, 6))
def test_reduce_sums_every_tile_and_expand_undoes_it(shape, rows, columns):
    tiles = Tiles(rows, columns)
    scores = torch.rand(shape)
    units = reduce(scores, tiles)
    assert torch.allclose(units.sum(), scores.sum(), rtol=1e-5)
    r, c = tiles.size(shape)
    assert units.shape[-2:] == (-(-shape[-2] // r), -(-shape[-1] // c))
    assert expand(units, tiles, shape)[..., -1, -1].equal(units[..., -1, -1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(-2, 40))
def test_smallest_takes_exactly_so_many_and_breaks_ties_in_order(values, count):
    scores = torch.tensor(values, dtype=torch.float32)
    chosen = smallest(scores, count).nonzero().flatten().tolist()
    assert chosen == sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[: max(count, 0)])


def test_rows_are_wandas_comparison_group():
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert make_mask(scores, Tiles(1, 1), 0.5, "row").tolist() == [[False, False, True, True]] * 2
    assert make_mask(scores, Tiles(1, 1), 0.5, "matrix").tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "block 0x4", "diagonal", "heads+heads", "2:4 inputs"])
def test_patterns_that_do_not_exist_are_refused(text):
    with pytest.raises(BadInput, match="pattern"):
        parse(text)


def test_parse():
    assert (
        parse("2:4 outputs") == NM(2, 4, -2)
        and parse("block 16x4") == Tiles(16, 4)
        and parse("row") == Tiles(1, 0)
    )
