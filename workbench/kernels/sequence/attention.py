"""Attention over packed sequences of different lengths: no padding is stored, computed or masked.

    o_i = sum_j p_ij v_j,   p_ij = softmax_j(scale q_i k_j - slope |i - j|),
        j in the sequence of i, -right <= i - j <= left

One mechanism covers the encoder (left = right = None: unlimited), the decoder (right = 0) and sliding
windows; ALiBi slopes per head (Press et al., 2022; symmetric |i - j| for encoders), grouped key heads,
and rotary positions are options. Forward and backward follow Dao (2023, FlashAttention-2, algorithms 1
and 2): the log-sum-exp of each row is kept, the backward recomputes p. Work is cut into tiles of real tokens
before launch (longest sequences first), so that no block is started for padding, as in ByteTransformer
(Zhai et al., 2023).

>>> from workbench.kernels.sequence.packing import pack_lengths
>>> packing = pack_lengths([3, 5])
>>> q, k, v = torch.randn(3, 8, 2, 16).unbind(0)
>>> varlen_attention(q, k, v, packing, right=0).shape
torch.Size([8, 2, 16])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from workbench.errors import BadInput
from workbench.kernels.backend import on_device, power_of_two, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.sequence.attention_reference import UNLIMITED, attention_torch
from workbench.kernels.sequence.attention_tiles import (
    backward_keys_tile,
    backward_queries_tile,
    forward_tile,
    tile_sizes,
)
from workbench.kernels.sequence.packing import Packing, pack_lengths
from workbench.kernels.sequence.rotary import rotary


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor | None,
        packing: Packing,
        left: int,
        right: int,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        tokens, heads, dim = q.shape
        tile, warps = tile_sizes(dim, 8 * q.element_size(), "forward")
        sizes = {"GROUP": heads // k.shape[1], "DIM": dim, "ALIBI": slopes is not None}
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads)
        tiles = packing.tiles(tile["ROWS"])
        if len(tiles):
            with on_device(q):
                forward_tile[(len(tiles), heads)](
                    q,
                    k,
                    v,
                    out,
                    lse,
                    packing.cu_seqlens,
                    tiles,
                    lse if slopes is None else slopes,
                    scale,
                    left,
                    right,
                    tokens,
                    *strides,
                    **sizes,
                    **tile,
                    num_warps=warps,
                    num_stages=3,
                )
        ctx.save_for_backward(q, k, v, out, lse, slopes)
        ctx.packing, ctx.options, ctx.strides, ctx.sizes = packing, (scale, left, right), strides, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, slopes = ctx.saved_tensors
        do = grads[0].contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = (do.float() * out.float()).sum(-1).t().contiguous()  # (heads, tokens)
        bits, dim = 8 * q.element_size(), q.shape[-1]
        for kernel, step, grid_heads, outputs in (
            ("keys", "COLUMNS", k.shape[1], (dk, dv)),
            ("queries", "ROWS", q.shape[1], (dq,)),
        ):
            tile, warps = tile_sizes(dim, bits, kernel)
            tiles = ctx.packing.tiles(tile[step])
            if len(tiles):
                launch = (backward_keys_tile if kernel == "keys" else backward_queries_tile)[
                    (len(tiles), grid_heads)
                ]
                with on_device(q):
                    launch(
                        q,
                        k,
                        v,
                        do,
                        *outputs,
                        lse,
                        delta,
                        ctx.packing.cu_seqlens,
                        tiles,
                        lse if slopes is None else slopes,
                        *ctx.options,
                        q.shape[0],
                        *ctx.strides,
                        **ctx.sizes,
                        **tile,
                        num_warps=warps,
                        num_stages=2,
                    )
        return dq, dk, dv, None, None, None, None, None


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    left: int | None = None,
    right: int | None = None,
    slopes: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of each packed sequence to itself, differentiable in q, k and v.

    q (tokens, heads, dim); k, v (tokens, key heads, dim), heads a multiple of key heads; `left`, `right` how
    many tokens before and after its own a query sees (None: all; right=0: causal); `slopes` (heads,) ALiBi;
    `rotation` (cos, sin) tables of (length, dim / 2) applied to q and k at each token's position in its
    sequence; `scale` defaults to dim^-0.5; `dropout` on the probabilities exists in the PyTorch path only.
    Returns (tokens, heads, dim).
    """
    if (
        q.ndim != 3
        or k.shape != v.shape
        or k.ndim != 3
        or q.shape[-1] != k.shape[-1]
        or q.shape[0] != k.shape[0]
    ):
        raise BadInput(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "need (tokens, heads, dim), k and v alike"
        )
    if q.shape[1] % k.shape[1]:
        raise BadInput(
            f"{q.shape[1]} query heads, {k.shape[1]} key heads: the first must be a multiple of the second"
        )
    if q.shape[0] != packing.tokens:
        raise BadInput(f"q.shape[0] = {q.shape[0]}: the packing has {packing.tokens} tokens")
    for name, reach in (("left", left), ("right", right)):
        if reach is not None and reach < 0:
            raise BadInput(f"{name} = {reach}: a number of tokens >= 0, or None for all")
    size = sum(n * n for n in packing.lengths) * q.shape[1] * q.shape[2]
    fused = use_triton("attention", size, q, backend)
    if fused and dropout:
        if backend == "triton":
            raise BadInput(
                f"dropout = {dropout}: the Triton path has no dropout on probabilities; "
                "use backend='torch' or 0"
            )
        fused = False
    if rotation is not None:
        starts = packing.cu_seqlens[:-1].repeat_interleave(
            packing.cu_seqlens.diff(), output_size=packing.tokens
        )
        positions = torch.arange(packing.tokens, device=q.device) - starts
        q, k = (rotary(x, *rotation, positions, backend="triton" if fused else "torch") for x in (q, k))
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    if not fused:
        return attention_torch(q, k, v, packing, left, right, slopes, scale, dropout)
    reaches = (UNLIMITED if left is None else left, UNLIMITED if right is None else right)
    if (padded := power_of_two(dim, least=16)) != dim:
        q, k, v = (F.pad(x, (0, padded - dim)) for x in (q, k, v))
    return _Attention.apply(
        q, k, v, None if slopes is None else slopes.float().contiguous(), packing, *reaches, scale
    )[..., :dim]


def _configurations(pointers: str, kernel: str) -> tuple[Configuration, ...]:
    found = []
    for kind, dim, alibi in (
        ("bf16", 64, False),
        ("bf16", 128, False),
        ("bf16", 64, True),
        ("fp32", 32, False),
    ):
        types = {f"{p}_ptr": f"*{kind}" for p in pointers.split()} | {
            "lse_ptr": "*fp32",
            "cu_ptr": "*i32",
            "tiles_ptr": "*i32",
            "slopes_ptr": "*fp32",
            "scale": "fp32",
        }
        if kernel != "forward":
            types["delta_ptr"] = "*fp32"
        tile, warps = tile_sizes(dim, 32 if kind == "fp32" else 16, kernel)
        sizes = tile | {"GROUP": 1, "DIM": dim, "ALIBI": alibi}
        name = f"{kind}-d{dim}{'-alibi' if alibi else ''}"
        found.append(Configuration(name, types, sizes, warps=warps, stages=3 if kernel == "forward" else 2))
    return tuple(found)


KERNELS = (
    Kernel("attention.forward", forward_tile, _configurations("q k v o", "forward")),
    Kernel("attention.backward_keys", backward_keys_tile, _configurations("q k v do dk dv", "keys")),
    Kernel("attention.backward_queries", backward_queries_tile, _configurations("q k v do dq", "queries")),
)


def cases() -> list[Case]:
    """64 sequences of 128 to 1024 tokens, half of the padded grid empty,
    against padded attention with a mask.
    """
    found = []
    for heads, dim in ((12, 64), (32, 128)):
        lengths = [64 + (i * 1920) // 63 % 961 for i in range(64)]
        lengths[-1] = 1024
        tokens, size = sum(lengths), sum(n * n for n in lengths) * heads * dim

        def make(
            device: torch.device, heads: int = heads, dim: int = dim, lengths: list[int] = lengths
        ) -> Any:
            packing = pack_lengths(lengths, device)
            q, k, v = torch.randn(3, packing.tokens, heads, dim, device=device, dtype=torch.bfloat16).unbind(
                0
            )
            longest = max(lengths)
            qp, kp, vp = torch.randn(
                3, len(lengths), heads, longest, dim, device=device, dtype=torch.bfloat16
            ).unbind(0)
            mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

            def usual() -> torch.Tensor:
                return F.scaled_dot_product_attention(qp, kp, vp, attn_mask=mask[:, None, None])

            return lambda: varlen_attention(q, k, v, packing, backend="triton"), usual

        shape = f"64 sequences, {tokens} tokens, {heads} x {dim} bf16"
        found.append(
            Case(
                "attention", shape, size, 8.0 * tokens * heads * dim, 4.0 * size, make, "bf16", "padded SDPA"
            )
        )
    return found
