"""Attention over packed sequences of different lengths: no padding is stored, computed or masked.

    o_i = sum_j p_ij v_j,   p_ij = softmax_j(scale q_i k_j - slope |i - j|),
        j in the sequence of i, -right <= i - j <= left

One mechanism covers the encoder (left = right = None: unlimited), the decoder (right = 0) and sliding
windows; ALiBi slopes per head (Press et al., 2022; symmetric |i - j| for encoders), grouped key heads,
and rotary positions are options. Forward and backward follow Dao (2023, FlashAttention-2, algorithms 1
and 2): the log-sum-exp of each row is kept, the backward recomputes p. Work is cut into tiles of real tokens
before launch (longest sequences first), so that no block is started for padding, as in ByteTransformer
(Zhai et al., 2023).

>>> from workbench.kernels.packing import pack_lengths
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
from workbench.kernels.backend import jit, mma, narrow, on_device, power_of_two, tl, use_triton
from workbench.kernels.packing import Packing, pack_lengths
from workbench.kernels.registry import Case, Configuration, Kernel
from workbench.kernels.rotary import rotary

UNLIMITED = 2**30


def attention_bias(
    length: int, left: int | None, right: int | None, slopes: torch.Tensor | None, device: Any = None
) -> torch.Tensor | None:
    """The additive bias of one sequence, (1 or heads, length, length) fp32,
    or None when everything is visible.
    """
    if left is None and right is None and slopes is None:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    visible = (distance <= (UNLIMITED if left is None else left)) & (
        -distance <= (UNLIMITED if right is None else right)
    )
    bias = (
        torch.zeros(1, length, length, device=device)
        if slopes is None
        else -slopes.float()[:, None, None] * distance.abs()
    )
    return bias.masked_fill(~visible, float("-inf"))


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    left: int | None = None,
    right: int | None = None,
    slopes: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition, sequence by sequence in fp32 (fp64 if the inputs are):
    what both fast paths are checked against.
    """
    outputs = []
    for start, end in zip(packing.cu_seqlens.tolist()[:-1], packing.cu_seqlens.tolist()[1:], strict=True):
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        qs, ks, vs = (x[start:end].to(kind).transpose(0, 1) for x in (q, k, v))  # (heads, length, dim)
        ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (ks, vs))
        scores = qs @ ks.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        bias = attention_bias(end - start, left, right, slopes, q.device)
        outputs.append(
            (scores if bias is None else scores + bias).softmax(-1).matmul(vs).transpose(0, 1).to(q.dtype)
        )
    return torch.cat(outputs) if outputs else q[:, :, : v.shape[-1]]


def _attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    left: int | None,
    right: int | None,
    slopes: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """PyTorch's fused attention, once per run of sequences of one length:
    `pack_mask` makes those runs long.
    """
    outputs = []
    for start, count, length in packing.groups:
        qs, ks, vs = (
            x[start : start + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)
            for x in (q, k, v)
        )
        causal = right == 0 and left is None and slopes is None
        bias = None if causal else attention_bias(length, left, right, slopes, q.device)
        out = F.scaled_dot_product_attention(
            qs,
            ks,
            vs,
            attn_mask=None if bias is None else bias.to(q.dtype),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(count * length, q.shape[1], v.shape[-1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else q[:, :, : v.shape[-1]]


@jit
def _scores(q, k, rows, columns, length, left, right, slope, scale, ALIBI: tl.constexpr):
    """Masked scores of one tile in base 2 (scale and slope carry log2 e), -inf where not visible."""
    s = mma(q, k, tl.zeros([q.shape[0], k.shape[1]], tl.float32)) * scale
    distance = rows[:, None] - columns[None, :]
    if ALIBI:
        s -= slope * tl.abs(distance).to(tl.float32)
    visible = (
        (distance <= left) & (distance >= -right) & (columns < length)[None, :] & (rows < length)[:, None]
    )
    return tl.where(visible, s, float("-inf"))


@jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_ptr,
    tiles_ptr,
    slopes_ptr,
    scale,
    left,
    right,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIBI: tl.constexpr,
):
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = tl.load(cu_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * 1.4426950408889634
    q = tl.load(
        q_ptr + (start + rows)[:, None] * q_token + head * q_head + dims[None, :],
        mask=(rows < length)[:, None],
        other=0.0,
    )
    k_base = k_ptr + start * k_token + (head // GROUP) * k_head
    v_base = v_ptr + start * v_token + (head // GROUP) * v_head
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    low = tl.maximum(first - left, 0) // COLUMNS * COLUMNS
    high = tl.minimum(length, first + ROWS + right)
    for block in range(low, high, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        k = tl.load(
            k_base + columns[None, :] * k_token + dims[:, None], mask=(columns < length)[None, :], other=0.0
        )
        s = _scores(q, k, rows, columns, length, left, right, slope, scale * 1.4426950408889634, ALIBI)
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(
            new_top == float("-inf"), 0.0, new_top
        )  # a row that has seen nothing yet must not make inf - inf
        p = tl.exp2(s - safe[:, None])
        decay = tl.exp2(top - safe)
        v = tl.load(
            v_base + columns[:, None] * v_token + dims[None, :], mask=(columns < length)[:, None], other=0.0
        )
        acc = mma(narrow(p, v.dtype), v, acc * decay[:, None])
        total = total * decay + tl.sum(p, 1)
        top = new_top
    total = tl.where(rows < length, total, 1.0)
    lse = top + tl.log2(total)
    out = acc / total[:, None]
    tl.store(
        o_ptr + ((start + rows)[:, None] * heads + head) * DIM + dims[None, :],
        narrow(out, o_ptr.dtype.element_ty),
        mask=(rows < length)[:, None],
    )
    tl.store(lse_ptr + head.to(tl.int64) * tokens + start + rows, lse, mask=rows < length)


@jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    tiles_ptr,
    slopes_ptr,
    scale,
    left,
    right,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """dk and dv of one tile of keys: all queries that see it, all query heads that share it,
    in a fixed order.
    """
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    key_head = tl.program_id(1)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = tl.load(cu_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    columns = first + tl.arange(0, COLUMNS)
    dims = tl.arange(0, DIM)
    inside = (columns < length)[:, None]
    k = tl.load(
        k_ptr + (start + columns)[:, None] * k_token + key_head * k_head + dims[None, :],
        mask=inside,
        other=0.0,
    )
    v = tl.load(
        v_ptr + (start + columns)[:, None] * v_token + key_head * v_head + dims[None, :],
        mask=inside,
        other=0.0,
    )
    dk = tl.zeros([COLUMNS, DIM], tl.float32)
    dv = tl.zeros([COLUMNS, DIM], tl.float32)
    low = tl.maximum(first - right, 0) // ROWS * ROWS
    high = tl.minimum(length, first + COLUMNS + left)
    for member in range(GROUP):
        head = key_head * GROUP + member
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head) * 1.4426950408889634
        for block in range(low, high, ROWS):
            rows = block + tl.arange(0, ROWS)
            seen = rows < length
            q = tl.load(
                q_ptr + (start + rows)[:, None] * q_token + head * q_head + dims[None, :],
                mask=seen[:, None],
                other=0.0,
            )
            do = tl.load(
                do_ptr + ((start + rows)[:, None] * heads + head) * DIM + dims[None, :],
                mask=seen[:, None],
                other=0.0,
            )
            lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + start + rows, mask=seen, other=0.0)
            delta = tl.load(delta_ptr + head.to(tl.int64) * tokens + start + rows, mask=seen, other=0.0)
            s = _scores(
                q, tl.trans(k), rows, columns, length, left, right, slope, scale * 1.4426950408889634, ALIBI
            )
            p = tl.exp2(s - lse[:, None])
            dv = mma(tl.trans(narrow(p, do.dtype)), do, dv)
            dp = mma(do, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32))
            ds = p * (dp - delta[:, None])
            dk = mma(tl.trans(narrow(ds, q.dtype)), q, dk)
    key_heads = heads // GROUP
    target = ((start + columns)[:, None] * key_heads + key_head) * DIM + dims[None, :]
    tl.store(dk_ptr + target, narrow(dk * scale, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + target, narrow(dv, dv_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    tiles_ptr,
    slopes_ptr,
    scale,
    left,
    right,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """dq of one tile of queries."""
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = tl.load(cu_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    seen = rows < length
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * 1.4426950408889634
    q = tl.load(
        q_ptr + (start + rows)[:, None] * q_token + head * q_head + dims[None, :],
        mask=seen[:, None],
        other=0.0,
    )
    target = ((start + rows)[:, None] * heads + head) * DIM + dims[None, :]
    do = tl.load(do_ptr + target, mask=seen[:, None], other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + start + rows, mask=seen, other=0.0)
    delta = tl.load(delta_ptr + head.to(tl.int64) * tokens + start + rows, mask=seen, other=0.0)
    dq = tl.zeros([ROWS, DIM], tl.float32)
    for block in range(
        tl.maximum(first - left, 0) // COLUMNS * COLUMNS, tl.minimum(length, first + ROWS + right), COLUMNS
    ):
        columns = block + tl.arange(0, COLUMNS)
        inside = (columns < length)[:, None]
        k = tl.load(
            k_ptr + (start + columns)[:, None] * k_token + (head // GROUP) * k_head + dims[None, :],
            mask=inside,
            other=0.0,
        )
        v = tl.load(
            v_ptr + (start + columns)[:, None] * v_token + (head // GROUP) * v_head + dims[None, :],
            mask=inside,
            other=0.0,
        )
        s = _scores(
            q, tl.trans(k), rows, columns, length, left, right, slope, scale * 1.4426950408889634, ALIBI
        )
        p = tl.exp2(s - lse[:, None])
        ds = p * (mma(do, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32)) - delta[:, None])
        dq = mma(narrow(ds, k.dtype), k, dq)
    tl.store(dq_ptr + target, narrow(dq * scale, dq_ptr.dtype.element_ty), mask=seen[:, None])


def _tile_sizes(dim: int, bits: int, kernel: str) -> tuple[dict[str, int], int]:
    """Rows and columns of a tile, and warps: as large as registers allow without spilling
    (fp32 has no tensor cores here).
    """
    if kernel == "forward":
        return (
            ({"ROWS": 32, "COLUMNS": 32}, 4)
            if bits == 32
            else ({"ROWS": 128 if dim <= 64 else 64, "COLUMNS": 64}, 8 if dim <= 64 else 4)
        )
    if bits == 32:
        return {"ROWS": 16 if kernel == "keys" else 32, "COLUMNS": 32}, 8
    return {"ROWS": 32 if kernel == "keys" and dim > 64 else 64, "COLUMNS": 64}, 4 if dim <= 64 else 8


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
        tile, warps = _tile_sizes(dim, 8 * q.element_size(), "forward")
        sizes = {"GROUP": heads // k.shape[1], "DIM": dim, "ALIBI": slopes is not None}
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads)
        tiles = packing.tiles(tile["ROWS"])
        if len(tiles):
            with on_device(q):
                _forward[(len(tiles), heads)](
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
            tile, warps = _tile_sizes(dim, bits, kernel)
            tiles = ctx.packing.tiles(tile[step])
            if len(tiles):
                launch = (_backward_keys if kernel == "keys" else _backward_queries)[(len(tiles), grid_heads)]
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
        return _attention_torch(q, k, v, packing, left, right, slopes, scale, dropout)
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
        tile, warps = _tile_sizes(dim, 32 if kind == "fp32" else 16, kernel)
        sizes = tile | {"GROUP": 1, "DIM": dim, "ALIBI": alibi}
        name = f"{kind}-d{dim}{'-alibi' if alibi else ''}"
        found.append(Configuration(name, types, sizes, warps=warps, stages=3 if kernel == "forward" else 2))
    return tuple(found)


KERNELS = (
    Kernel("attention.forward", _forward, _configurations("q k v o", "forward")),
    Kernel("attention.backward_keys", _backward_keys, _configurations("q k v do dk dv", "keys")),
    Kernel("attention.backward_queries", _backward_queries, _configurations("q k v do dq", "queries")),
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
