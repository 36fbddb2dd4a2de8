"""The stored index says what the registries say, and reading it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from workbench.axis import parameter
from workbench.field_text import bounds_text


def test_the_stored_index_is_what_is_registered() -> None:
    code = "from workbench import index; import sys; sys.exit(index.text() != index.FILE.read_text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"run `python -m workbench.index` and commit the file\n{done.stderr}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["run", "quantize", "--help"], ["run", "prune", "--help"]]
)
def test_help_imports_neither_torch_nor_pandas(arguments: list[str]) -> None:
    code = (
        "import sys; from workbench.cli import main; "
        f"done = main({arguments!r}); "
        "heavy = {'torch', 'pandas', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if done or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ge(" not in done.stdout and "Lt(" not in done.stdout


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"ge": 0, "lt": 1}, "0 <= x < 1"),
        ({"gt": 0}, "x > 0"),
        ({"ge": 1}, "x >= 1"),
        ({"le": 0.5}, "x <= 0.5"),
        ({}, ""),
        ({"multiple_of": 8, "ge": 8}, "x >= 8; a multiple of 8"),
    ],
)
def test_bounds_are_written_as_people_do(bounds: dict[str, float], text: str) -> None:
    assert bounds_text(_field(bounds)) == text


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("^(gradient|random)$", "gradient or random"), (r"^(auto|cpu|cuda(:\d+)?)$", "")],
)
def test_words_that_a_text_may_be_are_named(pattern: str, text: str) -> None:
    from pydantic import create_model

    made = create_model("Holder", value=(str, parameter("", "", pattern=pattern)))
    assert bounds_text(made.model_fields["value"]) == text


def _field(bounds: dict[str, float]) -> object:
    from pydantic import create_model

    return create_model("Holder", value=(float, parameter(0.25, "", **bounds))).model_fields["value"]
