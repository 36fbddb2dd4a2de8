"""Stored differences of single matrices against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench.arithmetic import DIFFERENCE
from workbench.arithmetic.difference.difference import Matrix, bytes_of, packing_of
from workbench.arithmetic.difference.sparse import deviation, least_kept
from workbench.arithmetic.difference.sparse_code import places_coded, places_read
from workbench.errors import BadInput


def matrix(out: int = 24, inside: int = 32, size: float = 0.05) -> Matrix:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(out, inside, generator=generator)
    return Matrix("m", base, base + size * torch.randn(out, inside, generator=generator), 7)


def kept(name: str, given: Matrix, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    packing: Any = packing_of(DIFFERENCE.chosen(name, **options))
    if hasattr(packing, "survey"):
        packing.survey(lambda: [given.difference])
    stored = packing.pack(given)
    return packing.unpack(stored, given.base), stored


def test_one_bit_has_the_least_squares_scale():
    given = matrix()
    found, stored = kept("bitdelta", given)
    scale = float(stored["scale"])
    signs = torch.where(given.difference >= 0, 1.0, -1.0)
    assert torch.allclose(found, given.base + scale * signs)

    def error(s):
        return float((given.difference - s * signs).square().sum())

    assert error(scale) < min(error(scale * 0.99), error(scale * 1.01))
    assert scale == pytest.approx(float((given.difference * signs).sum() / signs.square().sum()))
    assert bytes_of(stored) == 24 * 32 // 8 + 4


def test_the_largest_entries_keep_their_signs():
    given = matrix()
    found, _ = kept("compeft", given, density=0.25, strength=2.0)
    d = given.difference
    least = d.abs().flatten().sort(descending=True).values[int(0.25 * d.numel()) - 1]
    expected = torch.where(d.abs() >= least, 2.0 * d.std(correction=0) * d.sign(), 0.0)
    assert torch.allclose(found - given.base, expected, atol=1e-6)
    assert int((found != given.base).sum()) == int(0.25 * d.numel())
    assert deviation(lambda: [d[:5], d[5:]]) == pytest.approx(float(d.double().std(correction=0)))
    assert least_kept(lambda: [d[:5], d[5:]], 1.0) == 0.0


@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.5, 1.0])
def test_gaps_are_read_as_they_were_written(density):
    generator = torch.Generator().manual_seed(1)
    row = torch.rand(5000, generator=generator) < density
    assert torch.equal(places_read(places_coded(row)), row.nonzero().flatten())


def test_the_code_of_gaps_comes_near_the_entropy():
    """Within a tenth of H(p) n bits at a density of one in fifty."""
    generator = torch.Generator().manual_seed(2)
    p, n = 0.02, 200_000
    coded = places_coded(torch.rand(n, generator=generator) < p)
    entropy = -(p * torch.tensor(p).log2() + (1 - p) * torch.tensor(1 - p).log2()) * n
    bits = 8 * (coded["unary"].numel() + coded["rest"].numel())
    assert float(entropy) * 0.97 < bits < float(entropy) * 1.1


def test_a_full_mask_is_the_fine_tune_bit_for_bit():
    given = matrix()
    found, _ = kept("graft", given, density=1.0)
    assert torch.equal(found, given.tuned)


def test_random_drops_keep_what_is_left_over_the_share():
    given = matrix()
    found, stored = kept("random-drop", given, density=0.3)
    left = found - given.base
    where = left != 0
    assert torch.allclose(left[where], given.difference[where] / 0.3, rtol=2e-3, atol=1e-4)
    assert 0.2 < float(where.float().mean()) < 0.4 and len(stored["values"]) == int(where.sum())


def test_the_first_singular_vectors_are_the_nearest_of_their_rank():
    given = matrix()
    found, _ = kept("singular-vectors", given, rank=5)
    values = torch.linalg.svdvals(given.difference.double())
    error = (found - given.tuned).double().norm()
    assert float(error) == pytest.approx(float(values[5:].norm()), rel=1e-3)


def test_full_rank_in_sixteen_bits_is_exact_to_their_rounding():
    given = matrix()
    size = float(given.difference.norm())
    for width, wanted in ((16, 1e-3), (32, 1e-5)):
        found, _ = kept("delta-come", given, widths=(width,), ranks=(24,))
        assert float((found - given.tuned).norm()) / size < wanted


def test_the_last_group_fills_the_budget():
    packing: Any = packing_of(DIFFERENCE.chosen("delta-come", widths=(8, 3, 2), ranks=(2, 32), average=1.0))
    groups = list(packing.groups(4096, 4096))
    assert [(width, last - first) for width, first, last in groups] == [
        (8, 2),
        (3, 32),
        (2, 968),
    ]  # the authors' run


def test_mixed_widths_round_on_the_inputs():
    """With inputs in a few directions, rounding on their second moment answers there better."""
    given = matrix(32, 32)
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(400, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    gram = inputs.T @ inputs / 400
    options = {"widths": (3,), "ranks": (32,)}
    blind, _ = kept("delta-come", given, **options)
    seen, _ = kept("delta-come", Matrix("m", given.base, given.tuned, 7, lambda: gram), **options)

    def error(found):
        return float(((found - given.tuned) @ gram * (found - given.tuned)).sum())

    assert error(seen) < error(blind)


def test_a_number_format_rounds_the_difference_and_not_the_weight():
    from workbench.quantization.number.formats import named
    from workbench.quantization.number.grid import fit

    given = matrix()
    for format in ("int4", "nf4", "mxfp4", "uint3", "ternary"):
        found, _ = kept("number-format", given, format=format)
        grid = fit(given.difference, named(format), "auto", 64)
        assert torch.allclose(found, given.base + grid.round(given.difference), atol=1e-6), format


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("delta-come", {"widths": (9,)}, "widths are 1 to 8, 16 or 32"),
        ("delta-come", {"widths": (8, 2), "ranks": (1, 1, 1)}, "give as many, or one fewer"),
        ("number-format", {"format": "bf16"}, "has no scale"),
    ],
)
def test_what_cannot_be_stored_is_refused(name, options, said):
    with pytest.raises(BadInput, match=said):
        packing_of(DIFFERENCE.chosen(name, **options))
