"""The report of one curvature instrument on every stock class:
the notebook's own cells, run here instead of in a kernel.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ARCHITECTURES
from tests.curvature.test_instruments import SMALL
from workbench import reports
from workbench.errors import BadInput
from workbench.names import find


def run_cells(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The notebook's variables after its code cells ran with these parameters,
    and under `shown` what they display.
    """
    names: dict[str, Any] = {
        key: declared.default for key, declared in reports.parameters_of(name).items()
    } | reports.check(name, parameters)
    for cell in nbformat.read(reports.find(name), 4).cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        tree = ast.parse(cell.source)
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if isinstance(shown, ast.Expr):
            names["shown"] = [
                *names.get("shown", []),
                eval(compile(ast.Expression(shown.value), name, "eval"), names),
            ]
    return names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_report_runs_all_four_on_every_stock_class(
    architecture: str, checkpoints: dict[str, Path], cache: Path
) -> None:
    for name, instrument in SMALL.items():
        settings = instrument.model_dump(mode="json", exclude_unset=True)
        done = run_cells(
            "instrument",
            {
                "instrument": name,
                "subject": str(checkpoints[architecture]),
                "data": "random",
                "settings": settings,
            },
        )
        result, (_, figure, shown, stated, provenance) = done["result"], done["shown"]
        assert not result.partial and len(figure.data) and shown is result, name
        assert stated.loc["instrument", "value"] == name and all(
            stated.loc[field, "value"] == str(value) for field, value in settings.items()
        )
        assert result.provenance["fingerprint"] in set(provenance["value"])


def test_data_are_refused_where_the_instrument_works_on_runs() -> None:
    with pytest.raises(BadInput, match="data: the instrument scaling-fit works on runs"):
        reports.reopen(find("scaling-fit"), "runs.csv", data="random")
