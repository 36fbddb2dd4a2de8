"""Every row-wise operation at the edges: types, no rows, one row, strides, and rows of infinities,
NaN and subnormals.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from workbench.kernels.quantized.hadamard import hadamard
from workbench.kernels.quantized.kronecker import kronecker
from workbench.kernels.quantized.low_bit_linear import FORMATS, low_bit_linear, pack_weight
from workbench.kernels.quantized.numbers import NF4
from workbench.kernels.quantized.quantize import quantize_codebook, quantize_integer, quantize_minifloat
from workbench.kernels.sequence.attention import varlen_attention
from workbench.kernels.sequence.fft_convolution import fft_convolution
from workbench.kernels.sequence.packing import gather_rows, pack_lengths
from workbench.kernels.sequence.rotary import rotary, rotary_tables
from workbench.kernels.sparse.block_sparse import block_sparse, block_sparse_linear
from workbench.kernels.sparse.semi_structured import compress_2_4, semi_structured_linear
from workbench.kernels.sparse.threshold import kth_largest
from workbench.kernels.training.activation import gelu, swiglu
from workbench.kernels.training.linear_cross_entropy import linear_cross_entropy
from workbench.kernels.training.norm import layer_norm, rms_norm

WIDTH = 128
Operation = Callable[[torch.Tensor, str], torch.Tensor]


def weight(rows: int = 32) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)) / 8


def sparse(x: torch.Tensor, backend: str) -> torch.Tensor:
    w = block_sparse(weight().to(x.dtype), 16, torch.arange(16).view(2, 8) % 3 > 0)
    return block_sparse_linear(x, w.values, w, backend=backend)


def two_of_four(x: torch.Tensor, backend: str) -> torch.Tensor:
    w = compress_2_4(weight().to(x.dtype))
    return semi_structured_linear(x, w.values, w, backend=backend)


def attend(x: torch.Tensor, backend: str) -> torch.Tensor:
    """Each row a sequence of one token."""
    q = x.view(x.shape[0], 4, 32) if x.is_contiguous() else x.unflatten(1, (4, 32))
    return varlen_attention(q, q, q, pack_lengths([1] * x.shape[0]), backend=backend).flatten(1)


def rotate(x: torch.Tensor, backend: str) -> torch.Tensor:
    return rotary(
        x.unflatten(1, (4, 32)), *rotary_tables(16, 32), torch.arange(x.shape[0]) % 16, backend
    ).flatten(1)


def kron(x: torch.Tensor, backend: str) -> torch.Tensor:
    return kronecker(x, weight()[:8, :8].to(x.dtype), weight()[:16, :16].to(x.dtype), backend)


def convolve(x: torch.Tensor, backend: str) -> torch.Tensor:
    return fft_convolution(x[:, None], weight(1), backend)[:, 0]


def losses(x: torch.Tensor, backend: str) -> torch.Tensor:
    labels = torch.zeros(1, dtype=torch.long)
    rows = [linear_cross_entropy(row[None], weight().to(x.dtype), labels, backend=backend) for row in x]
    return torch.stack(rows)[:, None] if rows else x.new_zeros(0, 1)


ONE = torch.ones(1, 1)
OPERATIONS: dict[str, Operation] = {
    "packing": lambda x, b: gather_rows(x, torch.arange(x.shape[0]), b),
    "rotary": rotate,
    "attention": attend,
    "block_sparse": sparse,
    "semi_structured": two_of_four,
    **{
        f"low_bit_{f}": lambda x, b, f=f: low_bit_linear(x, pack_weight(weight(), f, 32), backend=b)
        for f in FORMATS
    },  # type: ignore[misc]
    "integer": lambda x, b: quantize_integer(x, ONE, -8, 7, backend=b),
    "minifloat": lambda x, b: quantize_minifloat(x, ONE, 4, 3, "nan", backend=b),
    "codebook": lambda x, b: quantize_codebook(x, ONE, NF4, backend=b),
    "hadamard": lambda x, b: hadamard(x, 32, b),
    "kronecker": kron,
    "gelu": lambda x, b: gelu(x, "int8", backend=b),
    "swiglu": lambda x, b: swiglu(x, x, "2bit", backend=b),
    "layer_norm": lambda x, b: layer_norm(x, torch.ones(WIDTH, dtype=x.dtype), backend=b),
    "rms_norm": lambda x, b: rms_norm(x, torch.ones(WIDTH, dtype=x.dtype), saved="int8", backend=b),
    "fft_convolution": convolve,
    "linear_cross_entropy": losses,
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_strides(name: str, kind: torch.dtype) -> None:
    x = torch.randn(WIDTH, 5).to(kind).t()
    assert not x.is_contiguous()
    torch_path, kernel = (OPERATIONS[name](x, backend) for backend in ("torch", "triton"))
    assert kernel.dtype == torch_path.dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[kind]
    torch.testing.assert_close(kernel.float(), torch_path.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_rows_and_one_row(name: str) -> None:
    for rows in (0, 1):
        x = torch.randn(rows, WIDTH)
        torch_path, kernel = (OPERATIONS[name](x, backend) for backend in ("torch", "triton"))
        assert kernel.shape == torch_path.shape and kernel.shape[0] == rows
        torch.testing.assert_close(kernel, torch_path, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_extreme_rows_do_not_touch_the_others(name: str) -> None:
    x = torch.randn(6, WIDTH)
    x[1], x[2] = 1e-40, 0.0
    x[3] *= 1e4
    x[4, 7], x[5, 9] = float("inf"), float("nan")
    torch_path, kernel = (OPERATIONS[name](x, backend) for backend in ("torch", "triton"))
    assert kernel[:4].isfinite().all()
    torch.testing.assert_close(kernel[:4], torch_path[:4], atol=1e-4, rtol=2e-3)
    assert kernel[5].isnan().any()


def test_threshold_reads_strided_tensors() -> None:
    x = torch.randn(40, 50).t()[::2]
    assert kth_largest([x], 100, "triton") == x.abs().flatten().sort(descending=True).values[99].item()
