"""What a package's `__init__` imports from the project it publishes, by name; and its annotations count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = sorted(file for root in ("workbench", "widgets") for file in (ROOT / root).rglob("__init__.py"))


@pytest.mark.parametrize("file", PACKAGES, ids=lambda file: ".".join(file.relative_to(ROOT).parent.parts))
def test_re_exports_are_explicit(file: Path) -> None:
    imported: set[str] = set()
    published: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("workbench", "widgets"):
            imported |= {item.asname or item.name for item in node.names}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            published = set(ast.literal_eval(node.value))
    assert imported <= published, f"not in __all__: {sorted(imported - published)}"


@pytest.mark.parametrize("package", ["workbench", "widgets"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
