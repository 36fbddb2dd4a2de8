"""The elements of a format, numbers before scaling: integers, fixed point, minifloats, codebooks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from workbench.kernels.quantized.numbers import Numbers, binades, round_minifloat


@dataclass(frozen=True)
class Element:
    """A set of values. `lowest` and `highest` bound it; `bits` is the width of a code."""

    bits: int

    @property
    def lowest(self) -> float:
        return -self.highest

    @property
    def highest(self) -> float:
        raise TypeError(f"{type(self).__name__} has no highest")

    @property
    def numbers(self) -> Numbers | None:
        """The same values as the kernels know them; None when they do not."""
        return None

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        """The value nearest to each x (ties to the even code), or with `generator` one of its two neighbours
        at random, with expectation x (stochastic rounding). Beyond the range: the bound, or with
        `saturate=False` what the format defines (inf or nan; the bound when it has neither).
        Same dtype as x, which is float32 or float64.
        """
        raise TypeError(f"{type(self).__name__} has no round")

    def round_into(self, x: Tensor) -> Tensor:
        """`round` to nearest by the fewest operations; what x held may be lost."""
        return self.round(x)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (int64, in [0, 2^bits)) of values that are already in the format."""
        raise TypeError(f"{type(self).__name__} has no encode")

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of codes."""
        raise TypeError(f"{type(self).__name__} has no decode")

    def values(self) -> Tensor:
        """Every finite value, sorted, without repeats (float32); for up to 16 bits."""
        found = self.decode(torch.arange(2**self.bits))
        return torch.unique(found[(found >= self.lowest) & (found <= self.highest)] + 0.0)


@dataclass(frozen=True)
class Integer(Element):
    """Integers. Signed ones are -2^(b-1) .. 2^(b-1)-1, or without the lowest of these (`full` False), in
    two's complement; the others are 0 .. 2^b-1.
    """

    signed: bool = True
    full: bool = True

    @property
    def lowest(self) -> float:
        return -self.highest - self.full if self.signed else 0.0

    @property
    def highest(self) -> float:
        return float(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @functools.cached_property
    def numbers(self) -> Numbers:
        return Numbers(0, self.lowest, self.highest)

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        if generator is None:
            return self.numbers.round(x)
        return torch.floor(x + uniform(x, generator)).clamp_(self.lowest, self.highest)

    def round_into(self, x: Tensor) -> Tensor:
        numbers = self.numbers
        return x.round_().clamp_(numbers.low, numbers.high)

    def encode(self, x: Tensor) -> Tensor:
        return x.to(torch.int64) & (2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return (((codes + half) & (2**self.bits - 1)) - half if self.signed else codes).float()


@dataclass(frozen=True)
class Fixed(Element):
    """Signed fixed point: integers in [-2^(b-1), 2^(b-1)-1] times 2^-fraction (Dai et al. 2024, QFX)."""

    fraction: int = 0

    @property
    def lowest(self) -> float:
        return -(2.0 ** (self.bits - 1 - self.fraction))

    @property
    def highest(self) -> float:
        return (2 ** (self.bits - 1) - 1) * 2.0**-self.fraction

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        scaled = x * 2.0**self.fraction
        rounded = torch.round(scaled) if generator is None else torch.floor(scaled + uniform(x, generator))
        return (rounded * 2.0**-self.fraction).clamp_(self.lowest, self.highest)

    def encode(self, x: Tensor) -> Tensor:
        return (x.double() * 2.0**self.fraction).to(torch.int64) & (2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return (((codes + half) & (2**self.bits - 1)) - half).float() * 2.0**-self.fraction


@dataclass(frozen=True)
class Minifloat(Element):
    """Sign, `exponent` bits, `mantissa` bits; value (-1)^s 2^(e-bias) 1.m, subnormal at e = 0
    (Micikevicius et al. 2022).

    `special` says what the top codes mean: "ieee" (the whole top exponent is inf / nan), "fn"
    (only all ones is nan), "finite" (all are numbers).
    """

    exponent: int = 4
    mantissa: int = 3
    special: str = "finite"

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def highest(self) -> float:
        top = 2**self.exponent - 1 - (self.special == "ieee") - self.bias
        return 2.0**top * (2 - 2.0**-self.mantissa * (2 if self.special == "fn" else 1))

    @property
    def numbers(self) -> Numbers | None:
        narrow = 2 <= self.exponent <= 6 and self.mantissa <= 10
        return Numbers(1, 0.0, self.highest, self.exponent, self.mantissa) if narrow else None

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        if saturate:
            x = x.clamp(self.lowest, self.highest)
        # float32 has room for the rounding while the format's exponents are far from its ends
        wide = x.double() if self.numbers is None or x.dtype == torch.float64 or not saturate else x
        if generator is None:
            rounded = round_minifloat(wide, self.exponent, self.mantissa)
        else:
            step = binades(wide, self.exponent) * 2.0**-self.mantissa
            rounded = torch.copysign(torch.floor(wide / step + uniform(wide, generator)) * step, wide)
        if saturate:
            return rounded.clamp_(self.lowest, self.highest).to(x.dtype)
        beyond = {"ieee": float("inf"), "fn": float("nan"), "finite": self.highest}[self.special]
        over = torch.full_like(rounded, beyond).copysign(wide)
        if self.special != "ieee":
            over = torch.where(
                wide.isinf() & (self.special == "fn"), torch.full_like(over, float("nan")), over
            )
        return torch.where(rounded.abs() > self.highest, over, torch.where(wide.isnan(), wide, rounded)).to(
            x.dtype
        )

    def encode(self, x: Tensor) -> Tensor:
        wide = x.double()
        size = wide.abs()
        floor = torch.where(size > 0, torch.frexp(size).exponent.long() - 1, -self.bias)
        field = (floor + self.bias).clamp(min=0)
        unit = torch.where(field > 0, floor, torch.full_like(floor, 1 - self.bias)) - self.mantissa
        digits = torch.ldexp(size, -unit).to(torch.int64)
        code = torch.where(field > 0, (field << self.mantissa) + digits - 2**self.mantissa, digits)
        top = (2**self.exponent - 1) << self.mantissa
        if self.special == "ieee":
            code = torch.where(wide.isinf(), torch.full_like(code, top), code)
            code = torch.where(wide.isnan(), torch.full_like(code, top + 2 ** (self.mantissa - 1)), code)
        elif self.special == "fn":
            code = torch.where(wide.isfinite(), code, torch.full_like(code, top + 2**self.mantissa - 1))
        return code | (torch.signbit(wide).long() << (self.exponent + self.mantissa))

    def decode(self, codes: Tensor) -> Tensor:
        field = (codes >> self.mantissa) & (2**self.exponent - 1)
        digits = codes & (2**self.mantissa - 1)
        whole = torch.where(field > 0, digits + 2**self.mantissa, digits).double()
        value = torch.ldexp(whole, field.clamp(min=1) - self.bias - self.mantissa)
        top = field == 2**self.exponent - 1
        if self.special == "ieee":
            value = torch.where(top, torch.where(digits == 0, float("inf"), float("nan")).double(), value)
        elif self.special == "fn":
            value = torch.where(top & (digits == 2**self.mantissa - 1), float("nan"), value)
        return torch.where(codes >> (self.exponent + self.mantissa) & 1 == 1, -value, value).float()


@dataclass(frozen=True)
class Codebook(Element):
    """A sorted list of values in [-1, 1]; a code is an index into it."""

    table: tuple[float, ...] = (-1.0, 1.0)

    @property
    def lowest(self) -> float:
        return self.table[0]

    @property
    def highest(self) -> float:
        return self.table[-1]

    @property
    def numbers(self) -> Numbers:
        return Numbers(2, codebook=self.table)

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        if generator is None:
            return self.numbers.round(x)
        table = torch.tensor(self.table, dtype=x.dtype, device=x.device)
        inside = x.clamp(self.lowest, self.highest)
        below = torch.bucketize(inside, table[1:-1], right=True)
        low, high = table[below], table[below + 1]
        return torch.where(uniform(x, generator) < (inside - low) / (high - low), high, low)

    def encode(self, x: Tensor) -> Tensor:
        table = torch.tensor(self.table, dtype=x.dtype, device=x.device)
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.table, device=codes.device)[codes.clamp(max=len(self.table) - 1)]


@functools.lru_cache
def normal_float(bits: int = 4) -> tuple[float, ...]:
    """NormalFloat codebook (Dettmers et al. 2023): quantiles of N(0,1) with an exact zero,
    one more value above it than below, over their maximum.
    """
    half = 2 ** (bits - 1)
    offset = 0.5 * ((1 - 1 / (4 * half)) + (1 - 1 / (4 * half - 2)))  # 0.9677083 for 4 bits
    above = norm.ppf(np.linspace(offset, 0.5, half + 1)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, half)[:-1])
    table = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    return tuple(float(v) for v in table)


@functools.lru_cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The codebook of 2^bits values with the least squared error for N(0,1) (Lloyd 1957, Max 1960);
    unscaled, sorted.
    """
    values = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(20000):
        edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        mass = np.diff(norm.cdf(edges))
        updated = -np.diff(norm.pdf(edges)) / mass
        change = np.abs(updated - values).max()
        values = (updated - updated[::-1]) / 2
        if change < 1e-12:
            break
    return tuple(float(v) for v in values)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """U[0,1) noise drawn on the generator's device, so the same seed gives the same rounding wherever it is
    used.
    """
    return torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(
        like.device
    )
