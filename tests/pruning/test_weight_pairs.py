"""Every method with every pattern of weights on every architecture:
the count of zeros that was asked for, or a reason why not.
"""

from __future__ import annotations

import pytest

from tests.conftest import ARCHITECTURES
from tests.pruning.test_pairs import pruned, small
from workbench.pruning.pattern import NM, obeys, parse, sizes
from workbench.subjects import Mask

PATTERNS = {
    "unstructured": 0.7,
    "2:4": 0.5,
    "1:4 outputs": 0.75,
    "block 8x8": 0.5,
    "row": 0.25,
    "column": 0.25,
}
ANYWHERE = {
    "random",
    "magnitude",
    "gradient",
    "obd",
    "taylor2",
    "wanda",
    "sparsegpt",
    "obert",
    "obert-greedy",
    "llm-pruner",
    "ziplm",
}


def valid(pattern: str, architecture: str) -> set[str]:
    """iCBS exchanges single weights."""
    return ANYWHERE | ({"icbs"} if pattern == "unstructured" else set())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("text", list(PATTERNS))
def test_every_pair_has_its_count_of_zeros_or_says_why_not(text, architecture, checkpoints):
    subject, pattern, sparsity = small(architecture, checkpoints), parse(text), PATTERNS[text]
    for _method, prune, result in pruned(subject, text, valid(text, architecture), sparsity=sparsity):
        made, allocation = result.subject, prune.allocation
        missing, widest = 0.0, 0.0
        for layer in made.layers():
            (mask,) = (c.mask for c in layer.changes if isinstance(c, Mask))
            assert obeys(mask, pattern) and bool((layer.weight[~mask] == 0).all())
            largest = 1.0 if isinstance(pattern, NM) else float(sizes(pattern, layer.shape).max())
            off = (~mask).flatten(-2).sum(-1).double() - sparsity * layer.shape[-1] * layer.shape[
                -2
            ]  # of the matrix, or of each expert's
            missing, widest = missing + float(off.sum()), max(widest, largest)
            if isinstance(pattern, NM):
                assert layer.shape[pattern.along] % pattern.of == 0 and not bool(off.any())
            elif allocation == "global":
                continue
            elif prune.method.has("refines"):  # exchanges go across rows and experts
                assert float(off.sum().abs()) <= mask[..., 0].numel() / 2
            else:  # by rows of tiles a rounding for each of them, where there is more than one
                groups = (
                    -(-layer.shape[-2] // pattern.rows)
                    if allocation == "row" and text not in ("row", "column")
                    else 1
                )
                assert bool((off.abs() <= groups * largest / 2 + 1e-6).all())
        if allocation == "global":
            assert abs(missing) <= widest / 2 + 1e-6
    assert not any(layer.changes for layer in subject.layers())  # the subject given is untouched
