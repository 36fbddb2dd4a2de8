"""The book of laws: an axis whose entries make a law each. Those that ship are in `published/`; your own
stands beside them:

    @LAW.add("mine", formula="E + A / N^alpha", source="a notebook, 2026")
    def mine(options: Options) -> Law:
        return Law.from_formula("E + A / params**alpha")

    ScalingFit(law="mine")
    ScalingFit(law="E + A / params**alpha")      # a formula needs no name
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.axis import Axis, Choice, warn
from workbench.scaling.formulas.laws import Law

#: Laws that had another name one release ago, when an instrument had it too.
RENAMED = {"critical-batch": "batch-hyperbola"}


def _formula(given: str) -> Mapping[str, Any] | None:
    """Anything with an operator is a formula."""
    if given in RENAMED:
        warn(f"law: {given} is called {RENAMED[given]} now; the old name goes with the next release")
        return {"name": RENAMED[given]}
    return {"name": "formula", "text": given} if any(sign in given for sign in "+*/()=") else None


LAW = Axis(
    "scaling-law",
    "a law by name or a formula of columns such as 'E + A/params**alpha'",
    found_in="workbench.scaling.formulas.published",
    shorthand=_formula,
    home="scaling-fit.law",
)


def law(given: str | Choice) -> Law:
    """The law called so; a text with an operator is the formula of a new one.
    BadInput with a close match otherwise.
    """
    choice = LAW.chosen(given, "law")
    made: Law = choice()
    if choice.has("unnamed"):
        return made
    entry = choice.entry
    return replace(made, name=entry.name, title=entry.title, source=entry.source, latex=entry.formula)


def laws() -> dict[str, Law]:
    """Every law that has a name, a user's own included."""
    return {name: law(name) for name in LAW if "unnamed" not in LAW[name].traits}
