"""Number formats as data: integers, minifloats ExMy, fixed point, codebooks (their elements are beside),
and the block formats built from them.

A format is a finite set of values in units of a scale. It rounds (nearest, ties to even; or stochastically),
encodes to codes and decodes codes to values, all exactly.
Where the scale comes from is `workbench.quantization.number.grid`'s business.

>>> import torch
>>> e2m1 = named("e2m1").element
>>> e2m1.round(torch.tensor([0.25, 0.75, 2.5, 5.0, 100.0])).tolist()
[0.0, 1.0, 2.0, 4.0, 6.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from workbench.axis import Choice, Entry, Options, parameter
from workbench.errors import BadInput
from workbench.quantization.number.elements import (
    Codebook,
    Element,
    Fixed,
    Integer,
    Minifloat,
    lloyd_max,
    normal_float,
)
from workbench.quantization.number.number_format import NUMBER_FORMAT


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
