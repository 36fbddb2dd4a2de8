"""Block Fisher and radix select: equal to linear algebra and to sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.sparse.block_fisher import block_fisher, block_fisher_inverse
from workbench.kernels.sparse.threshold import keep_largest, kth_largest, kth_smallest

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("samples", "weights", "block"), [(7, 23, 5), (40, 100, 50), (3, 20, 20), (33, 1, 1)]
)
def test_accumulated_fisher_and_its_inverse_equal_linear_algebra(
    backend: str, samples: int, weights: int, block: int
) -> None:
    g = torch.randn(weights, samples).t()  # not contiguous
    padded = torch.nn.functional.pad(g.double(), (0, -weights % block)).view(samples, -1, block)
    exact = torch.einsum("kbi,kbj->bij", padded, padded) / samples
    torch.testing.assert_close(block_fisher(g, block, backend=backend).double(), exact, atol=1e-5, rtol=1e-4)
    inverse = block_fisher_inverse(g, block, damping=0.05, backend=backend).double()
    torch.testing.assert_close(
        inverse, torch.linalg.inv(exact + 0.05 * torch.eye(block)), atol=2e-3, rtol=1e-3
    )
    torch.testing.assert_close(inverse, inverse.transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_parts_give_the_same_as_at_once(backend: str) -> None:
    g = torch.randn(12, 30)
    whole, inverse = block_fisher(g, 10, backend=backend), block_fisher_inverse(g, 10, 0.1, backend=backend)
    part, part_inverse = None, None
    for chunk in g.split(5):
        part = block_fisher(chunk, 10, part, 12, backend)
        part_inverse = block_fisher_inverse(chunk, 10, 0.1, part_inverse, 12, backend)
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part_inverse, inverse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_accumulated_in_fp32(kind: torch.dtype) -> None:
    g = torch.randn(70, 16).to(kind)
    torch.testing.assert_close(
        block_fisher(g, 16, backend="triton"), block_fisher(g.float(), 16), atol=1e-4, rtol=1e-4
    )


def test_no_gradients_leave_the_damping() -> None:
    inverse = block_fisher_inverse(torch.zeros(0, 8), 4, 0.5, backend="triton")
    assert torch.equal(inverse, 2 * torch.eye(4).repeat(2, 1, 1))


def test_a_bad_gradient_spoils_its_own_block_only() -> None:
    g = torch.randn(4, 32)
    g[1, 3] = float("nan")
    inverse = block_fisher_inverse(g, 16, 0.1, backend="triton")
    assert inverse[0].isnan().any() and inverse[1].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40),
    st.data(),
    st.sampled_from(BACKENDS),
)
def test_kth_largest_equals_sorting(values: list[float], data: st.DataObject, backend: str) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    x = torch.tensor(values)
    assert kth_largest([x[:cut], x[cut:]], k, backend) == x.abs().sort(descending=True).values[k - 1].item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kth_smallest_score_keeps_its_sign(backend: str, kind: torch.dtype) -> None:
    x = torch.randn(5000).to(kind)
    x[:5], x[5:9], x[9], x[10] = 0.0, -1e-40, float("inf"), float("-inf")
    for k in (1, 2, 2499, 2500, 2503, 4999, 5000):
        for scores in (x, x - 3, x + 3):
            want = scores.kthvalue(k).values
            assert torch.equal(kth_smallest(scores, k, backend), want[None])
    rows = x.view(50, 100)
    assert torch.equal(kth_smallest(rows, 7, backend)[:, 0], rows.kthvalue(7).values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_many_values_with_ties_subnormals_and_infinities(backend: str, kind: torch.dtype) -> None:
    x = torch.randn(40000).to(kind)
    x[:5], x[5:9], x[9] = 0.0, 1e-40, float("-inf")
    ordered = x.abs().float().sort(descending=True).values
    for k in (1, 2, 20000, 39991, 40000):
        assert kth_largest([x], k, backend) == ordered[k - 1].item()
    for k in (0, 1, 12345, 40000):
        masks = keep_largest([x[:100].view(10, 10), x[100:]], k, backend)
        assert sum(int(m.sum()) for m in masks) == k
        kept = torch.cat([m.flatten() for m in masks])
        if 0 < k < 40000:
            assert x[kept].abs().float().min() >= x[~kept].abs().float().max()


def test_impossible_requests_are_refused_in_words() -> None:
    with pytest.raises(BadInput, match="k = 3"):
        kth_largest([torch.zeros(2)], 3)
    with pytest.raises(BadInput, match="float64"):
        kth_largest([torch.zeros(2, dtype=torch.float64)], 1)
    with pytest.raises(BadInput, match="damping = 0"):
        block_fisher_inverse(torch.zeros(2, 4), 2, 0.0)
    assert block_fisher(torch.ones(2, 400), 200, damping=0.5).shape == (2, 200, 200)
    with pytest.raises(BadInput, match="block = 200"):
        block_fisher(torch.zeros(2, 400), 200, backend="triton")
