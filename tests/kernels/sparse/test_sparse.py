"""Block-sparse and 2:4 products: equal to the dense masked product, with its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.sparse.block_sparse import block_sparse, block_sparse_linear
from workbench.kernels.sparse.semi_structured import (
    compress_2_4,
    double_prune,
    mask_2_4,
    semi_structured_linear,
)


@pytest.mark.parametrize(("block", "rows", "columns"), [(16, 3, 4), (48, 2, 1), (64, 2, 2), (128, 1, 2)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_block_sparse_product_and_gradients_equal_the_dense_masked_ones(
    block: int, rows: int, columns: int, backend: str
) -> None:
    keep = torch.rand(rows, columns) < 0.5
    dense = torch.randn(rows * block, columns * block) * keep.repeat_interleave(block, 0).repeat_interleave(
        block, 1
    )
    weight = block_sparse(dense, block, keep)
    assert weight.blocks == int(keep.sum())
    x = torch.randn(2, 9, columns * block, requires_grad=True)
    w = dense.clone().requires_grad_()
    bias = torch.randn(rows * block, requires_grad=True)
    grad = torch.randn(2, 9, rows * block)
    dx, dw, db = torch.autograd.grad(torch.nn.functional.linear(x, w, bias), (x, w, bias), grad)
    values = weight.values.clone().requires_grad_()
    y = block_sparse_linear(x, values, weight, bias, backend)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias), atol=1e-4, rtol=1e-4)
    got = torch.autograd.grad(y, (x, values, bias), grad)
    torch.testing.assert_close(got[0], dx, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], block_sparse(dw, block, keep).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[2], db)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 70), st.integers(1, 3), st.integers(1, 3), st.floats(0, 1))
def test_any_number_of_tokens_and_any_pattern(tokens: int, rows: int, columns: int, density: float) -> None:
    keep = torch.rand(rows, columns) < density
    weight = block_sparse(torch.randn(16 * rows, 16 * columns), 16, keep)
    x = torch.randn(tokens, 16 * columns)
    torch.testing.assert_close(
        block_sparse_linear(x, weight.values, weight, backend="triton"),
        x @ weight.dense().t(),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_strided_input(kind: torch.dtype) -> None:
    weight = block_sparse(
        torch.randn(32, 48).to(kind), 16, torch.tensor([[True, False, True], [False, True, True]])
    )
    x = torch.randn(48, 5).to(kind).t()
    y = block_sparse_linear(x, weight.values, weight, backend="triton")
    torch.testing.assert_close(y.float(), x.float() @ weight.dense().float().t(), atol=0.1, rtol=2e-2)
    packed = compress_2_4(torch.randn(33, 48).to(kind))
    y = semi_structured_linear(x, packed.values, packed, backend="triton")
    torch.testing.assert_close(y.float(), x.float() @ packed.dense().float().t(), atol=0.1, rtol=2e-2)


def test_infinities_reach_only_the_outputs_they_are_multiplied_into() -> None:
    weight = block_sparse(torch.ones(32, 32), 16, torch.tensor([[True, False], [False, True]]))
    x = torch.zeros(2, 32)
    x[0, 3] = float("inf")
    x[1, 20] = float("nan")
    y = block_sparse_linear(x, weight.values, weight, backend="triton")
    assert y[0, :16].isinf().all() and y[1, 16:].isnan().all()
    assert not y[0, 16:].any() and not y[1, :16].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("tokens", "width", "out"), [(1, 4, 3), (3, 132, 70), (20, 64, 64), (0, 8, 8)])
def test_2_4_product_and_gradients_equal_the_dense_masked_ones(
    tokens: int, width: int, out: int, backend: str
) -> None:
    weight = compress_2_4(torch.randn(out, width))
    x = torch.randn(tokens, width, requires_grad=True)
    values = weight.values.clone().requires_grad_()
    w = weight.dense().requires_grad_()
    grad = torch.randn(tokens, out)
    dx, dw = torch.autograd.grad(x @ w.t(), (x, w), grad)
    y = semi_structured_linear(x, values, weight, backend=backend)
    torch.testing.assert_close(y, x @ weight.dense().t(), atol=1e-4, rtol=1e-4)
    got = torch.autograd.grad(y, (x, values), grad)
    torch.testing.assert_close(got[0], dx, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.dense(got[1]), dw * (mask_2_4(w) & (w != 0)), atol=1e-4, rtol=1e-4)


def test_double_pruning_removes_the_share_that_the_formula_says() -> None:
    weight = torch.randn(512, 512)
    once, twice = mask_2_4(weight), double_prune(weight)
    assert (once.view(512, -1, 4).sum(2) == 2).all()
    assert (twice.t().reshape(512, -1, 4).sum(2) <= 2).all()
    extra = float((once & ~twice).float().mean())
    assert extra == pytest.approx(0.09375, abs=0.004)  # sum over j > 2 of C(4, j) (j - 2) / 2^4 / 4


def test_impossible_patterns_are_refused_in_words() -> None:
    with pytest.raises(BadInput, match="block = 5"):
        block_sparse(torch.zeros(8, 8), 5)
    with pytest.raises(BadInput, match="multiple of 4"):
        compress_2_4(torch.zeros(2, 6))
    with pytest.raises(BadInput, match="exactly two"):
        compress_2_4(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_without_gradients_a_product_is_made_once_and_follows_its_values(share: float) -> None:
    torch.manual_seed(0)
    keep = torch.rand(6, 8) < share
    keep[0, 0] = True
    dense = torch.randn(24, 32) * keep.repeat_interleave(4, 0).repeat_interleave(4, 1)
    weight, x, bias = block_sparse(dense, 4), torch.randn(2, 5, 32), torch.randn(24)
    for _ in range(2):
        assert torch.allclose(
            block_sparse_linear(x, weight.values, weight, bias), x @ dense.T + bias, atol=1e-5
        )
    assert weight.matrix() is weight.matrix()
    assert (weight.matrix().layout == torch.strided) == (weight.density > 0.2)
    with torch.no_grad():
        weight.values.mul_(2.0)
    assert torch.allclose(block_sparse_linear(x, weight.values, weight), 2 * x @ dense.T, atol=1e-5)
