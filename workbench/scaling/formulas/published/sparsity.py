"""Laws of sparse and routed models."""

from __future__ import annotations

from workbench.axis import Options
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.formulas.parameters import CHINCHILLA, exponent, floor, predicts, scale

ROUTED = """
saturated = 1 / (experts - 1 + 1 / (1 / Estart - 1 / Emax)) + 1 / Emax
10 ** (a * log10(params) - b * log10(saturated) - c * log10(params) * log10(saturated) + d)
"""


@LAW.add(
    "sparse",
    title="Sparse models",
    formula=r"L = (a_S(1-S)^{b_S}+c_S) N^{-b_N} + (a_D/D)^{b_D} + c",
    source="Frantar et al. 2023, eq. 1 (N: non-zero parameters)",
)
def sparse(options: Options) -> Law:
    return predicts(
        "(aS * (1 - sparsity)**bS + cS) * params**(-bN) + (aD / tokens)**bD + E",
        (
            floor(),
            scale("aS", "worth of dense weights", (1e-1, 1e4)),
            exponent("bS", "sparsity exponent"),
            scale("cS", "sparse limit", (1e-1, 1e4)),
            exponent("bN", "model exponent"),
            scale("aD", "data scale", (1e3, 1e12)),
            exponent("bD", "data exponent"),
        ),
        ("params", "tokens", "sparsity"),
    )


@LAW.add(
    "sparse-average",
    title="Sparse pre-training, average parameters",
    formula=r"L = E + A/\bar N^{\alpha} + B/D^{\beta},\; \bar N = \frac1D\int_0^D N(t)\,dt",
    source="Jin et al. 2025, eq. 3",
)
def sparse_average(options: Options) -> Law:
    return predicts(
        "E + A / average_params**alpha + B / tokens**beta",
        CHINCHILLA,
        ("average_params", "tokens"),
    )


@LAW.add(
    "routed",
    title="Routed (mixture of experts)",
    formula=r"\log L = a\log N + b\log\hat E + c\log N\log\hat E + d",
    source="Clark et al. 2022, eqs. 1 and 4",
)
def routed(options: Options) -> Law:
    return predicts(
        ROUTED,
        (
            Parameter("a", "log10 N slope", (-0.2, 0.0), low=-2, high=1),
            Parameter("b", "log10 experts slope", (-0.3, 0.0), low=-2, high=1),
            Parameter("c", "interaction", (-0.05, 0.05), low=-1, high=1),
            Parameter("d", "offset", (0.0, 2.0), low=-10, high=10),
            Parameter(
                "Estart",
                "experts below which routing does not help",
                (1.05, 8.0),
                low=1.0001,
                high=100.0,
                scale="log",
            ),
            Parameter(
                "Emax", "experts at which gains saturate", (32.0, 2000.0), low=10.0, high=1e6, scale="log"
            ),
        ),
        ("params", "experts"),
    )
