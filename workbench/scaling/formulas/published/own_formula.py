"""A law that is only a formula."""

from __future__ import annotations

from workbench.axis import Options, parameter
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law


class Formula(Options):
    text: str = parameter(
        "E + A/params**alpha",
        "columns of the runs and, under any other name, parameters to fit",
        min_length=1,
    )


@LAW.add(
    "formula",
    title="A formula of your own",
    formula="the text",
    source="",
    options=Formula,
    traits="unnamed",
    spelled=lambda options: options.text,
)
def formula(options: Formula) -> Law:
    return Law.from_formula(options.text)
