"""Attention's Triton kernels, a tile of tokens each: forward, gradients of keys and values, of queries."""

from __future__ import annotations

from workbench.kernels.backend import jit, mma, narrow, tl


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
def forward_tile(
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
def backward_keys_tile(
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
def backward_queries_tile(
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


def tile_sizes(dim: int, bits: int, kernel: str) -> tuple[dict[str, int], int]:
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
