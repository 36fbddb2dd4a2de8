"""Laws of the precision that a model is trained or stored in."""

from __future__ import annotations

from workbench.axis import Options
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law
from workbench.scaling.formulas.parameters import CHINCHILLA, exponent, floor, predicts, scale

PRECISION = """
weights = 1 - exp(-bits / gw)
activations = 1 - exp(-activation_bits / ga)
cache = 1 - exp(-kv_bits / gkv)
A / (params * weights * activations * cache)**alpha + B / tokens**beta + E
"""

QAT = """
perbyte = 1 / (params * bits / 8)
sfp = max(tokens * (1 - qat_fraction) * perbyte, 1e-9)
sqat = max(tokens * qat_fraction * perbyte, 1e-9)
damage = theta * 2**(-kappa * bits) + phi * 2**(-chi * bits) / (params**psi * sqat**omega)
E + A / params**alpha + B / tokens**beta + damage + lam * 2**(-mu * bits) / (params**nu * sfp**xi * sqat**rho)
"""


@LAW.add(
    "precision",
    title="Training precision",
    formula=r"N_{\mathrm{eff}} = N\prod_x (1 - e^{-P_x/\gamma_x})",
    source="Kumar et al. 2024, eqs. 3-6",
)
def precision(options: Options) -> Law:
    return predicts(
        PRECISION,
        (
            *CHINCHILLA,
            scale("gw", "bits scale of weights", (0.5, 8.0)),
            scale("ga", "bits scale of activations", (0.5, 8.0)),
            scale("gkv", "bits scale of the key-value cache", (0.5, 8.0)),
        ),
        ("params", "tokens", "bits", "activation_bits", "kv_bits"),
    )


@LAW.add(
    "weight-precision",
    title="Weight precision",
    formula=r"N_{\mathrm{eff}} = N (1 - e^{-P_w/\gamma_w})",
    source="Kumar et al. 2024, eq. 3",
)
def weight_precision(options: Options) -> Law:
    return predicts(
        "A / (params * (1 - exp(-bits / gw)))**alpha + B / tokens**beta + E",
        (*CHINCHILLA, scale("gw", "bits scale of weights", (0.5, 8.0))),
        ("params", "tokens", "bits"),
    )


@LAW.add(
    "post-training-precision",
    title="Post-training quantization damage",
    formula=r"\delta = C_T \frac{D^{\gamma_D}}{N^{\gamma_N}} e^{-P/\gamma}",
    source="Kumar et al. 2024, eq. 2",
)
def post_training_precision(options: Options) -> Law:
    return predicts(
        "CT * tokens**gd / params**gn * exp(-post_bits / gp)",
        (
            scale("CT", "size", (1e-6, 1e6)),
            exponent("gd", "grows with tokens", (0.0, 1.5)),
            exponent("gn", "falls with parameters", (0.0, 1.5)),
            scale("gp", "bits scale", (0.1, 4.0)),
        ),
        ("params", "tokens", "post_bits"),
        target="loss_increase",
    )


@LAW.add(
    "mixed-quantization",
    title="Post-training quantization of a share of the parameters",
    formula=r"\delta = C \frac{Q_r^{a} Q_b^{b}}{N^{\gamma_N}}",
    source="Cao et al. 2024 (size and ratio multiply; powers are this project's choice)",
)
def mixed_quantization(options: Options) -> Law:
    return predicts(
        "C * quantized_share**a * block_size**b / params**gn",
        (
            scale("C", "size", (1e-6, 1e6)),
            exponent("a", "grows with the share that is quantized", (0.2, 3.0)),
            exponent("b", "grows with the values that share a scale", (0.0, 1.5)),
            exponent("gn", "falls with parameters", (0.0, 1.5)),
        ),
        ("params", "quantized_share", "block_size"),
        target="loss_increase",
    )


@LAW.add(
    "float-precision",
    title="Floating-point training",
    formula=(
        r"L = \frac{n}{N^\alpha}+\frac{d}{D^\beta}+\epsilon+\frac{D^\beta}{N^\alpha}\frac{\log_2 "
        r"B}{\gamma(E+.5)^\delta(M+.5)^\nu}"
    ),
    source="Sun et al. 2025, eq. 2",
)
def float_precision(options: Options) -> Law:
    return predicts(
        (
            "n / params**alpha + d / tokens**beta + E + tokens**beta / params**alpha * log2(block_size)"
            " / (gamma * (exponent_bits + 0.5)**delta * (mantissa_bits + 0.5)**nu)"
        ),
        (
            floor(),
            scale("n", "model term"),
            scale("d", "data term"),
            CHINCHILLA[3],
            CHINCHILLA[4],
            scale("gamma", "tolerance", (1.0, 1e8)),
            exponent("delta", "worth of an exponent bit", (0.5, 4.0)),
            exponent("nu", "worth of a mantissa bit", (0.5, 4.0)),
        ),
        ("params", "tokens", "exponent_bits", "mantissa_bits", "block_size"),
    )


@LAW.add(
    "quantization-aware",
    title="Quantization-aware training split",
    formula=r"L = L_{N,D} + \delta(N, D_{qat}, D_{fp}, B)",
    source="Dremov et al. 2025",
)
def quantization_aware(options: Options) -> Law:
    return predicts(
        QAT,
        (
            *CHINCHILLA,
            scale("theta", "floor of the damage", (1e-3, 10.0)),
            exponent("kappa", "per bit", (0.1, 3.0)),
            scale("phi", "damage left to QAT", (1e-3, 1e3)),
            exponent("chi", "per bit", (0.1, 3.0)),
            exponent("psi", "with size", (0.0, 0.5)),
            exponent("omega", "with QAT tokens", (0.05, 1.0)),
            scale("lam", "interaction", (1e-3, 1e3)),
            exponent("mu", "per bit", (0.1, 3.0)),
            exponent("nu", "with size", (0.0, 0.5)),
            exponent("xi", "with full-precision tokens", (0.05, 1.0)),
            exponent("rho", "with QAT tokens", (0.05, 1.0)),
        ),
        ("params", "tokens", "bits", "qat_fraction"),
    )
