"""Laws of the shares that domains have in the training data. A law predicts one loss; for the losses of
several domains it is fitted to each (`columns="loss=loss_domain_2"`).
"""

from __future__ import annotations

from workbench.axis import Options, parameter
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law, Parameter
from workbench.scaling.formulas.parameters import exponent, floor, predicts, scale


class Domains(Options):
    domains: int = parameter(
        5, "how many; their shares are the columns proportion_1, proportion_2, ...", ge=2, le=40
    )


def _shares(options: Domains) -> list[str]:
    return [f"proportion_{i + 1}" for i in range(options.domains)]


@LAW.add(
    "data-mixing",
    title="Data mixing",
    formula=r"L = c + k\,\exp\Big(\sum_j t_j r_j\Big),\; \sum_j r_j = 1",
    source="Ye et al. 2024 (k is in the t: shares sum to one)",
    options=Domains,
)
def data_mixing(options: Domains) -> Law:
    shares = _shares(options)
    inner = " + ".join(f"t{i + 1} * {name}" for i, name in enumerate(shares))
    worth = [
        Parameter(f"t{i + 1}", f"worth of domain {i + 1}", (-4.0, 2.0), low=-100, high=100)
        for i in range(options.domains)
    ]
    return predicts(f"c + exp({inner})", (floor("c"), *worth), tuple(shares))


@LAW.add(
    "domain-sum",
    title="Domains that add up",
    formula=r"L = E + \Big(\sum_j C_j r_j^{\gamma_j}\Big)^{-1}",
    source="Shukor et al. 2025 (at one size and token count)",
    options=Domains,
)
def domain_sum(options: Domains) -> Law:
    shares = _shares(options)
    inner = " + ".join(f"C{i + 1} * {name}**g{i + 1}" for i, name in enumerate(shares))
    unknown = [
        unknown
        for i in range(options.domains)
        for unknown in (
            scale(f"C{i + 1}", f"worth of domain {i + 1}", (1e-2, 10.0)),
            exponent(f"g{i + 1}", f"how it saturates with the share of domain {i + 1}", (0.05, 1.5)),
        )
    ]
    return predicts(f"E + 1 / ({inner})", (floor(), *unknown), tuple(shares))
