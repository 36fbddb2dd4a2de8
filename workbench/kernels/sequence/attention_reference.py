"""Attention of packed sequences in PyTorch: the definition, and torch's fused one by runs of a length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from workbench.kernels.sequence.packing import Packing

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


def attention_torch(
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
