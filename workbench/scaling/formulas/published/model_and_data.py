"""Laws of model size, data and compute."""

from __future__ import annotations

from workbench.axis import Options
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.formulas.parameters import CHINCHILLA, exponent, floor, predicts, scale

DATA_CONSTRAINED = """
G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
unique = min(unique_tokens, tokens)
best = G * (unique * G) ** (beta / alpha)
useful = min(params, best)
repeats = max(tokens / unique - 1, 0)
excess = max(params / useful - 1, 0)
data = unique + unique * RD * (1 - exp(-repeats / RD))
size = useful + useful * RN * (1 - exp(-excess / RN))
E + A / size**alpha + B / data**beta
"""


@LAW.add(
    "chinchilla",
    title="Chinchilla, parametric (approach 3)",
    formula=r"L = E + \frac{A}{N^{\alpha}} + \frac{B}{D^{\beta}}",
    source="Hoffmann et al. 2022, eq. 2",
)
def chinchilla(options: Options) -> Law:
    return predicts(
        "E + A / params**alpha + B / tokens**beta",
        CHINCHILLA,
        ("params", "tokens"),
        published={"params": (70e6, 16e9), "tokens": (5e9, 500e9)},
    )


@LAW.add(
    "kaplan",
    title="Kaplan, model and data",
    formula=r"L = \left[(N_c/N)^{\alpha_N/\alpha_D} + D_c/D\right]^{\alpha_D}",
    source="Kaplan et al. 2020, eq. 1.5",
)
def kaplan(options: Options) -> Law:
    return predicts(
        "((Nc / params) ** (alpha_n / alpha_d) + Dc / tokens) ** alpha_d",
        (
            scale("Nc", "critical model size", (1e6, 1e18)),
            scale("Dc", "critical data size", (1e6, 1e18)),
            exponent("alpha_n", "model exponent", (0.02, 0.5)),
            Parameter("alpha_d", "data exponent", (0.02, 0.5), low=1e-3, high=5.0),
        ),
        ("params", "tokens"),
        published={"params": (768, 1.5e9), "tokens": (22e6, 23e9)},
    )


@LAW.add(
    "kaplan-steps",
    title="Kaplan, model and minimum steps",
    formula=r"L = (N_c/N)^{\alpha_N} + (S_c/S_{\min})^{\alpha_S}",
    source="Kaplan et al. 2020, eq. 5.6; Su et al. 2024, eq. 2",
)
def kaplan_steps(options: Options) -> Law:
    return predicts(
        "(Nc / params) ** alpha_n + (Sc / steps) ** alpha_s",
        (
            scale("Nc", "critical model size", (1e6, 1e18)),
            scale("Sc", "critical steps", (1.0, 1e8)),
            exponent("alpha_n", "model exponent", (0.02, 0.5)),
            exponent("alpha_s", "step exponent", (0.2, 1.5)),
        ),
        ("params", "steps"),
    )


@LAW.add(
    "power-data",
    title="Power law in tokens",
    formula=r"L = E + B D^{-\beta}",
    source="Hestness et al. 2017",
)
def power_data(options: Options) -> Law:
    return predicts(
        "E + B / tokens**beta",
        (floor(), CHINCHILLA[2], CHINCHILLA[4]),
        ("tokens",),
    )


@LAW.add(
    "power-params",
    title="Power law in parameters",
    formula=r"L = E + A N^{-\alpha}",
    source="Hestness et al. 2017; Kim et al. 2025 (asymptote of a tuned recipe)",
)
def power_params(options: Options) -> Law:
    return predicts(
        "E + A / params**alpha",
        (floor(), CHINCHILLA[1], CHINCHILLA[3]),
        ("params",),
    )


@LAW.add(
    "power-compute",
    title="Power law in compute",
    formula=r"L = E + K C^{-\gamma}",
    source="Kaplan et al. 2020; Henighan et al. 2020",
)
def power_compute(options: Options) -> Law:
    return predicts(
        "E + K / flops**gamma",
        (
            floor(),
            scale("K", "size of the finite-compute term", (1e-2, 1e6)),
            exponent("gamma", "how fast more compute helps", (0.01, 0.5)),
        ),
        ("flops",),
    )


@LAW.add(
    "over-training",
    title="Over-training",
    formula=r"L = E + a N^{-\eta} + b\,6^{-\eta/2} (M N)^{-\eta},\; M = D/N",
    source="Gadre et al. 2024, eq. 4",
)
def over_training(options: Options) -> Law:
    return predicts(
        "E + a * params**(-eta) + b * 6**(-eta / 2) * tokens**(-eta)",
        (
            floor(),
            scale("a", "model term", (1e-1, 1e6)),
            scale("b", "data term", (1e-1, 1e6)),
            exponent("eta", "twice the compute exponent", (0.02, 0.8)),
        ),
        ("params", "tokens"),
        published={"params": (11e6, 6.9e9)},
    )


@LAW.add(
    "data-constrained",
    title="Data-constrained (repeated tokens)",
    formula=r"L = E + A/N'^{\alpha} + B/D'^{\beta},\; D' = U + U R_D^*(1-e^{-R_D/R_D^*})",
    source="Muennighoff et al. 2023, eqs. 5-7",
)
def data_constrained(options: Options) -> Law:
    return predicts(
        DATA_CONSTRAINED,
        (
            *CHINCHILLA,
            scale("RD", "repetitions after which repeated tokens lose their worth", (0.5, 200.0)),
            scale("RN", "excess of parameters after which more are worthless", (0.2, 100.0)),
        ),
        ("params", "tokens", "unique_tokens"),
        published={"params": (7e6, 9e9), "tokens": (1e8, 900e9)},
    )


@LAW.add(
    "broken-power",
    title="Smoothly broken power law (one break)",
    formula=r"L = E + B D^{-c_0}\left(1+(D/d_1)^{1/f}\right)^{-c_1 f}",
    source="Caballero et al. 2023, eq. 1 with n = 1",
)
def broken_power(options: Options) -> Law:
    return predicts(
        "E + B * tokens**(-c0) * exp(-c1 * f * softplus((log(tokens) - log(knee)) / f))",
        (
            Parameter("E", "limit", (1e-3, 3.0), scale="log"),
            scale("B", "size", (1e-2, 1e6)),
            Parameter("c0", "slope before the break", (-0.2, 1.0), low=-5, high=5),
            Parameter("c1", "change of slope at the break", (-1.0, 1.0), low=-5, high=5),
            scale("knee", "tokens at the break", (1e5, 1e12)),
            Parameter("f", "width of the break in ln tokens", (0.05, 2.0), low=1e-2, scale="log", high=20.0),
        ),
        ("tokens",),
    )


@LAW.add(
    "ensemble",
    title="Ensemble members",
    formula=r"L(K) = E_K + A K^{-\alpha}",
    source="Kim et al. 2025",
)
def ensemble(options: Options) -> Law:
    return predicts(
        "E + A / members**alpha",
        (
            floor(),
            scale("A", "single-model excess", (1e-3, 10.0)),
            exponent("alpha", "exponent", (0.2, 2.0)),
        ),
        ("members",),
    )


@LAW.add(
    "farseer",
    title="Farseer",
    formula=r"L = K e^{sN^{q}} + J e^{BN^{-b}}\,D^{-e^{AN^{a}+E}},\; K = e^{S},\, J = e^{Q}",
    source="Li et al. 2025, Predictable Scale II (bits per character, non-embedding N)",
)
def farseer(options: Options) -> Law:
    return predicts(
        "K * exp(s * params**q) + J * exp(B * params**(-b)) * tokens**(-exp(A * params**a + E))",
        (
            Parameter("s", "how the limit of infinite data falls with size", (-0.3, -0.01), low=-5, high=1),
            exponent("q", "its exponent", (0.05, 0.3), high=1.0),
            scale("K", "that limit at no size, e^S", (0.3, 3.0)),
            scale("B", "how the data term falls with size", (10.0, 1000.0)),
            exponent("b", "its exponent", (0.05, 0.4), high=1.0),
            scale("J", "the data term at infinite size, e^Q", (1e-3, 3.0)),
            Parameter("A", "how the data exponent changes with size", (-4.0, -0.5), low=-20, high=0),
            exponent("a", "its exponent", (0.01, 0.15), high=1.0),
            Parameter("E", "logarithm of the data exponent at no size", (1.0, 5.0), low=-5, high=20),
        ),
        ("params", "tokens"),
        published={"params": (2e8, 2.51e10), "tokens": (1e9, 5.12e11)},
    )


@LAW.add(
    "parallel-streams",
    title="Parallel streams",
    formula=r"L = E + \left(\frac{A}{N(k\ln P+1)}\right)^{\alpha}",
    source="Chen et al. 2025, ParScale",
)
def parallel_streams(options: Options) -> Law:
    return predicts(
        "E + (A / (params * (k * log(streams) + 1)))**alpha",
        (
            floor(),
            scale("A", "critical model size", (1e5, 1e10)),
            scale("k", "what an e-fold of streams is worth, in parameters", (0.05, 2.0)),
            exponent("alpha", "how fast more parameters help", (0.05, 0.6)),
        ),
        ("params", "streams"),
        published={"params": (5.3e8, 4.5e9), "streams": (1, 8)},
    )


@LAW.add(
    "vocabulary",
    title="Vocabulary",
    formula=r"L_u = -E + A_1/N_{nv}^{\alpha_1} + A_2/N_v^{\alpha_2} + B/D^{\beta}",
    source="Tao et al. 2024 (loss over that of a unigram model)",
)
def vocabulary(options: Options) -> Law:
    return predicts(
        "-E + A1 / non_vocab_params**alpha1 + A2 / vocab_params**alpha2 + B / tokens**beta",
        (
            Parameter("E", "gain over unigrams of an infinite model", (3.0, 8.0), scale="log"),
            scale("A1", "size of the term of the other parameters", (1.0, 1e6)),
            scale("A2", "size of the vocabulary's term", (1.0, 1e6)),
            scale("B", "size of the data term", (1.0, 1e8)),
            exponent("alpha1", "how fast other parameters help"),
            exponent("alpha2", "how fast vocabulary parameters help"),
            exponent("beta", "how fast more tokens help"),
        ),
        ("non_vocab_params", "vocab_params", "tokens"),
        target="normalised_loss",
        positive=False,
        published={"non_vocab_params": (33e6, 1.13e9)},
    )
