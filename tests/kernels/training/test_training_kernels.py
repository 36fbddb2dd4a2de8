"""Chunked loss, norms and activations: PyTorch's own values and gradients;
compressed copies change the backward only, as bounded.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadInput
from workbench.kernels.training.activation import gelu, swiglu
from workbench.kernels.training.linear_cross_entropy import linear_cross_entropy
from workbench.kernels.training.norm import layer_norm, rms_norm
from workbench.kernels.training.saved_activation import compress

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("smoothing", "reduction", "chunk"), [(0.0, "mean", 4), (0.1, "sum", 64), (0.1, "mean", None)]
)
def test_loss_and_gradients_equal_the_unchunked_ones(
    backend: str, smoothing: float, reduction: str, chunk: int | None
) -> None:
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((11, 8), (53, 8), (53,)))
    y = torch.randint(0, 53, (11,))
    y[3] = -100
    expected = F.cross_entropy(x @ w.t() + b, y, label_smoothing=smoothing, reduction=reduction)
    loss = linear_cross_entropy(
        x, w, y, b, label_smoothing=smoothing, reduction=reduction, chunk=chunk, backend=backend
    )
    torch.testing.assert_close(loss, expected)
    for a, e in zip(
        torch.autograd.grad(3 * loss, (x, w, b)), torch.autograd.grad(3 * expected, (x, w, b)), strict=True
    ):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 5), st.sampled_from(BACKENDS))
def test_loss_of_any_shape(tokens: int, vocabulary: int, chunk: int, backend: str) -> None:
    x, w = 5 * torch.randn(tokens, 4), torch.randn(vocabulary, 4)
    y = torch.randint(0, vocabulary, (tokens,))
    loss = linear_cross_entropy(x, w, y, chunk=chunk, reduction="sum", backend=backend)
    torch.testing.assert_close(
        loss,
        F.cross_entropy(x @ w.t(), y, reduction="sum") if tokens else torch.zeros(()),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_at_the_extremes(backend: str) -> None:
    x = torch.tensor([[1e4, 0.0], [float("nan"), 0.0]])
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    sure = linear_cross_entropy(x[:1], w, torch.tensor([0]), backend=backend)
    wrong = linear_cross_entropy(x[:1], w, torch.tensor([1]), backend=backend)
    assert sure == 0 and wrong == 2e4
    assert linear_cross_entropy(x, w, torch.tensor([0, 0]), backend=backend).isnan()
    assert linear_cross_entropy(x, w, torch.tensor([0, -100]), backend=backend) == 0
    assert linear_cross_entropy(x[:1], w, torch.tensor([-100]), backend=backend) == 0


def test_the_logits_of_one_chunk_are_the_largest_thing_in_memory() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    x, w = torch.randn(256, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    y = torch.randint(0, 500, (256,))
    with Watch():
        linear_cross_entropy(x, w, y, chunk=16).backward()
    assert largest == 16 * 500 * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [5, 256, 384])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norms_equal_pytorch_with_gradients(backend: str, width: int, rms: bool, residual: bool) -> None:
    x, r = (torch.randn(2, 3, width, requires_grad=True) for _ in "xr")
    w, b = (torch.randn(width, requires_grad=True) for _ in "wb")
    inputs = [x, w] + ([] if rms else [b]) + ([r] if residual else [])
    h = x + r if residual else x
    grad = torch.randn(2, 3, width)
    if rms:
        expected = F.rms_norm(h, (width,), w, 1e-6)
        got = rms_norm(x, w, r if residual else None, backend=backend)
    else:
        expected = F.layer_norm(h, (width,), w, b)
        got = layer_norm(x, w, b, r if residual else None, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for a, e in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_equal_pytorch_with_gradients(backend: str) -> None:
    a, b = (torch.randn(700, 2).t().requires_grad_() for _ in "ab")
    grad = torch.randn(2, 700)
    for expected, got, inputs in (
        (F.gelu(a), gelu(a, backend=backend), (a,)),
        (F.silu(a) * b, swiglu(a, b, backend=backend), (a, b)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        for x, e in zip(
            torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
        ):
            torch.testing.assert_close(x, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("saved", ["int8", "2bit"])
@pytest.mark.parametrize("shape", [(1, 3), (3, 300), (4, 512), (0, 8)])
def test_compressed_backward_is_the_same_in_kernel_and_reference(saved: str, shape: tuple[int, int]) -> None:
    a, b = (torch.randn(shape, requires_grad=True) for _ in "ab")
    w = torch.randn(shape[1], requires_grad=True)
    grad = torch.randn(shape)
    operations = {
        "gelu": (lambda backend: gelu(a, saved, 3, backend), (a,)),
        "swiglu": (lambda backend: swiglu(a, b, saved, 3, backend), (a, b)),
        "norm": (lambda backend: layer_norm(a, w, None, b, saved=saved, seed=3, backend=backend), (a, b, w)),
    }
    for call, inputs in operations.values():
        results = [torch.autograd.grad(call(backend), inputs, grad) for backend in BACKENDS]
        for x, y in zip(*results, strict=True):
            # xh differs by an ulp between the two, so one 8-bit (or 2-bit) code in many may go the other way.
            assert ((x - y).abs() > 1e-4).float().mean() < 0.01 if x.numel() else x.shape == y.shape


def test_int8_copies_hardly_change_gradients_and_2_bit_copies_do_not_bias_them() -> None:
    x = torch.randn(8, 512, requires_grad=True)
    w = torch.ones(512)
    grad = torch.randn(8, 512)
    exact = torch.autograd.grad(rms_norm(x, w), x, grad)[0]
    int8 = torch.autograd.grad(rms_norm(x, w, saved="int8"), x, grad)[0]
    assert (int8 - exact).norm() < 0.01 * exact.norm()
    h = x.detach()
    draws = torch.stack([compress(h, 2, seed).decompress() for seed in range(400)])
    first = compress(h, 2)
    step = first.step.repeat_interleave(256).view(h.shape)
    part = ((h - first.low.repeat_interleave(256).view(h.shape)) / step) % 1
    error = (draws.mean(0) - h) / (step * (part * (1 - part) / 400).sqrt() + 1e-3)
    assert error.abs().max() < 6 and error.pow(2).mean() < 1.2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, kind: torch.dtype) -> None:
    x, w = torch.randn(4, 300).to(kind), torch.randn(300).to(kind)
    torch.testing.assert_close(
        rms_norm(x, w, backend=backend).float(),
        F.rms_norm(x.float(), (300,), w.float(), 1e-6),
        atol=2e-2,
        rtol=1e-2,
    )
    torch.testing.assert_close(gelu(x, backend=backend).float(), F.gelu(x.float()), atol=1e-2, rtol=1e-2)


def test_extreme_values_stay_in_their_row_or_group() -> None:
    x = torch.randn(3, 512)
    x[1, 7] = float("inf")
    x[2] = 1e-30
    y = layer_norm(x, torch.ones(512), backend="triton")
    assert y[0].isfinite().all() and y[1].isnan().any() and not y[2].any()
    assert gelu(torch.tensor([float("inf"), -1e30, float("nan")]), backend="triton")[:2].tolist() == [
        float("inf"),
        0.0,
    ]
    kept = compress(x, 8).decompress()
    assert kept[0].isfinite().all() and kept[1, 256:].isfinite().all()


def test_impossible_requests_are_refused_in_words() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(BadInput, match="labels: 5"):
        linear_cross_entropy(x, torch.zeros(3, 4), torch.tensor([5, 5]))
    with pytest.raises(BadInput, match="saved = '4bit'"):
        gelu(x, saved="4bit")
    with pytest.raises(BadInput, match="gate and value"):
        swiglu(x, x[:1])
    with pytest.raises(BadInput, match="weight and bias"):
        layer_norm(x, torch.ones(3))
    with pytest.raises(BadInput, match="bits = 4"):
        compress(x, 4)
