"""The factor of a damped second moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.statistics.damping import damped, factor_from_the_last


def transposed(gram: Tensor) -> Tensor:
    return gram.T.contiguous().T


def part_of_a_larger_one(gram: Tensor) -> Tensor:
    larger = torch.zeros(len(gram) + 3, 2 * len(gram))
    larger[2:-1, ::2] = gram
    return larger[2:-1, ::2]


def lopsided(gram: Tensor) -> Tensor:
    """The entries above the diagonal a little off, as a product in single precision leaves them."""
    return gram + (1e-6 * gram).triu(1)


@pytest.mark.parametrize("of", [Tensor.clone, Tensor.double, transposed, part_of_a_larger_one, lopsided])
@pytest.mark.parametrize("width", [1, 7, 96])
def test_in_place_it_is_what_it_is_beside(of: Callable[[Tensor], Tensor], width: int) -> None:
    """An operation that writes into its input reads the same entries as the one that does not, and leaves
    the caller's tensor alone.
    """
    inputs = torch.randn(2 * width, width)
    gram = of(inputs.T @ inputs)
    before = gram.clone()
    found = factor_from_the_last(gram, 0.01)
    assert found is not None and torch.equal(gram, before)
    assert torch.equal(found, torch.linalg.cholesky(damped(gram, 0.01).flip(0, 1)).flip(0, 1))
    assert torch.equal(found, found.triu())
    assert torch.allclose(found @ found.T, damped(before, 0.01), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("gram", [torch.ones(5, 5), torch.full((3, 3), torch.nan), -torch.eye(4)])
def test_what_does_not_factorise_gives_none(gram: Tensor) -> None:
    assert factor_from_the_last(gram, 0.0) is None
