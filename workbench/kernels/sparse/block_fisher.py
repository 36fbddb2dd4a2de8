"""Empirical Fisher in diagonal blocks, and its inverse directly, from a matrix of gradients
(oBERT, Kurtic et al., 2022).

    F_b = lambda I + (1/m) sum_k g_kb g_kb^T
    F_b^-1:  start at I / lambda; for each k:  u = F^-1 g_k,  F^-1 <- F^-1 - u u^T / (m + g_k^T u)
        (Woodbury, rank one)

Gradients are (m, n); the n weights are cut into blocks of B neighbours (B <= 128; oBERT uses 50).
`accumulate` is one product per block; `inverse` keeps a block's inverse in registers while it walks the m
gradients once, so the Fisher matrix itself is never formed.
Both can be continued with further gradients of the same pass.

>>> g = torch.randn(20, 12, dtype=torch.float64)
>>> inverse = block_fisher_inverse(g, block=4, damping=0.1)
>>> fisher = block_fisher(g, block=4) + 0.1 * torch.eye(4)
>>> bool(torch.allclose(inverse @ fisher, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), atol=1e-8))
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import jit, mma, on_device, power_of_two, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel


def _blocks(gradients: torch.Tensor, block: int) -> torch.Tensor:
    """(m, blocks, B), the last block padded with zeros."""
    if gradients.ndim != 2 or block < 1:
        raise BadInput(
            f"gradients {tuple(gradients.shape)}, block = {block}: need (samples, weights) and a block"
        )
    padded = torch.nn.functional.pad(gradients, (0, -gradients.shape[1] % block))
    return padded.reshape(gradients.shape[0], padded.shape[1] // block, block)


@jit
def _accumulate(
    g_ptr, f_ptr, samples, stride, width, weight, B: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    columns = number * B + i
    inside = (i < B) & (columns < width)
    acc = tl.zeros([PAD, PAD], tl.float32)
    for first in range(0, samples, ROWS):
        row = first + tl.arange(0, ROWS)
        g = tl.load(
            g_ptr + row[:, None].to(tl.int64) * stride + columns[None, :],
            mask=(row < samples)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = mma(tl.trans(g), g, acc)
    out = f_ptr + number * (B * B) + i[:, None] * B + i[None, :]
    here = (i < B)[:, None] & (i < B)[None, :]
    tl.store(out, tl.load(out, mask=here, other=0.0) + acc * weight, mask=here)


@jit
def _inverse(g_ptr, f_ptr, samples, stride, width, total, B: tl.constexpr, PAD: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    columns = number * B + i
    inside = (i < B) & (columns < width)
    here = (i < B)[:, None] & (i < B)[None, :]
    at = f_ptr + number * (B * B) + i[:, None] * B + i[None, :]
    f = tl.load(at, mask=here, other=0.0)
    for k in range(0, samples):
        row = (tl.zeros([], tl.int64) + k) * stride
        g = tl.load(g_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.sum(f * g[None, :], 1)
        v = tl.sum(f * g[:, None], 0)  # equal to u, laid out along the other side: f is symmetric
        f -= u[:, None] * v[None, :] / (total + tl.sum(g * v, 0))
    tl.store(at, f, mask=here)


def _warps(block: int) -> int:
    return 4 if block <= 64 else 8


#: The widest block that a kernel keeps in registers.
WIDEST = 128


def _fused(gradients: torch.Tensor, block: int, backend: str) -> bool:
    if backend == "triton" and block > WIDEST:
        raise BadInput(f"block = {block} with backend = 'triton': need a block of 1 to {WIDEST}")
    fits = block <= WIDEST and gradients.dtype != torch.float64 and len(gradients)
    return bool(fits) and use_triton("block_fisher", gradients.numel(), gradients, backend)


def fisher_reference(parts: torch.Tensor, total: int, damping: float = 0.0) -> torch.Tensor:
    """damping I + G^T G / total for every block of parts (blocks, m, B), (blocks, B, B)."""
    fisher = torch.bmm(parts.mT, parts).div_(total)
    if damping:
        fisher.diagonal(dim1=-2, dim2=-1).add_(damping)
    return fisher


def inverse_reference(parts: torch.Tensor, total: int, damping: float) -> torch.Tensor:
    """The inverse of the same.

    With m >= B the matrix is formed and factorised; with m < B the Woodbury identity needs only an m x m
    system: (I - G^T (total damping I + G G^T)^-1 G) / damping.
    """
    if parts.shape[1] >= parts.shape[2]:
        return torch.cholesky_inverse(torch.linalg.cholesky(fisher_reference(parts, total, damping)))
    small = torch.bmm(parts, parts.mT)
    small.diagonal(dim1=-2, dim2=-1).add_(total * damping)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(small), parts, upper=False)
    inverse = torch.bmm(half.mT, half).neg_()
    inverse.diagonal(dim1=-2, dim2=-1).add_(1)
    return inverse.div_(damping)


def block_fisher(
    gradients: torch.Tensor,
    block: int,
    out: torch.Tensor | None = None,
    total: int | None = None,
    backend: str = "auto",
    damping: float = 0.0,
) -> torch.Tensor:
    """damping I + (1 / total) sum_k g_k g_k^T per block, (blocks, B, B) fp32 (fp64 if the gradients are),
    added to `out` when given.

    gradients (m, n), any float type; `total` defaults to m: give the full count when gradients come in
    several parts, and the damping with one of them.
    """
    parts = _blocks(gradients, block)
    m, count, _ = parts.shape
    kind = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    if out is not None and (out.shape != (count, block, block) or not out.is_contiguous()):
        raise BadInput(f"out.shape = {tuple(out.shape)}: a contiguous {(count, block, block)} is needed")
    if not _fused(gradients, block, backend):
        by_block = parts.to(kind).transpose(0, 1).contiguous()
        found = fisher_reference(by_block, max(1, total or m), damping)
        return found if out is None else out.add_(found)
    out = torch.zeros(count, block, block, dtype=kind, device=gradients.device) if out is None else out
    if damping:
        out.diagonal(dim1=-2, dim2=-1).add_(damping)
    g = gradients if gradients.stride(1) == 1 else gradients.contiguous()
    with on_device(g):
        _accumulate[(count,)](
            g,
            out,
            m,
            g.stride(0),
            g.shape[1],
            1.0 / (total or m),
            B=block,
            PAD=power_of_two(block, 16),
            ROWS=32,
            num_warps=_warps(block),
            num_stages=2,
        )
    return out


def block_fisher_inverse(
    gradients: torch.Tensor,
    block: int,
    damping: float,
    out: torch.Tensor | None = None,
    total: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Inverse of damping I + (1 / total) sum_k g_k g_k^T per block, (blocks, B, B): by rank-one updates in
    the kernel and where `out` is given, else by one factorisation.

    Pass the result as `out` to continue with more gradients (`damping` has then done its work), and `total`,
    the number of all gradients, each time. Padding of a short last block stays I / damping.
    """
    parts = _blocks(gradients, block)
    m, count, _ = parts.shape
    if not damping > 0:
        raise BadInput(f"damping = {damping}: must be above 0, or the empty Fisher matrix has no inverse")
    kind = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    fused, scale = _fused(gradients, block, backend), float(total or m)
    if out is None and m and not fused:
        return inverse_reference(parts.to(kind).transpose(0, 1).contiguous(), total or m, damping)
    if out is None:
        out = (torch.eye(block, dtype=kind, device=gradients.device) / damping).repeat(count, 1, 1)
    if out.shape != (count, block, block) or not out.is_contiguous():
        raise BadInput(f"out.shape = {tuple(out.shape)}: a contiguous {(count, block, block)} is needed")
    if fused:
        g = gradients if gradients.stride(1) == 1 else gradients.contiguous()
        with on_device(g):
            _inverse[(count,)](
                g,
                out,
                m,
                g.stride(0),
                g.shape[1],
                scale,
                B=block,
                PAD=power_of_two(block, 16),
                num_warps=_warps(block),
            )
        return out
    for g in parts.to(kind):  # (blocks, B)
        u = torch.einsum("bij,bj->bi", out, g)
        out.baddbmm_((u / -(scale + (g * u).sum(1, keepdim=True)))[:, :, None], u[:, None, :])
    return out


KERNELS = (
    Kernel(
        "block_fisher.accumulate",
        _accumulate,
        tuple(
            Configuration(
                f"{kind}-{b}",
                {"g_ptr": f"*{kind}", "f_ptr": "*fp32", "weight": "fp32"},
                {"B": b, "PAD": power_of_two(b, 16), "ROWS": 32},
                warps=_warps(b),
                stages=2,
            )
            for kind, b in (("bf16", 50), ("fp32", 50), ("bf16", 128))
        ),
    ),
    Kernel(
        "block_fisher.inverse",
        _inverse,
        tuple(
            Configuration(
                f"{kind}-{b}",
                {"g_ptr": f"*{kind}", "f_ptr": "*fp32", "total": "fp32"},
                {"B": b, "PAD": power_of_two(b, 16)},
                warps=_warps(b),
            )
            for kind, b in (("bf16", 50), ("fp32", 50), ("bf16", 128))
        ),
    ),
)


def cases() -> list[Case]:
    """85 M weights (a BERT-base encoder) in blocks of 50, 32 gradients at a time."""
    m, n, b = 32, 85_000_000, 50

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        g = torch.randn(m, n, device=device, dtype=torch.bfloat16)
        mine, other = ((torch.eye(b, device=device) * 1e7).repeat(n // b, 1, 1) for _ in "ab")
        return (
            lambda: block_fisher_inverse(g, b, 1e-7, mine, 1024, "triton"),
            lambda: block_fisher_inverse(g, b, 1e-7, other, 1024, "torch"),
        )

    return [
        Case(
            "block_fisher",
            f"{m} x {n} bf16, block {b}",
            m * n,
            2.0 * m * n + 8.0 * n * b,
            6.0 * m * n * b,
            make,
        )
    ]
