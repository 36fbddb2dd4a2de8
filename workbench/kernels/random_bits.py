"""Random numbers that are a function of (seed, element):
the same on every device, in every order, in Triton and in PyTorch.

The integer hash is two rounds of the "lowbias32" mixer (Wellons, 2018): xor-shifts and odd multiplications
modulo 2^32. A tensor rounded stochastically on a GPU, in the interpreter or by the reference is then the same
tensor, bit for bit.

>>> uniform(seed=1, count=4)
tensor([...])
>>> bool((uniform(3, 8) == uniform(3, 8)).all()), bool((uniform(3, 8) == uniform(4, 8)).any())
(True, False)
"""

from __future__ import annotations

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import jit, tl

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One round of the mixer on int64 holding unsigned 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_bits(seed: int, count: int, device: torch.device | str = "cpu", start: int = 0) -> torch.Tensor:
    """(count,) int64 values in [0, 2^32) for the elements start, start + 1, ..."""
    if not 0 <= seed < 2**31:
        raise BadInput(f"seed = {seed}: an integer from 0 to 2^31 - 1 is needed")
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return _mix((_mix(index & _MASK) + seed * 0x9E3779B9 + (index >> 32)) & _MASK)


def uniform(seed: int, count: int, device: torch.device | str = "cpu", start: int = 0) -> torch.Tensor:
    """(count,) fp32 multiples of 2^-24 in [0, 1)."""
    return (random_bits(seed, count, device, start) >> 8).float() * 2.0**-24


@jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@jit
def uniform_block(seed, index):
    """fp32 block of `uniform` at int64 element numbers `index`."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    key = (tl.full((), 0, tl.int64) + seed).to(tl.uint32) * tl.full(
        (), 0x9E3779B9, tl.uint32
    )  # seed may be a constant
    return (mix(mix(low) + key + high) >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
