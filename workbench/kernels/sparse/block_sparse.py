"""Block-sparse weight times dense activations: y = x W^T with W in block rows (BSR),
forward and both backward products.

    forward  y[:, r]  = sum over the blocks b of row r      x[:, c_b] W_b^T
    input    dx[:, c] = sum over the blocks b of column c  dy[:, r_b] W_b
    weight   dW_b     = dy[:, r_b]^T x[:, c_b]                 only where W has a block

Absent blocks are neither stored nor visited. Blocks may be any size from 4 x 4; from 16 to 128 the Triton
kernels run. Wang et al. (2022, sparse inference on CPUs);
tile skipping as in block-sparse OpenAI kernels (Gray et al., 2017). Where this departs from the former: the
product on a CPU is torch's of block rows in float, with square blocks, no 8-bit integers and no fused
activation.

>>> w = torch.randn(8, 12)
>>> w[:4, 4:] = 0
>>> weight = block_sparse(w, block=4)
>>> weight.blocks, bool(torch.equal(weight.dense(), w))
(4, True)
>>> x = torch.randn(3, 12)
>>> bool(torch.allclose(block_sparse_linear(x, weight.values, weight), x @ w.T, atol=1e-5))
True
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, mma, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel

#: density up to which torch's product of block rows beats the dense one on a CPU at 64 tokens and more
SPARSE = 0.2


@dataclass(frozen=True)
class BlockSparse:
    """Where the blocks are (`rows`, `columns`: (blocks,) int64, in row order), and their values
    (blocks, block, block).
    """

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]
    block: int

    @property
    def blocks(self) -> int:
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Share of the blocks that is present."""
        return self.blocks * self.block**2 / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def by_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(starts, other index, block number) int32 for walking the blocks of each row."""
        return self._walk(self.rows, self.columns, self.shape[0] // self.block)

    @cached_property
    def by_column(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for each column: the transposed weight, without moving a value."""
        return self._walk(self.columns, self.rows, self.shape[1] // self.block)

    @staticmethod
    def _walk(
        major: torch.Tensor, minor: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        order = torch.argsort(major, stable=True)
        starts = F.pad(torch.bincount(major, minlength=count).cumsum(0), (1, 0))
        return starts.int(), minor[order].int(), order.int()

    def dense(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The full matrix (out, in); differentiable in `values`."""
        values = self.values if values is None else values
        grid = values.new_zeros(
            self.shape[0] // self.block, self.shape[1] // self.block, self.block, self.block
        )
        return grid.index_put((self.rows, self.columns), values).transpose(1, 2).reshape(self.shape)

    @cached_property
    def _kept(self) -> dict[int, torch.Tensor]:
        return {}

    def matrix(self) -> torch.Tensor:
        """(out, in) for products without gradients: torch's block rows where they are faster than a dense
        matrix, made once for the values as they are.
        """
        version = self.values._version
        if version not in self._kept:
            self._kept.clear()
            values = self.values.detach()
            self._kept[version] = self._block_rows(values) if self.density <= SPARSE else self.dense(values)
        return self._kept[version]

    def _block_rows(self, values: torch.Tensor) -> torch.Tensor:
        starts = F.pad(torch.bincount(self.rows, minlength=self.shape[0] // self.block).cumsum(0), (1, 0))
        with warnings.catch_warnings():  # "in beta state"
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_bsr_tensor(starts, self.columns, values, self.shape)


def block_sparse(weight: torch.Tensor, block: int, keep: torch.Tensor | None = None) -> BlockSparse:
    """Cut `weight` (out, in) into block x block tiles and keep those with a non-zero, or those where `keep`
    (bool) says.
    """
    out, width = weight.shape
    if block < 4 or out % block or width % block:
        raise BadInput(f"block = {block}: at least 4, and a divisor of both sides of {tuple(weight.shape)}")
    tiles = weight.reshape(out // block, block, width // block, block).transpose(1, 2)
    present = (tiles != 0).flatten(2).any(2) if keep is None else keep
    if present.shape != tiles.shape[:2]:
        raise BadInput(f"keep.shape = {tuple(present.shape)}: one entry per block, {tuple(tiles.shape[:2])}")
    rows, columns = present.nonzero(as_tuple=True)
    return BlockSparse(tiles[rows, columns].contiguous(), rows, columns, (out, width), block)


@jit
def _product(
    x_ptr,
    w_ptr,
    y_ptr,
    starts_ptr,
    other_ptr,
    number_ptr,
    tokens,
    x_stride,
    y_stride,
    w_inner,
    w_outer,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One block column of the result; w_inner and w_outer are the block's strides along the summed
    and the kept index.
    """
    target = tl.program_id(0)
    tokens_here = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = tokens_here < tokens
    i = tl.arange(0, PAD)
    small = i < BLOCK
    acc = tl.zeros([ROWS, PAD], tl.float32)
    for place in range(tl.load(starts_ptr + target), tl.load(starts_ptr + target + 1)):
        source = tl.load(other_ptr + place)
        number = tl.load(number_ptr + place).to(tl.int64)
        x_tile = x_ptr + tokens_here[:, None].to(tl.int64) * x_stride + source * BLOCK + i[None, :]
        x = tl.load(x_tile, mask=inside[:, None] & small[None, :], other=0.0)
        w_tile = w_ptr + number * (BLOCK * BLOCK) + i[:, None] * w_inner + i[None, :] * w_outer
        w = tl.load(w_tile, mask=small[:, None] & small[None, :], other=0.0)
        acc = mma(x, w, acc)
    out = y_ptr + tokens_here[:, None].to(tl.int64) * y_stride + target * BLOCK + i[None, :]
    tl.store(out, narrow(acc, y_ptr.dtype.element_ty), mask=inside[:, None] & small[None, :])


@jit
def _sampled(
    x_ptr,
    g_ptr,
    dw_ptr,
    rows_ptr,
    columns_ptr,
    tokens,
    x_stride,
    g_stride,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dW of one block: a product over all tokens."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + number)
    column = tl.load(columns_ptr + number)
    i = tl.arange(0, PAD)
    small = (i < BLOCK)[None, :]
    acc = tl.zeros([PAD, PAD], tl.float32)
    for first in range(0, tokens, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = (t < tokens)[:, None]
        g = tl.load(
            g_ptr + t[:, None].to(tl.int64) * g_stride + row * BLOCK + i[None, :],
            mask=inside & small,
            other=0.0,
        )
        x = tl.load(
            x_ptr + t[:, None].to(tl.int64) * x_stride + column * BLOCK + i[None, :],
            mask=inside & small,
            other=0.0,
        )
        acc = mma(tl.trans(g), x, acc)
    out = dw_ptr + number * (BLOCK * BLOCK) + i[:, None] * BLOCK + i[None, :]
    tl.store(out, narrow(acc, dw_ptr.dtype.element_ty), mask=(i < BLOCK)[:, None] & small)


def _warps(block: int) -> int:
    return 4 if block <= 64 else 8


def _multiply(
    x: torch.Tensor,
    values: torch.Tensor,
    walk: tuple[torch.Tensor, ...],
    width: int,
    block: int,
    transposed: bool,
) -> torch.Tensor:
    y = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if y.numel():
        rows = 16 if x.shape[0] <= 16 else 64
        strides = (block, 1) if transposed else (1, block)
        with on_device(x):
            _product[(width // block, cdiv(x.shape[0], rows))](
                x,
                values,
                y,
                *walk,
                x.shape[0],
                x.stride(0),
                y.stride(0),
                *strides,
                BLOCK=block,
                PAD=power_of_two(block, 16),
                ROWS=rows,
                num_warps=_warps(block),
                num_stages=3,
            )
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, weight: BlockSparse) -> torch.Tensor:
        x, values = x.contiguous(), values.contiguous()
        ctx.save_for_backward(x, values)
        ctx.weight = weight
        return _multiply(x, values, weight.by_row, weight.shape[0], weight.block, transposed=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, values = ctx.saved_tensors
        weight, g = ctx.weight, grads[0].contiguous()
        dx = (
            _multiply(g, values, weight.by_column, weight.shape[1], weight.block, transposed=True)
            if ctx.needs_input_grad[0]
            else None
        )
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(values)
            if dw.numel():
                with on_device(x):
                    _sampled[(weight.blocks,)](
                        x,
                        g,
                        dw,
                        weight.rows,
                        weight.columns,
                        x.shape[0],
                        x.stride(0),
                        g.stride(0),
                        BLOCK=weight.block,
                        PAD=power_of_two(weight.block, 16),
                        ROWS=32,
                        num_warps=4,
                        num_stages=2,
                    )
        return dx, dw, None


def _learns(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    weight: BlockSparse,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x (..., in) times the transpose of a block-sparse weight (out, in), plus bias;
    differentiable in x, values and bias.

    `values` (blocks, block, block) is the trainable part, `weight` says where it lies. Without gradients a
    CPU multiplies `weight.matrix()`, block rows or the dense matrix, whichever is faster; with gradients the
    masked dense matrix.
    """
    if x.shape[-1] != weight.shape[1] or values.shape != weight.values.shape:
        raise BadInput(
            f"x {tuple(x.shape)}, values {tuple(values.shape)}: "
            f"need (..., {weight.shape[1]}) and {tuple(weight.values.shape)}"
        )
    flat = x.reshape(-1, weight.shape[1])
    size = 2 * flat.shape[0] * weight.blocks * weight.block**2
    if 16 <= weight.block <= 128 and use_triton("block_sparse", size, x, backend):
        y = _Linear.apply(flat, values, weight)
        y = y if bias is None else y + bias
    elif values is weight.values and x.device.type == "cpu" and not _learns(x, values, bias):
        matrix = weight.matrix()
        if matrix.layout == torch.strided:
            y = F.linear(flat, matrix, bias)
        else:
            y = (matrix @ flat.T).T
            y = y if bias is None else y + bias
    else:
        y = F.linear(flat, weight.dense(values), bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


_TYPES = dict.fromkeys(("starts_ptr", "other_ptr", "number_ptr"), "*i32")

KERNELS = (
    Kernel(
        "block_sparse.product",
        _product,
        tuple(
            Configuration(
                f"{kind}-{block}-t{rows}",
                {"x_ptr": f"*{kind}", "w_ptr": f"*{kind}", "y_ptr": f"*{kind}"} | _TYPES,
                {"BLOCK": block, "PAD": power_of_two(block, 16), "ROWS": rows},
                warps=_warps(block),
            )
            for kind, block, rows in (
                ("bf16", 16, 64),
                ("bf16", 64, 64),
                ("bf16", 64, 16),
                ("bf16", 128, 64),
                ("bf16", 48, 64),
                ("fp32", 32, 64),
            )
        ),
    ),
    Kernel(
        "block_sparse.backward_weight",
        _sampled,
        tuple(
            Configuration(
                f"bf16-{block}",
                {
                    "x_ptr": "*bf16",
                    "g_ptr": "*bf16",
                    "dw_ptr": "*bf16",
                    "rows_ptr": "*i64",
                    "columns_ptr": "*i64",
                },
                {"BLOCK": block, "PAD": block, "ROWS": 32},
                stages=2,
            )
            for block in (16, 64, 128)
        ),
    ),
)


def cases() -> list[Case]:
    """4096 x 4096 at 90 % sparsity in 64 x 64 blocks, 2048 tokens, against the dense product."""
    n, tokens = 4096, 2048

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        dense = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        weight = block_sparse(dense, 64, torch.rand(n // 64, n // 64, device=device) < 0.1)
        x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
        return lambda: _multiply(x, weight.values, weight.by_row, n, 64, False), lambda: x @ dense.t()

    flops = 0.1 * 2 * tokens * n * n
    return [
        Case(
            "block_sparse",
            f"{tokens} x {n} x {n} bf16, 64 x 64, 90 %",
            int(flops),
            4.0 * tokens * n + 0.2 * n * n,
            flops,
            make,
            "bf16",
            "dense matmul",
        )
    ]
