"""Certified nonlinear least squares (NIST StRD), through user-written formula strings."""

import re

import numpy as np
import pytest

from workbench.scaling.fitting import fit
from workbench.scaling.formulas.laws import Law
from workbench.scaling.objective import Objective

MODELS = {
    "Misra1a": "b1*(1-exp(-b2*x))",
    "Misra1b": "b1*(1-(1+b2*x/2)^(-2))",
    "DanWood": "b1*x**b2",
    "Chwirut2": "exp(-b1*x)/(b2+b3*x)",
    "Rat42": "b1/(1+exp(b2-b3*x))",
    "Kirby2": "(b1 + b2*x + b3*x**2)/(1 + b4*x + b5*x**2)",
}


def read(file):
    text = file.read_text()
    rows = re.findall(r"^\s*b(\d+)\s*=\s*(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", text, re.MULTILINE)
    start1, start2, certified = (np.array([float(r[k]) for r in rows]) for k in (1, 2, 3))
    rss = float(re.search(r"Residual Sum of Squares:\s*(\S+)", text).group(1))
    table = [line.split() for line in text[text.rindex("Data:") :].splitlines()[1:] if line.strip()]
    y, x = np.array(table, dtype=float).T
    return start1, start2, certified, rss, x, y


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("problem", MODELS)
def test_certified_digits(shared, problem, start):
    *starts, certified, rss, x, y = read(shared / "data" / "nist_strd" / f"{problem}.dat")
    model = Law.from_formula(MODELS[problem], columns={"x"}, target="y", positive=False)
    assert model.parameter_names == tuple(f"b{i + 1}" for i in range(len(certified)))
    found = fit(model, {"x": x, "y": y}, Objective("squares", "linear"), starts=starts[start][None])
    values = np.array([found.params[n] for n in model.parameter_names])
    digits = -np.log10(np.max(np.abs(values / certified - 1)))
    assert found.certificate.converged
    assert digits >= 6
    assert found.objective_value == pytest.approx(rss, rel=1e-8)


@pytest.mark.parametrize(("problem", "start"), [("Misra1a", [1.0, 50.0]), ("Rat42", [1.0, 500.0, 0.0])])
def test_a_start_that_ends_on_a_plateau_is_reported_not_answered(shared, problem, start):
    """Where the model is flat the gradient vanishes and proves nothing: the fit must say so."""
    *_, rss, x, y = read(shared / "data" / "nist_strd" / f"{problem}.dat")
    model = Law.from_formula(MODELS[problem], columns={"x"}, target="y", positive=False)
    found = fit(model, {"x": x, "y": y}, Objective("squares", "linear"), starts=np.array([start]))
    assert found.objective_value > 10 * rss
    assert not found.certificate.converged
    assert "NOT converged" in found.certificate.text
