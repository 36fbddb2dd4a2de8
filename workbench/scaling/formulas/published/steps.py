"""Laws of steps, batch sizes and learning rates."""

from __future__ import annotations

from workbench.axis import Options
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.formulas.parameters import CHINCHILLA, exponent, floor, predicts, scale

RATE_SURFACE = """
rate = log(learning_rate / (c * params**(-x) * tokens**y))
batch = log(batch_tokens / (k * tokens**z))
E + A / params**alpha + B / tokens**beta + h * rate**2 + g * batch**2
"""


@LAW.add(
    "step-law-lr",
    title="Step law, learning rate",
    formula=r"\eta = c N^{-x} D^{y}",
    source="Li et al. 2025, eq. 1",
)
def step_law_lr(options: Options) -> Law:
    return predicts(
        "c * params**(-x) * tokens**y",
        (
            scale("c", "size", (1e-4, 1e4)),
            Parameter("x", "falls with parameters", (0.0, 1.5), low=-3, high=3),
            Parameter("y", "grows with tokens", (0.0, 1.0), low=-3, high=3),
        ),
        ("params", "tokens"),
        target="learning_rate",
    )


@LAW.add(
    "step-law-batch",
    title="Step law, batch size",
    formula=r"B = c D^{y}",
    source="Li et al. 2025, eq. 1",
)
def step_law_batch(options: Options) -> Law:
    return predicts(
        "c * tokens**y",
        (scale("c", "size", (1e-4, 1e4)), Parameter("y", "grows with tokens", (0.0, 1.5), low=-3, high=3)),
        ("tokens",),
        target="batch_tokens",
    )


@LAW.add(
    "batch-hyperbola",
    title="Steps against batch size",
    formula=r"S = S_{\min} + E_{\min}/B",
    source="McCandlish et al. 2018, eq. 2.11; Zhang et al. 2024",
)
def batch_hyperbola(options: Options) -> Law:
    return predicts(
        "smin + emin / batch_size",
        (
            scale("smin", "steps at an infinite batch", (1.0, 1e7)),
            scale("emin", "examples at the smallest batch", (1e2, 1e12)),
        ),
        ("batch_size",),
        target="steps",
    )


@LAW.add(
    "critical-batch-loss",
    title="Critical batch against loss",
    formula=r"B_{\mathrm{crit}} = B_* / L^{1/\alpha_B}",
    source="Kaplan et al. 2020, eq. 5.3",
)
def critical_batch_loss(options: Options) -> Law:
    return predicts(
        "Bstar / loss**(1 / alpha_b)",
        (
            scale("Bstar", "size", (1e2, 1e12)),
            Parameter("alpha_b", "exponent", (0.05, 1.0), low=1e-2, high=5.0),
        ),
        ("loss",),
        target="batch_tokens",
    )


@LAW.add(
    "loss-time",
    title="Loss against steps",
    formula=r"L(t) = E + c\,t^{-g}",
    source="Komatsuzaki 2019",
)
def loss_time(options: Options) -> Law:
    return predicts(
        "E + c / step**g",
        (floor(), scale("c", "size", (1e-2, 1e4)), exponent("g", "exponent")),
        ("step",),
    )


@LAW.add(
    "log-time",
    title="Ultra-slow diffusion",
    formula=r"\lVert w_t - w_0\rVert = a + b \ln t",
    source="Hoffer et al. 2017, sec. 4",
)
def log_time(options: Options) -> Law:
    return predicts(
        "a + b * log(step)",
        (
            Parameter("a", "distance after one step", (-10.0, 10.0)),
            Parameter("b", "distance per e-fold of steps", (0.0, 10.0)),
        ),
        ("step",),
        target="distance",
        positive=False,
    )


@LAW.add(
    "power-time",
    title="Power-law diffusion",
    formula=r"\lVert w_t - w_0\rVert = a t^{b}",
    source="alternative to log-time; Hoffer et al. 2017",
)
def power_time(options: Options) -> Law:
    return predicts(
        "a * step**b",
        (scale("a", "distance after one step", (1e-3, 1e3)), exponent("b", "exponent", (0.01, 1.0))),
        ("step",),
        target="distance",
        positive=False,
    )


@LAW.add(
    "rate-surface",
    title="Loss over learning rate and batch size",
    formula=(
        r"L = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta} + h\ln^2\frac{\eta}{cN^{-x}D^{y}} "
        r"+ g\ln^2\frac{b}{kD^{z}}"
    ),
    source="Li et al. 2025, eq. 1 (where the best ones lie; the bowls are this project's choice)",
)
def rate_surface(options: Options) -> Law:
    return predicts(
        RATE_SURFACE,
        (
            *CHINCHILLA,
            scale("h", "curvature in the learning rate", (1e-4, 1.0)),
            scale("c", "size of the best rate", (1e-4, 1e4)),
            Parameter("x", "best rate falls with parameters", (0.0, 1.5), low=-3, high=3),
            Parameter("y", "best rate grows with tokens", (0.0, 1.0), low=-3, high=3),
            scale("g", "curvature in the batch size", (1e-4, 1.0)),
            scale("k", "size of the best batch", (1e-4, 1e4)),
            Parameter("z", "best batch grows with tokens", (0.0, 1.5), low=-3, high=3),
        ),
        ("params", "tokens", "learning_rate", "batch_tokens"),
    )
