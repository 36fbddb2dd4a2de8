"""Unknowns that many laws share. Parameter counts and tokens enter in raw units (not millions),
as in the papers, unless a law says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from workbench.scaling.formulas.laws import Law, Parameter


def floor(
    name: str = "E", meaning: str = "loss of an infinitely large, infinitely trained model"
) -> Parameter:
    return Parameter(name, meaning, start=(0.3, 3.0), scale="log", unit="nats per token")


def scale(name: str, meaning: str, start: tuple[float, float] = (1e-2, 1e8)) -> Parameter:
    return Parameter(name, meaning, start=start, scale="log")


def exponent(
    name: str, meaning: str, start: tuple[float, float] = (0.05, 1.2), high: float = 5.0
) -> Parameter:
    return Parameter(name, meaning, start=start, low=0.0, high=high)


CHINCHILLA = (
    floor(),
    scale("A", "size of the finite-model term"),
    scale("B", "size of the finite-data term"),
    exponent("alpha", "how fast more parameters help"),
    exponent("beta", "how fast more tokens help"),
)


def predicts(
    formula: str,
    parameters: tuple[Parameter, ...],
    columns: tuple[str, ...],
    target: str = "loss",
    positive: bool = True,
    published: Mapping[str, tuple[float, float]] | None = None,
) -> Law:
    """A law that its entry names."""
    return Law("", formula, parameters, columns, target, positive=positive, published=published or {})
