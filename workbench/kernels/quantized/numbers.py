"""The numbers a format has before scaling (integers, minifloats, codebooks), and rounding to them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numbers:
    """What numbers there are before scaling. Kind 0: integers low..high; 1: minifloat with `exponent`
    and `mantissa` bits, largest `high`; 2: the sorted entries of `codebook`."""

    kind: int
    low: float = 0.0
    high: float = 0.0
    exponent: int = 0
    mantissa: int = 0
    codebook: tuple[float, ...] = ()

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest of them to each x (fp32 or fp64), ties to the even code; the bound beyond the range."""
        if self.kind == 0:
            return torch.round(x).clamp_(self.low, self.high)
        if self.kind == 1:
            inside = x.clamp(-self.high, self.high)
            return round_minifloat(inside, self.exponent, self.mantissa).clamp_(-self.high, self.high)
        return round_codebook(x, self.codebook)


def binades(x: torch.Tensor, exponent: int) -> torch.Tensor:
    """The power of two at or below |x|, and at least the smallest normal number of `exponent` bits."""
    bits, view = (0x7F800000, torch.int32) if x.dtype == torch.float32 else (0x7FF << 52, torch.int64)
    return (x.view(view) & bits).view(x.dtype).clamp_(min=2.0 ** (2 - 2 ** (exponent - 1)))


def round_minifloat(x: torch.Tensor, exponent: int, mantissa: int) -> torch.Tensor:
    """The nearest number with so many bits, of any size, ties to even; x in fp32 (for up to 6 and 10 bits) or
    fp64.

    Adding 1.5 * 2^(digits - M) * 2^e pushes everything below the last mantissa bit of x off the end of the
    type, which rounds to nearest even in hardware; subtracting it again is exact.
    """
    digits = 23 if x.dtype == torch.float32 else 52
    push = binades(x, exponent) * (1.5 * 2.0 ** (digits - mantissa))
    return torch.copysign((x + push).sub_(push), x)


def round_codebook(x: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """The nearest entry of a sorted table; in the middle between two, the lower one."""
    found = buckets(table, x.dtype, x.device)
    if found is None:
        values = torch.tensor(table, dtype=x.dtype, device=x.device)
        return values[torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)]
    middle, pair = found
    flat = x.reshape(-1)
    per_unit = (len(middle) - 1) / (table[-1] - table[0])
    index = (
        flat.clamp(table[0], table[-1])
        .sub_(table[0])
        .mul_(per_unit)
        .to(torch.int32)
        .clamp_(0, len(middle) - 1)
    )
    above = flat > middle.index_select(0, index)
    return pair.index_select(0, index.mul_(2).add_(above)).reshape(x.shape)


@functools.lru_cache
def buckets(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A codebook's range cut into so many equal buckets that none holds two of the midpoints between values:
    (midpoint of each bucket, infinite where there is none; the values below and above it, two a bucket).
    Midpoints keep clear of the buckets' ends, where rounding could put a number into the neighbour.
    None when a thousand buckets do not do.
    """
    table = torch.tensor(values, dtype=dtype)
    middles = (table[1:] + table[:-1]) / 2
    places = (middles.double() - values[0]) / (values[-1] - values[0])
    for count in range(len(values), 1024):
        where = places * count
        inside, share = where.long(), where - where.floor()
        if len(inside.unique()) == len(inside) and bool(((share > 1e-3) & (share < 1 - 1e-3)).all()):
            below = torch.bucketize(torch.arange(count + 1), inside)  # midpoints in the buckets before
            middle = torch.full((count + 1,), torch.inf, dtype=dtype)
            middle[inside] = middles
            pair = torch.stack(
                [table[below], table[(below + middle.isfinite()).clamp(max=len(values) - 1)]], 1
            ).reshape(-1)
            return middle.to(device), pair.to(device)
    return None


def minifloat_max(exponent: int, mantissa: int, reserved: str = "none") -> float:
    """Largest value of a minifloat: `reserved` codes "none" (E2M1, E3M2, E2M3), "nan" (E4M3: one mantissa),
    "ieee" (E5M2: top exponent).

    >>> minifloat_max(2, 1), minifloat_max(4, 3, "nan"), minifloat_max(5, 2, "ieee")
    (6.0, 448.0, 57344.0)
    """
    bias = 2 ** (exponent - 1) - 1
    top = 2**exponent - 1 - bias - (reserved == "ieee")
    return 2.0**top * (2 - 2.0**-mantissa - (2.0**-mantissa if reserved == "nan" else 0))


def limits(grid: Numbers) -> tuple[float, float]:
    return (-grid.high, grid.high) if grid.kind == 1 else (grid.low, grid.high)


def normal_float_codebook(bits: int = 4, offset: float = 0.9677083) -> tuple[float, ...]:
    """NF-`bits` of Dettmers et al. (2023): normal quantiles, half the codes negative, one more positive,
    0 exact, scaled to [-1, 1].

    >>> [round(c, 4) for c in normal_float_codebook()[:3]], len(normal_float_codebook())
    ([-1.0, -0.6962, -0.5251], 16)
    """
    half = 2 ** (bits - 1)
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return tuple((values / values.abs().max()).float().tolist())


NF4 = normal_float_codebook()
