"""The rooms of the package: no circles of imports, no crowded folders,
nothing below that imports what is above.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("workbench", "widgets")
CROWDED = 20


def module(file: Path) -> str:
    """`workbench/pruning/__init__.py` -> `workbench.pruning`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of the project that it imports anywhere:
    at the top, in a function, for types only.
    """
    found: dict[str, set[str]] = {}
    for name, file in FILES.items():
        reached: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                reached |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    reached.add(full if full in FILES else str(node.module))
        found[name] = (reached & FILES.keys()) - {name}
    return found


def left_in_circles(edges: dict[str, set[str]]) -> set[str]:
    """What remains when modules that import nothing remaining, or that nothing remaining imports,
    are taken away again and again.
    """
    left = {name: set(reached) for name, reached in edges.items()}
    while True:
        imported = set().union(*left.values())
        gone = {name for name, reached in left.items() if not reached or name not in imported}
        if not gone:
            return set(left)
        left = {name: reached - gone for name, reached in left.items() if name not in gone}


def test_what_is_left_in_circles_is_found():
    assert left_in_circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert left_in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}


def test_no_two_files_import_each_other():
    assert len(FILES) > 200
    assert left_in_circles(imports()) == set()


def test_no_folder_is_crowded():
    folders = {file.parent for file in FILES.values()}
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if (count := len(list(folder.glob("*.py")))) > CROWDED
    }
    assert crowded == {}


def test_nothing_below_imports_evidence_or_widgets():
    for name, reached in imports().items():
        top = name.split(".")[0]
        if top == "workbench":
            assert not [r for r in reached if r.split(".")[0] == "widgets"], name
        if name != "workbench.commands.evidence" and not name.startswith("workbench.evidence"):
            assert not [r for r in reached if r.startswith("workbench.evidence")], name


def test_an_instrument_lives_in_the_file_of_its_command():
    import workbench

    for name, cls in workbench.catalog().items():
        if cls.__module__.startswith("workbench."):
            assert cls.__module__.rsplit(".", 1)[1] == name.replace("-", "_"), cls
