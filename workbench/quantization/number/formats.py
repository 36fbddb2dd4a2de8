"""Number formats as data: integers, minifloats ExMy, fixed point, codebooks,
and the block formats built from them.

A format is a finite set of values in units of a scale. It rounds (nearest, ties to even; or stochastically),
encodes to codes and decodes codes to values, all exactly.
Where the scale comes from is `workbench.quantization.number.grid`'s business.

>>> e2m1 = named("e2m1").element
>>> e2m1.round(torch.tensor([0.25, 0.75, 2.5, 5.0, 100.0])).tolist()
[0.0, 1.0, 2.0, 4.0, 6.0]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from scipy.stats import norm
from torch import Tensor

from workbench.axis import Choice, Entry, Options, parameter
from workbench.errors import BadInput
from workbench.kernels.quantized.numbers import Numbers, binades, round_minifloat
from workbench.quantization.number.number_format import NUMBER_FORMAT


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

    @property
    def numbers(self) -> Numbers:
        return Numbers(0, self.lowest, self.highest)

    def round(self, x: Tensor, generator: torch.Generator | None = None, saturate: bool = True) -> Tensor:
        if generator is None:
            return self.numbers.round(x)
        return torch.floor(x + uniform(x, generator)).clamp_(self.lowest, self.highest)

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


@dataclass(frozen=True)
class Format:
    """An element format and how it wants to be scaled.

    block : weights that share a scale when the standard fixes it (0: the user's granularity)
    scale : "real" (any positive number, kept in 16 bits), "e8m0" (power of two), "e4m3"
        (with one float32 per tensor), "none" (no scale)
    rule  : how a scale is found when nothing is asked: "minmax" or "mean" (of magnitudes)
    """

    name: str
    element: Element
    block: int = 0
    scale: str = "real"
    rule: str = "minmax"

    @property
    def affine(self) -> bool:
        return isinstance(self.element, Integer) and not self.element.signed

    @property
    def uniform(self) -> bool:
        """Values are the integers: what a choice between floor and ceiling needs."""
        return isinstance(self.element, Integer)


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


class Int(Options):
    bits: int = parameter(4, "width", ge=1, le=16, unit="bits")
    symmetric: bool = parameter(True, "signed about zero; otherwise with a zero point")
    full: bool = parameter(
        True,
        "signed: all 2^bits values, the scale's sign such that the largest magnitude lies on the longer "
        "side; otherwise one value fewer and as many on both sides",
    )

    @model_validator(mode="after")
    def has_room(self) -> Int:
        if not self.symmetric and not self.full:
            raise BadInput("full: integers with a zero point have all 2^bits values; leave it out")
        return self


def spelled_integer(options: Int) -> str:
    if not options.symmetric:
        return f"uint{options.bits}"
    return f"int{options.bits}" + ("" if options.full else "-odd")


@NUMBER_FORMAT.add(
    "int",
    formula="s (q - z), q an integer",
    source="Jacob et al. 2018, eq. 1; signs of scales: Cheng et al. 2023, AutoRound",
    title="integer",
    options=Int,
    spelled=spelled_integer,
)
def integer(options: Int) -> Format:
    if options.bits == 1 and options.symmetric:
        raise BadInput("bits: 'int1' has two values, zero and another; use binary, ternary or uint1")
    return Format(spelled_integer(options), Integer(options.bits, options.symmetric, options.full))


class ExMy(Options):
    exponent: int = parameter(3, "bits of the exponent", ge=1, le=8, unit="bits")
    mantissa: int = parameter(2, "bits of the mantissa", ge=0, le=14, unit="bits")
    special: Literal["finite", "fn", "ieee"] = parameter(
        "finite",
        "what the top codes are: numbers, nan in the last (fn), inf and nan in the top exponent (ieee)",
    )


def spelled_minifloat(options: ExMy) -> str:
    special = "" if options.special == "finite" else options.special
    return f"e{options.exponent}m{options.mantissa}{special}"


@NUMBER_FORMAT.add(
    "ExMy",
    formula="(-1)^s 2^(e - bias) 1.m",
    source="Micikevicius et al. 2022",
    title="minifloat",
    options=ExMy,
    spelled=spelled_minifloat,
)
def minifloat(options: ExMy) -> Format:
    exponent, mantissa, special = options.exponent, options.mantissa, options.special
    name = spelled_minifloat(options)
    if (
        1 + exponent + mantissa > 16
        or (special != "finite" and mantissa < 1)
        or (special == "ieee" and exponent < 2)
    ):
        raise BadInput(
            f"format: {name!r} is too wide or has no room for special codes; "
            "ExMy needs 1+x+y <= 16, fn and ieee need y >= 1"
        )
    if name == "e5m2":
        raise BadInput("format: 'e5m2' has inf and nan; write e5m2 for it, or e5m2fn for one without inf")
    return Format(name, Minifloat(1 + exponent + mantissa, exponent, mantissa, special))


class FixedPoint(Options):
    width: int = parameter(8, "bits in all", ge=2, le=16, unit="bits")
    fraction: int = parameter(4, "bits behind the binary point", ge=0, le=99, unit="bits")


@NUMBER_FORMAT.add(
    "fixed",
    formula="2^-fraction q, q a signed integer of `width` bits",
    source="Dai et al. 2024, QFX",
    title="fixed point",
    options=FixedPoint,
    spelled=lambda options: f"fixed{options.width}.{options.fraction}",
)
def fixed_point(options: FixedPoint) -> Format:
    name = f"fixed{options.width}.{options.fraction}"
    return Format(name, Fixed(options.width, options.fraction), scale="none")


class NormalFloat(Options):
    bits: int = parameter(4, "width", ge=2, le=8, unit="bits")


@NUMBER_FORMAT.add(
    "nf",
    formula="quantiles of N(0, 1) with an exact zero, over their maximum",
    source="Dettmers et al. 2023, QLoRA, eq. 4",
    title="NormalFloat",
    options=NormalFloat,
    spelled=lambda options: f"nf{options.bits}",
)
def normal(options: NormalFloat) -> Format:
    return Format(f"nf{options.bits}", Codebook(options.bits, normal_float(options.bits)))


class Quantile(Options):
    bits: int = parameter(3, "width", ge=1, le=6, unit="bits")


@NUMBER_FORMAT.add(
    "quantile",
    formula="the 2^bits values with the least squared error for N(0, 1)",
    source="Lloyd 1957, Max 1960",
    title="Lloyd-Max codebook",
    options=Quantile,
    spelled=lambda options: f"quantile{options.bits}",
)
def quantile(options: Quantile) -> Format:
    return Format(f"quantile{options.bits}", Codebook(options.bits, lloyd_max(options.bits)), rule="rms")


def standard(format: Format, formula: str, source: str) -> None:
    """Register a format without options under its name."""

    def made(options: Options) -> Format:
        return format

    NUMBER_FORMAT.add(format.name, formula=formula, source=source)(made)


OCP = "Micikevicius et al. 2022"
MX = "Rouhani et al. 2023, microscaling formats"
standard(Format("e4m3fn", Minifloat(8, 4, 3, "fn")), "ExMy without inf", OCP)
standard(Format("e5m2", Minifloat(8, 5, 2, "ieee")), "ExMy with inf and nan", OCP)
standard(
    Format("bf16", Minifloat(16, 8, 7, "ieee"), scale="none"),
    "float32 cut to 16 bits",
    "Kalamkar et al. 2019",
)
standard(Format("fp16", Minifloat(16, 5, 10, "ieee"), scale="none"), "half precision", "IEEE 754-2008")
standard(Format("mxfp8", Minifloat(8, 4, 3, "fn"), 32, "e8m0"), "e4m3fn, a power of two for 32", MX)
standard(Format("mxfp8-e5m2", Minifloat(8, 5, 2, "ieee"), 32, "e8m0"), "e5m2, a power of two for 32", MX)
standard(Format("mxfp6", Minifloat(6, 3, 2), 32, "e8m0"), "e3m2, a power of two for 32", MX)
standard(Format("mxfp6-e2m3", Minifloat(6, 2, 3), 32, "e8m0"), "e2m3, a power of two for 32", MX)
standard(Format("mxfp4", Minifloat(4, 2, 1), 32, "e8m0"), "e2m1, a power of two for 32", MX)
standard(
    Format("nvfp4", Minifloat(4, 2, 1), 16, "e4m3"), "e2m1, an e4m3 for 16 and a float for all", "NVIDIA 2025"
)
standard(
    Format("ternary", Codebook(2, (-1.0, 0.0, 1.0)), rule="mean"),
    "s {-1, 0, 1}, s = mean |w|",
    "Ma et al. 2024",
)
standard(
    Format("binary", Codebook(1, (-1.0, 1.0)), rule="mean"),
    "s sign(w), s = mean |w|",
    "Rastegari et al. 2016",
)

_made: dict[tuple[str, int, bool], tuple[Entry, Format]] = {}


def named(name: str, bits: int = 4, symmetric: bool = True) -> Format:
    """A format by name, as int4, uint4, e3m4, fixed8.4, nf4; "int" alone takes its width and symmetry from
    `bits` and `symmetric`. `BadInput` for an unknown one.
    """
    key = (str(name), bits, symmetric)
    if key in _made:
        entry, format = _made[key]
        if NUMBER_FORMAT.entries.get(entry.name) is entry:
            return format
    more = {"bits": bits, "symmetric": symmetric} if name == "int" else {}
    try:
        choice: Choice = NUMBER_FORMAT.chosen(str(name), "format", **more)
        found: Format = choice()
    except BadInput as error:
        raise BadInput(f"format: {str(name)!r} is no format ({error})") from None
    _made[key] = (choice.entry, found)
    return found
