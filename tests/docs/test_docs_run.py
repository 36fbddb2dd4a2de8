"""Every block of code on the pages runs as it stands there, page by page, on the smallest subjects."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, new_cache
from workbench import cli
from workbench.axis import AXES, Entry, axes
from workbench.families import PLUGINS

PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["reason"])
        for m in FENCE.finditer(text)
    ]


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_cache(tmp_path_factory.mktemp("docs") / "cache")


def forget(before: Mapping[str, Mapping[str, Entry]]) -> None:
    """Take off what the blocks of a page registered."""
    for kind, entries in before.items():
        AXES[kind].entries.clear()
        AXES[kind].entries.update(entries)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(
    page: Path,
    one_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(one_cache))
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.chdir(tmp_path)
    before = {kind: dict(home.entries) for kind, home in axes().items()}
    request.addfinalizer(lambda: forget(before))
    names: dict[str, object] = {"__name__": f"docs_{page.stem}"}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        elif block.language == "console":
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    program, *arguments = shlex.split(line[2:])
                    assert program == "workbench", f"{page.name}:{block.line}: {line}"
                    assert cli.main(arguments) == 0, f"{page.name}:{block.line}: {line}"
        else:
            raise AssertionError(
                f"{page.name}:{block.line}: {block.language!r} is neither python nor console"
            )


def test_every_page_of_a_task_has_blocks_that_run() -> None:
    tasks = {
        "index",
        "shrink-a-model",
        "plan-a-run",
        "find-a-learning-rate",
        "compare-methods",
        "read-a-spectrum",
        "add-a-method",
    }
    run = {page.stem for page in PAGES if any(block.reason is None for block in blocks(page))}
    assert tasks <= run
