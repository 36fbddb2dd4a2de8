"""Packing: padded batches (batch, length, ...) to their valid tokens (tokens, ...) and back;
bin packing of sequences.

ByteTransformer (Zhai et al., 2023) and the unpadded BERT of Zeng et al. (2022) run linears, norms
and activations on the packed tokens and only attention per sequence;
Prepacking (Zhao et al., 2024) packs prompts into rows by bin packing.

>>> mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
>>> packing = pack_mask(mask)
>>> packing.lengths, packing.tokens, packing.padding_fraction
((2, 2, 4), 8, 0.333...)
>>> x = torch.arange(12.0).view(3, 4, 1)
>>> bool((unpack(pack(x, packing), packing) == x * mask[..., None]).all())
True
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


@dataclass(frozen=True)
class Packing:
    """Where each packed token comes from. Sequences lie in order of length, so equal lengths are neighbours.

    `indices` (tokens,) are flat positions in the (batch, length) grid, `cu_seqlens` (sequences + 1,) int32
    the starts of the sequences; both on the mask's device.
    `lengths` are on the host and never need a synchronisation again.
    """

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding_fraction(self) -> float:
        """Share of the padded grid that is padding; 0 for an empty grid."""
        return 1 - self.tokens / max(1, self.batch * self.length)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """(batch * length,) int32: the packed position of each grid position, -1 for padding."""
        inverse = torch.full((self.batch * self.length,), -1, dtype=torch.int32, device=self.indices.device)
        inverse[self.indices] = torch.arange(self.tokens, dtype=torch.int32, device=self.indices.device)
        return inverse

    @property
    def columns(self) -> torch.Tensor:
        """(tokens,) int64: the column of each packed token in the padded grid."""
        return self.indices % max(1, self.length)

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, sequences, length) for each run of neighbouring sequences of one length."""
        runs, start = [], 0
        for length, run in itertools.groupby(self.lengths):
            count = sum(1 for _ in run)
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    def tiles(self, rows: int) -> torch.Tensor:
        """(tiles, 2) int32 on the tokens' device: sequence and first row of each tile of `rows` tokens,
        longest sequences first.
        """
        pairs = [
            (sequence, start)
            for sequence in range(len(self.lengths) - 1, -1, -1)
            for start in range(0, self.lengths[sequence], rows)
        ]
        return torch.tensor(pairs, dtype=torch.int32).view(-1, 2).to(self.indices.device)


def pack_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """A packing of sequences that are already one after the other, in the given order;
    the grid is the packed row itself.
    """
    kept = tuple(int(n) for n in lengths)
    if any(n <= 0 for n in kept):
        raise BadInput(
            f"lengths = {list(kept)[:8]}: every sequence needs at least one token; leave empty ones out"
        )
    cu_seqlens = torch.tensor([0, *itertools.accumulate(kept)], dtype=torch.int32, device=device)
    return Packing(torch.arange(sum(kept), device=device), cu_seqlens, kept, 1, sum(kept))


def pack_mask(mask: torch.Tensor) -> Packing:
    """Packing of the positions where `mask` (batch, length) is non-zero;
    padding may be anywhere, empty rows are left out.
    """
    if mask.ndim != 2:
        raise BadInput(f"mask.shape = {tuple(mask.shape)}: a (batch, length) mask of 0 and 1 is needed")
    valid = mask != 0
    lengths = valid.sum(1)
    order = torch.argsort(lengths, stable=True)
    host = [n for n in lengths[order].tolist() if n > 0]
    ranked = order[len(order) - len(host) :]
    rows, columns = valid[ranked].nonzero(as_tuple=True)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(host)], dtype=torch.int32).to(mask.device)
    return Packing(ranked[rows] * mask.shape[1] + columns, cu_seqlens, tuple(host), *mask.shape)


@jit
def _gather_rows(x_ptr, map_ptr, y_ptr, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    source = tl.load(map_ptr + row).to(tl.int64)
    present = offsets < tl.where(source >= 0, columns, 0)
    values = tl.load(x_ptr + source * stride + offsets, mask=present, other=0.0)
    tl.store(y_ptr + row * columns + offsets, values, mask=inside)


def gather_rows(x: torch.Tensor, rows: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """y[i] = x[rows[i]], or zeros where rows[i] < 0. x (n, columns), rows (m,) of any integer type."""
    if not use_triton("packing", rows.numel() * x.shape[1], x, backend):
        if rows.numel() and x.shape[0] and not bool((rows < 0).any()):
            return x.index_select(0, rows)
        y = x.new_zeros(rows.numel(), x.shape[1])
        kept = rows >= 0
        y[kept] = x[rows[kept].long()]
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(rows.numel(), x.shape[1])
    if y.numel():
        with on_device(x):
            _gather_rows[(y.shape[0], cdiv(y.shape[1], 1024))](
                x, rows, y, y.shape[1], x.stride(0), BLOCK=1024, num_warps=4
            )
    return y


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, back: torch.Tensor, backend: str
    ) -> torch.Tensor:
        ctx.back, ctx.backend = back, backend
        return gather_rows(x, rows, backend)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gather_rows(grads[0].contiguous(), ctx.back, ctx.backend), None, None, None


def pack(x: torch.Tensor, packing: Packing, backend: str = "auto") -> torch.Tensor:
    """(batch, length, ...) -> (tokens, ...), differentiable."""
    if x.shape[:2] != (packing.batch, packing.length):
        raise BadInput(
            f"x.shape = {tuple(x.shape)}: this packing is of a ({packing.batch}, {packing.length}, ...) batch"
        )
    if not packing.tokens:
        return x.new_zeros(0, *x.shape[2:])
    flat = x.reshape(packing.batch * packing.length, -1)
    return _Gather.apply(flat, packing.indices, packing.inverse, backend).view(packing.tokens, *x.shape[2:])


def unpack(x: torch.Tensor, packing: Packing, backend: str = "auto") -> torch.Tensor:
    """(tokens, ...) -> (batch, length, ...) with zeros at the padding, differentiable."""
    if x.shape[0] != packing.tokens:
        raise BadInput(f"x.shape = {tuple(x.shape)}: this packing has {packing.tokens} tokens")
    if not packing.tokens:
        return x.new_zeros(packing.batch, packing.length, *x.shape[1:])
    y = _Gather.apply(x.reshape(packing.tokens, -1), packing.inverse, packing.indices, backend)
    return y.view(packing.batch, packing.length, *x.shape[1:])


def bin_pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: best fit, longest first
    (at most 11/9 of the fewest rows, Johnson 1973).

    Returns the indices of the sequences in each row. Raises `BadInput` for a sequence longer than a row.

    >>> bin_pack([6, 4, 5, 3, 2], capacity=10)
    [[0, 1], [2, 3, 4]]
    """
    if lengths and max(lengths) > capacity:
        raise BadInput(
            f"capacity = {capacity}: the longest sequence has {max(lengths)} tokens; raise it or truncate"
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (free - lengths[index], row))
    return rows


def balance(lengths: Sequence[int], ranks: int, cost: Callable[[int], float] = float) -> list[list[int]]:
    """Sequences to `ranks` workers of about equal total cost:
    heaviest first to the least loaded (Graham 1969, <= 4/3 of the best).

    `cost(n)` may be anything increasing, e.g. `lambda n: n + n * n / 4096` for linears plus attention.

    >>> balance([8, 7, 3, 2], ranks=2)
    [[0, 3], [1, 2]]
    """
    if ranks < 1:
        raise BadInput(f"ranks = {ranks}: at least one worker is needed")
    loads: list[tuple[float, int]] = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: -cost(lengths[i])):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + cost(lengths[index]), rank))
    return shares


KERNELS = (
    Kernel(
        "packing.gather",
        _gather_rows,
        (
            Configuration("bf16", {"x_ptr": "*bf16", "map_ptr": "*i32", "y_ptr": "*bf16"}, {"BLOCK": 1024}),
            Configuration(
                "fp32-int64", {"x_ptr": "*fp32", "map_ptr": "*i64", "y_ptr": "*fp32"}, {"BLOCK": 1024}
            ),
        ),
    ),
)


def cases() -> list[Case]:
    """Packing a half-padded batch of 64 x 512 tokens."""
    tokens, width = 16384, 4096

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(2 * tokens, width, device=device, dtype=torch.bfloat16)
        rows = torch.randperm(2 * tokens, device=device)[:tokens].sort().values
        return lambda: gather_rows(x, rows, "triton"), lambda: x.index_select(0, rows)

    return [
        Case(
            "packing",
            f"{tokens} of {2 * tokens} x {width} bf16",
            tokens * width,
            4.0 * tokens * width,
            0,
            make,
        )
    ]
