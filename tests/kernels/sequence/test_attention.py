"""Packed attention and rotary positions: kernel = PyTorch path = definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.sequence.attention import varlen_attention
from workbench.kernels.sequence.attention_reference import attention_reference
from workbench.kernels.sequence.packing import pack_lengths
from workbench.kernels.sequence.rotary import rotary, rotary_tables

CASES = [  # lengths, heads, key heads, dim, left, right, ALiBi
    ((5, 1, 37), 2, 2, 16, None, None, False),
    ((5, 40), 4, 2, 24, None, 0, True),
    ((45, 1), 2, 1, 16, 20, 0, False),
    ((50,), 2, 2, 16, 7, 9, True),
]


@pytest.mark.parametrize(("lengths", "heads", "key_heads", "dim", "left", "right", "alibi"), CASES)
def test_forward_and_backward_equal_the_definition(
    lengths: tuple[int, ...],
    heads: int,
    key_heads: int,
    dim: int,
    left: int | None,
    right: int | None,
    alibi: bool,
) -> None:
    packing = pack_lengths(lengths)
    q = torch.randn(packing.tokens, heads, dim, requires_grad=True)
    k, v = torch.randn(2, packing.tokens, key_heads, dim).unbind(0)
    k, v = k.requires_grad_(), v.requires_grad_()
    slopes = torch.rand(heads) if alibi else None
    grad = torch.randn_like(q)
    expected = attention_reference(*(x.double() for x in (q, k, v)), packing, left, right, slopes)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad.double())
    for backend in ("torch", "triton"):
        out = varlen_attention(q, k, v, packing, left, right, slopes, backend=backend)
        torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), expected_grads, strict=True):
            torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_definition_on_the_same_rounded_inputs(kind: torch.dtype) -> None:
    packing = pack_lengths([33, 4])
    qkv = torch.randn(packing.tokens, 3, 2, 16).to(
        kind
    )  # a fused projection: q, k, v are strided views of it
    q, k, v = qkv.unbind(1)
    expected = attention_reference(q.float(), k.float(), v.float(), packing, right=0)
    out = varlen_attention(q, k, v, packing, right=0, backend="triton")
    assert out.dtype == kind
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([None, 0]),
    st.sampled_from([8, 20]),
)
def test_any_lengths_and_windows(lengths: list[int], left: int | None, right: int | None, dim: int) -> None:
    packing = pack_lengths(lengths)
    q, k, v = torch.randn(3, packing.tokens, 2, dim).unbind(0)
    expected = attention_reference(q, k, v, packing, left, right)
    for backend in ("torch", "triton"):
        torch.testing.assert_close(
            varlen_attention(q, k, v, packing, left, right, backend=backend), expected, atol=1e-5, rtol=1e-5
        )


def test_large_scores_do_not_overflow_and_nan_stays_in_its_sequence() -> None:
    packing = pack_lengths([4, 6])
    q, k, v = torch.randn(3, 10, 1, 16).unbind(0)
    q, k = 1e4 * q, 1e4 * k
    out = varlen_attention(q, k, v, packing, backend="triton")
    torch.testing.assert_close(out, attention_reference(q, k, v, packing), atol=1e-4, rtol=1e-4)
    v = v.clone()
    v[0] = float("nan")
    out = varlen_attention(q, k, v, packing, backend="triton")
    assert out[:4].isnan().any()
    assert out[4:].isfinite().all()


def test_no_tokens_give_no_output() -> None:
    q = torch.zeros(0, 2, 16)
    for backend in ("torch", "triton"):
        assert varlen_attention(q, q, q, pack_lengths([]), backend=backend).shape == (0, 2, 16)


def test_rotation_depends_on_relative_position_only() -> None:
    cos, sin = rotary_tables(64, 16)
    q, k = torch.randn(2, 1, 1, 16)
    near = [rotary(x, cos, sin, torch.tensor([p]), "triton") for x, p in ((q, 7), (k, 3))]
    far = [rotary(x, cos, sin, torch.tensor([p]), "triton") for x, p in ((q, 47), (k, 43))]
    torch.testing.assert_close((near[0] * near[1]).sum(), (far[0] * far[1]).sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [6, 16, 40])
def test_rotary_kernel_equals_its_reference_with_gradients(dim: int) -> None:
    cos, sin = rotary_tables(9, dim)
    x = torch.randn(7, dim, 3).transpose(1, 2).requires_grad_()  # not contiguous
    positions = torch.tensor([0, 1, 2, 8, 0, 1, 5])
    grad = torch.randn(7, 3, dim)
    results = [rotary(x, cos, sin, positions, backend) for backend in ("torch", "triton")]
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in results), atol=1e-6, rtol=1e-6)


def test_rotation_inside_attention_equals_rotation_before_it() -> None:
    packing = pack_lengths([3, 5])
    q, k, v = torch.randn(3, 8, 2, 16).unbind(0)
    tables = rotary_tables(8, 16)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    before = attention_reference(
        rotary(q, *tables, positions), rotary(k, *tables, positions), v, packing, right=0
    )
    for backend in ("torch", "triton"):
        torch.testing.assert_close(
            varlen_attention(q, k, v, packing, right=0, rotation=tables, backend=backend),
            before,
            atol=1e-5,
            rtol=1e-5,
        )


def test_wrong_shapes_are_refused_in_words() -> None:
    q = torch.zeros(4, 3, 16)
    with pytest.raises(BadInput, match="multiple"):
        varlen_attention(q, q[:, :2], q[:, :2], pack_lengths([4]))
    with pytest.raises(BadInput, match="packing has 5"):
        varlen_attention(q, q, q, pack_lengths([5]))
    with pytest.raises(BadInput, match="left = -1"):
        varlen_attention(q, q, q, pack_lengths([4]), left=-1)
