"""What a scaling report concludes: whether the fit holds, what it plans, and what it does not know.

short = conclusion(fitted, planned)
short.warning       # "" when the fit converged
short.sentences; short.table
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbench.results import Result
from workbench.scaling.figures import short

#: What a plan is made of, in the order that it is read.
QUANTITIES = {
    "params": "parameters",
    "tokens": "training tokens",
    "tokens_per_param": "tokens a parameter",
    "loss": "loss of such a run",
}


@dataclass(frozen=True)
class Conclusion:
    """warning : why nothing should be planned with this fit, and what to do; "" when it converged
    sentences : what the numbers say;  table : the plan with its intervals, empty without one
    """

    warning: str
    sentences: tuple[str, ...]
    table: pd.DataFrame

    def _repr_html_(self) -> str:
        alert = f'<p class="failure" role="alert">{html.escape(self.warning)}</p>' if self.warning else ""
        said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        plan = self.table.to_html(border=0, escape=True) if len(self.table) else ""
        return alert + said + plan


def doubt_of(facts: Mapping[str, Any], other: str = "") -> str:
    """A sentence for a fit that did not converge, with what to do; "" for one that did.

    other : the law that predicts larger runs better, where one is known
    """
    if facts.get("converged", True):
        return ""
    undone = str(facts["certificate"]).removeprefix("NOT converged").lstrip(": ")
    then = f"fit {other} instead" if other else "fit a law with fewer parameters, such as kaplan"
    return (
        f"This fit did not converge ({undone}). Its parameters are not determined by these runs, and a plan "
        f"made with it is not to be believed: {then}, or add runs of other sizes."
    )


def better_law(fitted: Result) -> tuple[str, float, float] | None:
    """The other law of the comparison that predicts held-out larger runs best, with its error and that of
    the fitted one; None where the fitted one is best.
    """
    table = fitted.tables.get("comparison")
    mine = str(fitted.facts["law"])
    if table is None or mine not in set(table["law"]):
        return None
    errors = table.set_index("law")["held_out_error"].dropna()
    converged = [
        n for n, text in zip(table["law"], table["certificate"], strict=True) if "NOT" not in str(text)
    ]
    others = errors[[name for name in errors.index if name != mine and name in converged]]
    if mine not in errors or not len(others) or others.min() >= errors[mine]:
        return None
    return str(others.idxmin()), float(others.min()), float(errors[mine])


def conclusion(fitted: Result, planned: Result | None = None) -> Conclusion:
    """Three sentences: how well the law fits and predicts, what the budget buys, and what is not known."""
    facts, law = fitted.facts, str(fitted.facts["law"])
    better = better_law(fitted)
    sentences = [
        f"{law} fits {facts['runs']} runs within {100 * float(facts['rmse']):.2g} % (root mean square)"
    ]
    if "extrapolation_error" in facts:
        sentences[0] += (
            f"; fitted below earlier cut-offs of compute it misses the larger runs by "
            f"{100 * float(facts['extrapolation_error']):.2g} % on average"
        )
    sentences[0] += "."
    table = pd.DataFrame()
    if planned is not None:
        p = planned.facts
        size, length = short(float(p["params"])), short(float(p["tokens"]))
        sentences.append(
            f"A budget of {float(p['budget_flops']):.3g} FLOPs, {float(p['beyond_largest_run']):.3g} times "
            f"the largest run, is spent best on {size} parameters ({p['size_means']}) and {length} tokens, "
            f"at a loss of {float(p['loss']):.4g}."
        )
        table = plan_table(planned)
    if better is not None:
        name, error, mine = better
        sentences.append(
            f"{name} predicts held-out larger runs better: {100 * error:.2g} % against {100 * mine:.2g} %."
        )
    elif facts.get("note"):
        sentences.append(f"Not known: {facts['note']}.")
    return Conclusion(doubt_of(facts, better[0] if better else ""), tuple(sentences), table)


def plan_table(planned: Result) -> pd.DataFrame:
    """Estimate and interval of each quantity, as people write such numbers."""
    rows = planned.table.set_index("quantity")
    found = {}
    for name, words in QUANTITIES.items():
        if name in rows.index:
            row = rows.loc[name].to_dict()
            found[words] = {c: short(float(row[c])) for c in ("estimate", "low", "high")}
    return pd.DataFrame.from_dict(found, orient="index")
