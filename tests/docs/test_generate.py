"""What the site says of the code comes from the code: every public name, field,
method and choice has its place.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import BaseModel, Field

import workbench
from tests.conftest import ROOT
from workbench.names import catalog
from workbench.storage import verdict


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


generate = script("generate")
markup = script("markup")
tables = script("registry_tables")
check_links = script("check_links")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("source")
    return folder / "pages", generate.generate(folder)


def test_every_public_name_of_every_package_has_a_page(source: tuple[Path, dict[str, Path]]) -> None:
    _, written = source
    for package in generate.packages():
        module = importlib.import_module(package)
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            page = written[f"{package}.{name}"]
            assert page.is_file() and page.read_text().startswith(f"# {name}\n"), f"{package}.{name}"
    lowered = [str(page).lower() for page in written.values()]
    assert len(set(lowered)) == len(lowered)  # a file system that ignores capitals keeps them apart


def test_no_package_publishes_a_name_outside_the_reference() -> None:
    publishing = {
        ".".join(file.relative_to(ROOT).parent.parts)
        for root in ("workbench", "widgets")
        for file in (ROOT / root).rglob("__init__.py")
        if re.search(r"^__all__", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert publishing == set(generate.packages())


def test_pages_of_instruments_hold_every_field_with_its_default(source: tuple[Path, dict[str, Path]]) -> None:
    _, written = source
    for name, cls in catalog().items():
        page = next((p for key, p in written.items() if key.endswith(f".{cls.__name__}")), None)
        if page is None or cls.__module__.split(".")[0] != "workbench":
            continue
        text = page.read_text()
        assert f"workbench run {name} " in text
        for field, info in cls.parameters().items():
            row = next(line for line in text.splitlines() if line.startswith(f"| `{field}` |"))
            assert row.count(" | ") == 4, row
            assert markup.cell(info.description or "") in row
    prune = written["workbench.pruning.Prune"].read_text()
    assert "| `sparsity` | <code>0.5</code> | <code>float</code>, <code>0 &lt;= x &lt; 1</code> |" in prune


def test_tables_come_from_the_registries(source: tuple[Path, dict[str, Path]]) -> None:
    pages, _ = source
    instruments = (pages / "tables" / "instruments.md").read_text()
    methods = (pages / "tables" / "methods.md").read_text()
    assert all(f"| `{name}` |" in instruments for name in catalog())
    assert all(f"| `{name}`<br>" in methods for name in workbench.methods())
    wanda = next(line for line in methods.splitlines() if line.startswith("| `wanda`<br>"))
    measured = workbench.methods()["wanda"].evidence()
    assert measured is not None and f"{verdict(measured)}, on {measured['subject']} |" in wanda
    assert all(line.count(" | ") == 6 for line in methods.splitlines() if line.startswith("| `"))


def test_registered_axes_become_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damped(BaseModel):
        damp: float = Field(0.01, gt=0, description="share of the mean | diagonal")

    entry = SimpleNamespace(
        name="obs",
        formula=r"\frac{w^2}{H}",
        source="Hassibi 1993",
        needs="inputs",
        traits=frozenset({"rows"}),
        options=Damped,
    )
    monkeypatch.setattr(tables, "axes", lambda: {"saliency": SimpleNamespace(entries={"obs": entry})})
    page = tables.axes_page()
    row = next(line for line in page.splitlines() if line.startswith("| `obs` |"))
    assert "## Saliency" in page and "<mfrac>" in row and row.count(" | ") == 5
    assert "`damp` (<code>0.01</code>): share of the mean &#124; diagonal" in row


def test_docstrings_stay_text_and_code_stays_code() -> None:
    text = (
        "Keeps <b> and a*b*c, `x_y*z`.\n\n    run(1) * 2\n\n>>> 1 + 1\n2\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    shown = markup.prose(text)
    assert "&#60;b> and a&#42;b&#42;c, `x_y*z`." in shown
    assert "```python\nrun(1) * 2\n```" in shown and "```pycon\n>>> 1 + 1\n2\n```" in shown
    assert "| 1 | 2 |" in shown


def test_links_that_lead_nowhere_and_what_is_loaded_from_elsewhere_are_found(tmp_path: Path) -> None:
    good = (
        "<a href='b.html#here'>x</a><a href='https://example.org/a'>y</a><img src='p.png'><a href='#top' "
        "id='top'>z</a>"
    )
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text("<h2 id='here'>h</h2><img src='data:image/png;base64,AA'>")
    (tmp_path / "p.png").write_bytes(b"")
    assert check_links.problems(tmp_path) == []
    bad = [
        "<a href='c.html'>x</a>",
        "<a href='b.html#there'>x</a>",
        "<img src='q.png'>",
        "<a href='https://'>x</a>",
        "<a href='javascript:x'>x</a>",
        "<script src='https://example.org/x.js'></script>",
        "<link rel='stylesheet' href='//example.org/x.css'>",
        "<img src='https://example.org/x.png'>",
        "<pre class='mermaid'>graph</pre>",
    ]
    (tmp_path / "a.html").write_text("".join(bad))
    (tmp_path / "s.css").write_text("@import 'https://example.org/f.css'; a { background: url(p.png) }")
    assert len(check_links.problems(tmp_path)) == len(bad) + 1


def test_links_between_pages_lead_to_pages(source: tuple[Path, dict[str, Path]]) -> None:
    """A page that is renamed, generated ones included, is noticed where it is linked from."""
    pages, _ = source
    lost = []
    for page in pages.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s:]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).is_file():
                lost.append(f"{page.relative_to(pages)}: {target}")
    assert lost == []
