"""The laws that ship: each one a formula, its parameters and where it comes from.
Add your own with `Law.from_formula`.

Parameter counts and tokens enter in raw units (not millions), as in the papers, unless a law says otherwise.
"""

from __future__ import annotations

import difflib

from workbench.errors import BadInput
from workbench.scaling.formulas.laws import Law, Parameter


def _floor(
    name: str = "E", meaning: str = "loss of an infinitely large, infinitely trained model"
) -> Parameter:
    return Parameter(name, meaning, start=(0.3, 3.0), scale="log", unit="nats per token")


def _scale(name: str, meaning: str, start: tuple[float, float] = (1e-2, 1e8)) -> Parameter:
    return Parameter(name, meaning, start=start, scale="log")


def _exponent(
    name: str, meaning: str, start: tuple[float, float] = (0.05, 1.2), high: float = 5.0
) -> Parameter:
    return Parameter(name, meaning, start=start, low=0.0, high=high)


_CHINCHILLA = (
    _floor(),
    _scale("A", "size of the finite-model term"),
    _scale("B", "size of the finite-data term"),
    _exponent("alpha", "how fast more parameters help"),
    _exponent("beta", "how fast more tokens help"),
)

_DATA_CONSTRAINED = """
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

_ROUTED = """
saturated = 1 / (experts - 1 + 1 / (1 / Estart - 1 / Emax)) + 1 / Emax
10 ** (a * log10(params) - b * log10(saturated) - c * log10(params) * log10(saturated) + d)
"""

_PRECISION = """
weights = 1 - exp(-bits / gw)
activations = 1 - exp(-activation_bits / ga)
cache = 1 - exp(-kv_bits / gkv)
A / (params * weights * activations * cache)**alpha + B / tokens**beta + E
"""

_QAT = """
perbyte = 1 / (params * bits / 8)
sfp = max(tokens * (1 - qat_fraction) * perbyte, 1e-9)
sqat = max(tokens * qat_fraction * perbyte, 1e-9)
damage = theta * 2**(-kappa * bits) + phi * 2**(-chi * bits) / (params**psi * sqat**omega)
E + A / params**alpha + B / tokens**beta + damage + lam * 2**(-mu * bits) / (params**nu * sfp**xi * sqat**rho)
"""

LAWS: dict[str, Law] = {}


def _add(
    name: str,
    title: str,
    formula: str,
    parameters: tuple[Parameter, ...],
    columns: tuple[str, ...],
    latex: str,
    source: str,
    target: str = "loss",
    positive: bool = True,
) -> None:
    LAWS[name] = Law(name, formula, parameters, columns, target, latex, source, title, positive=positive)


_add(
    "chinchilla",
    "Chinchilla, parametric (approach 3)",
    "E + A / params**alpha + B / tokens**beta",
    _CHINCHILLA,
    ("params", "tokens"),
    r"L = E + \frac{A}{N^{\alpha}} + \frac{B}{D^{\beta}}",
    "Hoffmann et al. 2022, eq. 2",
)
_add(
    "kaplan",
    "Kaplan, model and data",
    "((Nc / params) ** (alpha_n / alpha_d) + Dc / tokens) ** alpha_d",
    (
        _scale("Nc", "critical model size", (1e6, 1e18)),
        _scale("Dc", "critical data size", (1e6, 1e18)),
        _exponent("alpha_n", "model exponent", (0.02, 0.5)),
        Parameter("alpha_d", "data exponent", (0.02, 0.5), low=1e-3, high=5.0),
    ),
    ("params", "tokens"),
    r"L = \left[(N_c/N)^{\alpha_N/\alpha_D} + D_c/D\right]^{\alpha_D}",
    "Kaplan et al. 2020, eq. 1.5",
)
_add(
    "kaplan-steps",
    "Kaplan, model and minimum steps",
    "(Nc / params) ** alpha_n + (Sc / steps) ** alpha_s",
    (
        _scale("Nc", "critical model size", (1e6, 1e18)),
        _scale("Sc", "critical steps", (1.0, 1e8)),
        _exponent("alpha_n", "model exponent", (0.02, 0.5)),
        _exponent("alpha_s", "step exponent", (0.2, 1.5)),
    ),
    ("params", "steps"),
    r"L = (N_c/N)^{\alpha_N} + (S_c/S_{\min})^{\alpha_S}",
    "Kaplan et al. 2020, eq. 5.6; Su et al. 2024, eq. 2",
)
_add(
    "power-data",
    "Power law in tokens",
    "E + B / tokens**beta",
    (_floor(), _CHINCHILLA[2], _CHINCHILLA[4]),
    ("tokens",),
    r"L = E + B D^{-\beta}",
    "Hestness et al. 2017",
)
_add(
    "power-params",
    "Power law in parameters",
    "E + A / params**alpha",
    (_floor(), _CHINCHILLA[1], _CHINCHILLA[3]),
    ("params",),
    r"L = E + A N^{-\alpha}",
    "Hestness et al. 2017; Kim et al. 2025 (asymptote of a tuned recipe)",
)
_add(
    "power-compute",
    "Power law in compute",
    "E + K / flops**gamma",
    (
        _floor(),
        _scale("K", "size of the finite-compute term", (1e-2, 1e6)),
        _exponent("gamma", "how fast more compute helps", (0.01, 0.5)),
    ),
    ("flops",),
    r"L = E + K C^{-\gamma}",
    "Kaplan et al. 2020; Henighan et al. 2020",
)
_add(
    "over-training",
    "Over-training",
    "E + a * params**(-eta) + b * 6**(-eta / 2) * tokens**(-eta)",
    (
        _floor(),
        _scale("a", "model term", (1e-1, 1e6)),
        _scale("b", "data term", (1e-1, 1e6)),
        _exponent("eta", "twice the compute exponent", (0.02, 0.8)),
    ),
    ("params", "tokens"),
    r"L = E + a N^{-\eta} + b\,6^{-\eta/2} (M N)^{-\eta},\; M = D/N",
    "Gadre et al. 2024, eq. 4",
)
_add(
    "data-constrained",
    "Data-constrained (repeated tokens)",
    _DATA_CONSTRAINED,
    (
        *_CHINCHILLA,
        _scale("RD", "repetitions after which repeated tokens lose their worth", (0.5, 200.0)),
        _scale("RN", "excess of parameters after which more are worthless", (0.2, 100.0)),
    ),
    ("params", "tokens", "unique_tokens"),
    r"L = E + A/N'^{\alpha} + B/D'^{\beta},\; D' = U + U R_D^*(1-e^{-R_D/R_D^*})",
    "Muennighoff et al. 2023, eqs. 5-7",
)
_add(
    "broken-power",
    "Smoothly broken power law (one break)",
    "E + B * tokens**(-c0) * exp(-c1 * f * softplus((log(tokens) - log(knee)) / f))",
    (
        Parameter("E", "limit", (1e-3, 3.0), scale="log"),
        _scale("B", "size", (1e-2, 1e6)),
        Parameter("c0", "slope before the break", (-0.2, 1.0), low=-5, high=5),
        Parameter("c1", "change of slope at the break", (-1.0, 1.0), low=-5, high=5),
        _scale("knee", "tokens at the break", (1e5, 1e12)),
        Parameter("f", "width of the break in ln tokens", (0.05, 2.0), low=1e-2, scale="log", high=20.0),
    ),
    ("tokens",),
    r"L = E + B D^{-c_0}\left(1+(D/d_1)^{1/f}\right)^{-c_1 f}",
    "Caballero et al. 2023, eq. 1 with n = 1",
)
_add(
    "routed",
    "Routed (mixture of experts)",
    _ROUTED,
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
        Parameter("Emax", "experts at which gains saturate", (32.0, 2000.0), low=10.0, high=1e6, scale="log"),
    ),
    ("params", "experts"),
    r"\log L = a\log N + b\log\hat E + c\log N\log\hat E + d",
    "Clark et al. 2022, eqs. 1 and 4",
)
_add(
    "precision",
    "Training precision",
    _PRECISION,
    (
        *_CHINCHILLA,
        _scale("gw", "bits scale of weights", (0.5, 8.0)),
        _scale("ga", "bits scale of activations", (0.5, 8.0)),
        _scale("gkv", "bits scale of the key-value cache", (0.5, 8.0)),
    ),
    ("params", "tokens", "bits", "activation_bits", "kv_bits"),
    r"N_{\mathrm{eff}} = N\prod_x (1 - e^{-P_x/\gamma_x})",
    "Kumar et al. 2024, eqs. 3-6",
)
_add(
    "weight-precision",
    "Weight precision",
    "A / (params * (1 - exp(-bits / gw)))**alpha + B / tokens**beta + E",
    (*_CHINCHILLA, _scale("gw", "bits scale of weights", (0.5, 8.0))),
    ("params", "tokens", "bits"),
    r"N_{\mathrm{eff}} = N (1 - e^{-P_w/\gamma_w})",
    "Kumar et al. 2024, eq. 3",
)
_add(
    "post-training-precision",
    "Post-training quantization damage",
    "CT * tokens**gd / params**gn * exp(-post_bits / gp)",
    (
        _scale("CT", "size", (1e-6, 1e6)),
        _exponent("gd", "grows with tokens", (0.0, 1.5)),
        _exponent("gn", "falls with parameters", (0.0, 1.5)),
        _scale("gp", "bits scale", (0.1, 4.0)),
    ),
    ("params", "tokens", "post_bits"),
    r"\delta = C_T \frac{D^{\gamma_D}}{N^{\gamma_N}} e^{-P/\gamma}",
    "Kumar et al. 2024, eq. 2",
    target="loss_increase",
)
_add(
    "float-precision",
    "Floating-point training",
    "n / params**alpha + d / tokens**beta + E + tokens**beta / params**alpha * log2(block_size)"
    " / (gamma * (exponent_bits + 0.5)**delta * (mantissa_bits + 0.5)**nu)",
    (
        _floor(),
        _scale("n", "model term"),
        _scale("d", "data term"),
        _CHINCHILLA[3],
        _CHINCHILLA[4],
        _scale("gamma", "tolerance", (1.0, 1e8)),
        _exponent("delta", "worth of an exponent bit", (0.5, 4.0)),
        _exponent("nu", "worth of a mantissa bit", (0.5, 4.0)),
    ),
    ("params", "tokens", "exponent_bits", "mantissa_bits", "block_size"),
    r"L = \frac{n}{N^\alpha}+\frac{d}{D^\beta}+\epsilon+\frac{D^\beta}{N^\alpha}\frac{\log_2 "
    r"B}{\gamma(E+.5)^\delta(M+.5)^\nu}",
    "Sun et al. 2025, eq. 2",
)
_add(
    "quantization-aware",
    "Quantization-aware training split",
    _QAT,
    (
        *_CHINCHILLA,
        _scale("theta", "floor of the damage", (1e-3, 10.0)),
        _exponent("kappa", "per bit", (0.1, 3.0)),
        _scale("phi", "damage left to QAT", (1e-3, 1e3)),
        _exponent("chi", "per bit", (0.1, 3.0)),
        _exponent("psi", "with size", (0.0, 0.5)),
        _exponent("omega", "with QAT tokens", (0.05, 1.0)),
        _scale("lam", "interaction", (1e-3, 1e3)),
        _exponent("mu", "per bit", (0.1, 3.0)),
        _exponent("nu", "with size", (0.0, 0.5)),
        _exponent("xi", "with full-precision tokens", (0.05, 1.0)),
        _exponent("rho", "with QAT tokens", (0.05, 1.0)),
    ),
    ("params", "tokens", "bits", "qat_fraction"),
    r"L = L_{N,D} + \delta(N, D_{qat}, D_{fp}, B)",
    "Dremov et al. 2025",
)
_add(
    "sparse-average",
    "Sparse pre-training, average parameters",
    "E + A / average_params**alpha + B / tokens**beta",
    _CHINCHILLA,
    ("average_params", "tokens"),
    r"L = E + A/\bar N^{\alpha} + B/D^{\beta},\; \bar N = \frac1D\int_0^D N(t)\,dt",
    "Jin et al. 2025, eq. 3",
)
_add(
    "sparse",
    "Sparse models",
    "(aS * (1 - sparsity)**bS + cS) * params**(-bN) + (aD / tokens)**bD + E",
    (
        _floor(),
        _scale("aS", "worth of dense weights", (1e-1, 1e4)),
        _exponent("bS", "sparsity exponent"),
        _scale("cS", "sparse limit", (1e-1, 1e4)),
        _exponent("bN", "model exponent"),
        _scale("aD", "data scale", (1e3, 1e12)),
        _exponent("bD", "data exponent"),
    ),
    ("params", "tokens", "sparsity"),
    r"L = (a_S(1-S)^{b_S}+c_S) N^{-b_N} + (a_D/D)^{b_D} + c",
    "Frantar et al. 2023, eq. 1 (N: non-zero parameters)",
)
_add(
    "step-law-lr",
    "Step law, learning rate",
    "c * params**(-x) * tokens**y",
    (
        _scale("c", "size", (1e-4, 1e4)),
        Parameter("x", "falls with parameters", (0.0, 1.5), low=-3, high=3),
        Parameter("y", "grows with tokens", (0.0, 1.0), low=-3, high=3),
    ),
    ("params", "tokens"),
    r"\eta = c N^{-x} D^{y}",
    "Li et al. 2025, eq. 1",
    target="learning_rate",
)
_add(
    "step-law-batch",
    "Step law, batch size",
    "c * tokens**y",
    (_scale("c", "size", (1e-4, 1e4)), Parameter("y", "grows with tokens", (0.0, 1.5), low=-3, high=3)),
    ("tokens",),
    r"B = c D^{y}",
    "Li et al. 2025, eq. 1",
    target="batch_tokens",
)
_add(
    "critical-batch",
    "Steps against batch size",
    "smin + emin / batch_size",
    (
        _scale("smin", "steps at an infinite batch", (1.0, 1e7)),
        _scale("emin", "examples at the smallest batch", (1e2, 1e12)),
    ),
    ("batch_size",),
    r"S = S_{\min} + E_{\min}/B",
    "McCandlish et al. 2018, eq. 2.11; Zhang et al. 2024",
    target="steps",
)
_add(
    "critical-batch-loss",
    "Critical batch against loss",
    "Bstar / loss**(1 / alpha_b)",
    (_scale("Bstar", "size", (1e2, 1e12)), Parameter("alpha_b", "exponent", (0.05, 1.0), low=1e-2, high=5.0)),
    ("loss",),
    r"B_{\mathrm{crit}} = B_* / L^{1/\alpha_B}",
    "Kaplan et al. 2020, eq. 5.3",
    target="batch_tokens",
)
_add(
    "log-time",
    "Ultra-slow diffusion",
    "a + b * log(step)",
    (
        Parameter("a", "distance after one step", (-10.0, 10.0)),
        Parameter("b", "distance per e-fold of steps", (0.0, 10.0)),
    ),
    ("step",),
    r"\lVert w_t - w_0\rVert = a + b \ln t",
    "Hoffer et al. 2017, sec. 4",
    target="distance",
    positive=False,
)
_add(
    "power-time",
    "Power-law diffusion",
    "a * step**b",
    (_scale("a", "distance after one step", (1e-3, 1e3)), _exponent("b", "exponent", (0.01, 1.0))),
    ("step",),
    r"\lVert w_t - w_0\rVert = a t^{b}",
    "alternative to log-time; Hoffer et al. 2017",
    target="distance",
    positive=False,
)
_add(
    "loss-time",
    "Loss against steps",
    "E + c / step**g",
    (_floor(), _scale("c", "size", (1e-2, 1e4)), _exponent("g", "exponent")),
    ("step",),
    r"L(t) = E + c\,t^{-g}",
    "Komatsuzaki 2019",
)
_add(
    "ensemble",
    "Ensemble members",
    "E + A / members**alpha",
    (_floor(), _scale("A", "single-model excess", (1e-3, 10.0)), _exponent("alpha", "exponent", (0.2, 2.0))),
    ("members",),
    r"L(K) = E_K + A K^{-\alpha}",
    "Kim et al. 2025",
)


def law(name: str) -> Law:
    """The law called `name`; formula text (anything with an operator) makes a new one.
    BadInput with a close match otherwise.
    """
    if name in LAWS:
        return LAWS[name]
    if any(sign in name for sign in "+*/()="):
        return Law.from_formula(name)
    close = difflib.get_close_matches(name, LAWS, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadInput(
        f"law: {name!r} is unknown; {hint}known: {', '.join(LAWS)}; "
        "or give a formula such as 'E + A/params**alpha'"
    )
