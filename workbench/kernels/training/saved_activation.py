"""Activations kept for the backward in 8 or 2 bits: groups of 256 neighbours,
each with its least value and its step.

    q = round((x - low) / step),   step = (high - low) / (2^bits - 1),   x ~ low + step q

2 bits round stochastically, so that the gradients computed from them are unbiased (Chen et al., 2021, ActNN);
8 bits round to nearest. Four 2-bit codes share a byte. Storage is 8.25 or 2.25 bits per value beside 16
or 32. The device functions here are shared by the norms and the activation functions,
which compress what they have in registers.

>>> x = torch.randn(2, 512)
>>> saved = compress(x, bits=8)
>>> bool((saved.decompress() - x).abs().max() <= 0.5 * saved.step.max() + 1e-6), saved.bits_per_value
(True, 8.25)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, round_even, tl
from workbench.kernels.random_bits import uniform, uniform_block

GROUP = 256
BITS = (2, 8)


@dataclass(frozen=True)
class Saved:
    """`codes` uint8, (groups, 256) at 8 bits and (groups, 64) at 2; `low`, `step` (groups,) fp16-sized fp32;
    `shape` of the original.
    """

    codes: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor
    shape: torch.Size
    bits: int

    @property
    def bits_per_value(self) -> float:
        """Codes and the two fp32 numbers of each group."""
        return self.bits + 64 / GROUP

    def decompress(self) -> torch.Tensor:
        """fp32 values in the original shape."""
        codes = self.codes
        if self.bits == 2:
            codes = torch.stack([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
        values = self.low[:, None] + codes.float() * self.step[:, None]
        return values.flatten()[: self.shape.numel()].view(self.shape)


def empty(shape: torch.Size, bits: int, device: torch.device) -> Saved:
    """Room for a tensor of `shape`."""
    groups = cdiv(shape.numel(), GROUP)
    codes = torch.empty(groups, GROUP * bits // 8, dtype=torch.uint8, device=device)
    return Saved(codes, torch.empty(groups, device=device), torch.empty(groups, device=device), shape, bits)


def compress(x: torch.Tensor, bits: int, seed: int = 0) -> Saved:
    """The definition. Groups run through the flattened tensor; the last one may be short.
    NaN and inf spoil their group only.
    """
    if bits not in BITS:
        raise BadInput(f"bits = {bits}: 2 or 8")
    n = x.numel()
    flat = torch.nn.functional.pad(x.float().flatten(), (0, -n % GROUP)).view(-1, GROUP)
    inside = torch.arange(flat.numel(), device=x.device).view(flat.shape) < n
    low = torch.where(inside, flat, float("inf")).amin(1)
    high = torch.where(inside, flat, float("-inf")).amax(1)
    step = (high - low) / (2**bits - 1)
    u = (flat - low[:, None]) / torch.where(step > 0, step, 1.0)[:, None]
    q = (
        torch.round(u)
        if bits == 8
        else torch.floor(u + uniform(seed, flat.numel(), x.device).view(flat.shape))
    )
    codes = torch.where(inside, q.clamp(0, 2**bits - 1).nan_to_num(0), 0).to(torch.uint8)
    if bits == 2:
        quads = codes.view(-1, GROUP // 4, 4)
        codes = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return Saved(codes, low, step, x.shape, bits)


@jit
def save_groups(
    x, at, inside, group, live, codes_ptr, low_ptr, step_ptr, seed, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """Compress an fp32 block (GROUPS, 256) of neighbours at int64 element numbers `at`;
    groups beyond the end are not `live`.
    """
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    low = tl.where(live, low, 0.0)
    high = tl.where(live, high, 0.0)
    step = tl.div_rn(high - low, ((1 << BITS) - 1) + tl.zeros_like(low))
    tl.store(low_ptr + group, low, mask=live)
    tl.store(step_ptr + group, step, mask=live)
    u = tl.div_rn(x - low[:, None], tl.where(step > 0, step, 1.0)[:, None] + tl.zeros_like(x))
    q = round_even(u) if BITS == 8 else tl.floor(u + uniform_block(seed, at))
    q = tl.where(inside & (q == q), tl.minimum(tl.maximum(q, 0.0), ((1 << BITS) - 1) + 0.0), 0.0).to(tl.int32)
    if BITS == 8:
        tl.store(codes_ptr + at, q.to(tl.uint8), mask=live[:, None] & (at >= 0))
    else:
        shifted = tl.reshape(q, [GROUPS, 64, 4]) << (2 * tl.arange(0, 4))[None, None, :]
        byte = tl.sum(shifted, 2)
        place = group[:, None].to(tl.int64) * 64 + tl.arange(0, 64)[None, :]
        tl.store(codes_ptr + place, byte.to(tl.uint8), mask=live[:, None] & (place >= 0))


@jit
def load_groups(at, group, live, codes_ptr, low_ptr, step_ptr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """The fp32 block (GROUPS, 256) that `save_groups` compressed."""
    if BITS == 8:
        codes = tl.load(codes_ptr + at, mask=live[:, None] & (at >= 0), other=0).to(tl.int32)
    else:
        packed = tl.load(codes_ptr + (at >> 2), mask=live[:, None] & (at >= 0), other=0).to(tl.int32)
        codes = (packed >> (2 * (at & 3)).to(tl.int32)) & 3
    low = tl.load(low_ptr + group, mask=live, other=0.0)
    step = tl.load(step_ptr + group, mask=live, other=0.0)
    return low[:, None] + codes.to(tl.float32) * step[:, None]
