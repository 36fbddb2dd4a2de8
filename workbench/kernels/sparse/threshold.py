"""The exact k-th largest saliency over any number of weights, without sorting and without a copy.

The bits of a non-negative fp32 number, read as an integer, are ordered like the number. Three histograms
of 11, 11 and 10 bits, each over the values that share the digits found so far, pin all 32 bits down: a radix
select. Tensors are read three times and nothing of their size is written;
counts are int64, so 10^9 weights and several tensors are fine.

>>> w = [torch.tensor([0.1, -3.0, 2.0]), torch.tensor([[0.5, -2.5]])]
>>> kth_largest(w, 2)
2.5
>>> mask = keep_largest(w, 2)
>>> mask[0], mask[1]
(tensor([False,  True, False]), tensor([[False,  True]]))
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import cdiv, jit, on_device, tl, use_triton
from workbench.kernels.registry import Case, Configuration, Kernel

#: (shift, bits) of each digit, most significant first.
DIGITS = ((21, 11), (10, 11), (0, 10))


@jit
def _histogram(
    x_ptr,
    counts_ptr,
    n,
    prefix,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Counts of one digit of |x|, or of x where it is SIGNED, among the values whose higher digits equal
    `prefix`; NaN counts as the largest.
    """
    counts = tl.zeros([1 << BITS], tl.int32)
    for step in range(STEPS):
        at = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if not SIGNED:
            x = tl.abs(x)
        bits = x.to(tl.int32, bitcast=True)
        if SIGNED:
            bits ^= (bits >> 31) & 0x7FFFFFFF  # ordered like the numbers, as a signed integer
        digit = (bits >> SHIFT) & ((1 << BITS) - 1)
        if FIRST:
            if SIGNED:
                digit ^= 1 << (BITS - 1)  # as an unsigned one
        else:
            higher = (bits >> (SHIFT + BITS)) & ((1 << (32 - SHIFT - BITS)) - 1)
            if SIGNED:
                higher ^= 1 << (31 - SHIFT - BITS)
            inside = inside & (higher == prefix)
        counts += tl.histogram(digit, 1 << BITS, mask=inside)
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0)


def histogram(
    x: torch.Tensor,
    digit: int,
    prefix: int,
    counts: torch.Tensor,
    backend: str = "auto",
    signed: bool = False,
) -> None:
    """Add one tensor's counts of digit number `digit` (0 to 2) to `counts` (2^bits,) int64."""
    shift, bits = DIGITS[digit]
    if not x.numel():
        return
    if use_triton("threshold", x.numel(), x, backend):
        flat = x.contiguous()
        with on_device(x):
            _histogram[(cdiv(x.numel(), 8 * 2048),)](
                flat,
                counts,
                x.numel(),
                prefix,
                SHIFT=shift,
                BITS=bits,
                FIRST=digit == 0,
                SIGNED=signed,
                BLOCK=2048,
                STEPS=8,
                num_warps=8,
            )
        return
    values = (x if signed else x.abs()).float().flatten().view(torch.int32)
    if signed:
        values = (values ^ ((values >> 31) & 0x7FFFFFFF)).long() + 2**31
    if digit:
        values = values[(values >> (shift + bits)) == prefix]
    counts += torch.bincount((values >> shift) & (2**bits - 1), minlength=2**bits)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _select(tensors: Sequence[torch.Tensor], k: int, backend: str, signed: bool) -> int:
    """The bits, as counted by `histogram`, of the k-th largest value."""
    total = sum(t.numel() for t in tensors)
    if not 1 <= k <= total:
        raise BadInput(f"k = {k}: there are {total} values")
    if any(t.dtype not in TYPES for t in tensors):
        raise BadInput(f"dtypes {[str(t.dtype) for t in tensors][:4]}: fp32, bf16 or fp16 values are needed")
    device, prefix, wanted = tensors[0].device, 0, k
    for number, (_, bits) in enumerate(DIGITS):
        counts = torch.zeros(2**bits, dtype=torch.int64, device=device)
        for tensor in tensors:
            histogram(tensor.detach(), number, prefix, counts, backend, signed)
        above = (
            counts.cpu().flip(0).cumsum(0)
        )  # how many have this digit or a larger one, largest digit first
        place = int(torch.searchsorted(above, wanted))
        wanted -= int(above[place - 1]) if place else 0
        prefix = prefix << bits | (2**bits - 1 - place)
    return prefix


def kth_largest(tensors: Sequence[torch.Tensor], k: int, backend: str = "auto") -> float:
    """The k-th largest magnitude (k from 1) over all tensors together, exactly; fp32, bf16 or fp16.
    NaN counts as infinite.

    Three synchronisations with the device, of 16 kB each.
    """
    value: float = struct.unpack("f", struct.pack("I", _select(tensors, k, backend, False)))[0]
    return value


def kth_smallest(scores: torch.Tensor, k: int, backend: str = "auto") -> torch.Tensor:
    """The k-th smallest score (k from 1) of the last dimension, sign included, (..., 1).

    A single row of fp32, bf16 or fp16 is what the kernel is for; rows of several, and everything without
    a GPU, are `torch.kthvalue`'s.

    >>> kth_smallest(torch.tensor([0.5, -2.0, 1.0]), 2)
    tensor([0.5000])
    """
    n = scores.numel()
    one = n == scores.shape[-1] and scores.dtype in TYPES
    if not one or not use_triton("threshold", n, scores, backend):
        return scores.kthvalue(k, dim=-1, keepdim=True).values
    bits = _select([scores], n + 1 - k, backend, True)
    bits = bits ^ 0x80000000 if bits >> 31 else ~bits & 0xFFFFFFFF
    value: float = struct.unpack("f", struct.pack("I", bits))[0]
    return scores.new_full((*scores.shape[:-1], 1), value)


def keep_largest(tensors: Sequence[torch.Tensor], k: int, backend: str = "auto") -> list[torch.Tensor]:
    """Bool masks that keep exactly the k largest magnitudes over all tensors;
    of equal ones those that come first.
    """
    if k == 0:
        return [torch.zeros_like(t, dtype=torch.bool) for t in tensors]
    threshold = kth_largest(tensors, k, backend)
    masks = [t.detach().abs().float() > threshold for t in tensors]
    missing = k - sum(int(m.sum()) for m in masks)
    for tensor, mask in zip(tensors, masks, strict=True):
        equal = (tensor.detach().abs().float() == threshold).flatten().nonzero()[:missing, 0]
        mask.view(-1)[equal] = True
        missing -= len(equal)
    return masks


KERNELS = (
    Kernel(
        "threshold.histogram",
        _histogram,
        tuple(
            Configuration(
                f"{kind}-digit{digit}{'-signed' if signed else ''}",
                {"x_ptr": f"*{kind}", "counts_ptr": "*i64"},
                {
                    "SHIFT": DIGITS[digit][0],
                    "BITS": DIGITS[digit][1],
                    "FIRST": digit == 0,
                    "SIGNED": signed,
                    "BLOCK": 2048,
                    "STEPS": 8,
                },
                warps=8,
            )
            for kind, digit, signed in (
                ("fp32", 0, False),
                ("bf16", 0, False),
                ("fp32", 2, False),
                ("fp32", 0, True),
                ("fp32", 2, True),
            )
        ),
    ),
)


def cases() -> list[Case]:
    """The median magnitude of 10^9 bf16 weights, against `torch.kthvalue`."""
    n = 10**9

    def make(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
        w = torch.randn(n, device=device, dtype=torch.bfloat16)
        return lambda: kth_largest([w], n // 2, "triton"), lambda: torch.kthvalue(w.abs(), n // 2)

    return [Case("threshold", "10^9 bf16", n, 6.0 * n, 6.0 * n, make, comparator="torch.kthvalue")]
