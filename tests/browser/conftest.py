"""Every test in this folder drives Chromium; without one they are skipped, saying so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (extra 'test'): no browser tests"
)

from tests.browser.lab import CHROMIUM, Watched, browse  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                item.add_marker(
                    pytest.mark.skip(
                        reason="no Chromium on this machine: run tests/browser/install_chromium.sh as root"
                    )
                )


@pytest.fixture()
def watched() -> Iterator[Watched]:
    """A page that must end its test without errors and without having asked anything of another machine."""
    with browse() as found:
        yield found
        assert not found.outside, found.outside
        assert not found.errors, found.errors
