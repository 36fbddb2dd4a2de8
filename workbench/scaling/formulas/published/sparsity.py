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

JOINT = """
experts_hat = 1 / (1 / (experts - 1 + 1 / (1 / Estart - 1 / Emax)) + 1 / Emax)
size = a * experts_hat**delta * active_params**(alpha + gamma * log(experts_hat))
size + b * experts_hat**omega * tokens**(beta + zeta * log(experts_hat)) + c
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


@LAW.add(
    "granularity",
    title="Fine-grained mixture of experts",
    formula=r"L = c + \left(\frac{g}{G^{\gamma}} + a\right)\frac{1}{N^{\alpha}} + \frac{b}{D^{\beta}}",
    source="Krajewski et al. 2024",
)
def granularity(options: Options) -> Law:
    return predicts(
        "c + (g / granularity**gamma + a) / params**alpha + b / tokens**beta",
        (
            floor("c"),
            scale("g", "worth of finer experts", (0.1, 1e3)),
            scale("a", "model term of infinitely fine experts", (0.1, 1e5)),
            scale("b", "data term", (0.1, 1e5)),
            exponent("gamma", "how fast finer experts help", (0.1, 1.5)),
            exponent("alpha", "how fast more parameters help"),
            exponent("beta", "how fast more tokens help"),
        ),
        ("params", "tokens", "granularity"),
    )


@LAW.add(
    "joint-experts",
    title="Dense and mixture-of-experts models jointly",
    formula=(
        r"L = a\hat E^{\delta} N^{\alpha+\gamma\ln\hat E} + "
        r"b\hat E^{\omega} D^{\beta+\zeta\ln\hat E} + c"
    ),
    source="Ludziejewski et al. 2025",
)
def joint_experts(options: Options) -> Law:
    return predicts(
        JOINT,
        (
            floor("c"),
            scale("a", "model term", (1.0, 1e3)),
            scale("b", "data term", (1.0, 1e3)),
            Parameter("alpha", "exponent of active parameters", (-0.5, -0.05), low=-3, high=0),
            Parameter("beta", "exponent of tokens", (-0.5, -0.05), low=-3, high=0),
            Parameter("gamma", "its change with experts", (-0.05, 0.05), low=-1, high=1),
            Parameter("zeta", "its change with experts", (-0.05, 0.05), low=-1, high=1),
            Parameter("delta", "experts in the model term", (-0.5, 0.5), low=-3, high=3),
            Parameter("omega", "experts in the data term", (-1.0, 0.0), low=-3, high=3),
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
        ("active_params", "tokens", "experts"),
        published={"active_params": (0, 2.7e9)},
    )


@LAW.add(
    "upcycling",
    title="Upcycling: dense training, then a mixture of experts",
    formula=r"L = A\,D_1^{-\alpha_1} D_2^{-\alpha_2+\alpha_3\ln D_1} + E",
    source="Liew et al. 2025 (tokens of the two stages)",
)
def upcycling(options: Options) -> Law:
    return predicts(
        "A * dense_tokens**(-alpha1) * sparse_tokens**(-alpha2 + alpha3 * log(dense_tokens)) + E",
        (
            floor(),
            scale("A", "size", (1.0, 1e12)),
            Parameter("alpha1", "worth of dense tokens", (0.0, 1.5), low=-3, high=5),
            Parameter("alpha2", "worth of sparse tokens", (0.0, 1.5), low=-3, high=5),
            Parameter("alpha3", "how dense tokens slow the second stage", (0.0, 0.06), low=-1, high=1),
        ),
        ("dense_tokens", "sparse_tokens"),
    )


@LAW.add(
    "upcycling-size",
    title="Upcycling: sparsity and active parameters",
    formula=r"L = e^{d_1} P^{-a} N^{-b} e^{c\ln P\ln N} + e^{d_3}",
    source="Liew et al. 2025 (tokens fixed)",
)
def upcycling_size(options: Options) -> Law:
    return predicts(
        "d1 * expert_ratio**(-a) * active_params**(-b + c * log(expert_ratio)) + d3",
        (
            scale("d1", "size", (1.0, 1e4)),
            Parameter("a", "worth of more experts a token", (-0.5, 1.5), low=-5, high=5),
            Parameter("b", "worth of active parameters", (0.02, 1.0), low=-1, high=5),
            Parameter("c", "interaction", (-0.05, 0.05), low=-1, high=1),
            floor("d3"),
        ),
        ("expert_ratio", "active_params"),
    )
