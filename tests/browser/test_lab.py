"""A person's first minutes in a real JupyterLab: the launcher, the index, a panel moved, run, stopped,
broken and mended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_notebook, run_all, serve_cells, set_theme

ROOT = Path(__file__).parent.parent.parent
PANEL = """\
import widgets, workbench
from workbench.curvature import Spectrum
widgets.panel(Spectrum, workbench.subject("digits-vit"), probes=2, steps=6, examples=32)"""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(
        tmp_path_factory, {"panel": PANEL}, {"JUPYTER_PATH": str(ROOT / "share" / "jupyter")}
    ) as found:
        shutil.copy(ROOT / "notebooks" / "index.ipynb", found.root)
        yield found


def revision(page: Page) -> int:
    return int(page.evaluate("() => document.querySelector('.wb-plot').dataset.revision ?? '0'"))


def wait_for_revision_after(page: Page, before: int) -> None:
    page.wait_for_function(f"() => +document.querySelector('.wb-plot').dataset.revision > {before}")


def press(page: Page, field: str, key: str, times: int) -> None:
    page.locator(f".wb-field-{field} .noUi-handle").focus()
    for _ in range(times):
        page.keyboard.press(key)


def curve(page: Page) -> list[float]:
    return page.evaluate(
        "() => [...(document.querySelector('.wb-plot-figure')._fullData.find((t) => t.name)?.y ?? "
        "[])].slice(0, 50)"
    )


def test_panel_moves_runs_stops_and_explains(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_notebook(page, lab, "panel.ipynb")
    run_all(page)
    panel = page.locator(".wb-panel")
    note = panel.locator(".wb-job .wb-note")
    run, stop = (
        panel.get_by_role("button", name="Run", exact=True),
        panel.get_by_role("button", name="Stop", exact=True),
    )
    expect(panel.get_by_role("heading", name="spectrum on digits-vit")).to_be_visible()
    expect(page.locator(".wb-plot").first).to_be_hidden()  # no empty axes before there is a result

    run.click()
    expect(note).to_have_text(re.compile("done after"))
    expect(page.locator(".wb-plot-figure .main-svg").first).to_be_visible()
    first = curve(page)
    assert len(first) > 10

    # a setting by keyboard, then a second run: another curve
    press(page, "steps", "ArrowRight", 4)
    expect(panel.locator(".wb-field-steps .widget-readout")).to_have_text("10")
    before = revision(page)
    run.click()
    wait_for_revision_after(page, before)
    expect(note).to_have_text(re.compile("done after"))
    assert curve(page) != first

    # a setting of the view redraws the result there is
    before, traces = revision(page), "document.querySelector('.wb-plot-figure')._fullData.map((t) => t.name)"
    assert not any("at B=" in name for name in page.evaluate(f"() => {traces}"))
    press(page, "batch", "ArrowLeft", 3)
    wait_for_revision_after(page, before)
    page.wait_for_function(f"() => {traces}.some((name) => name.includes('at B=4'))")

    # compared with the first run
    before = revision(page)
    panel.get_by_label("Compare with").select_option(index=1)
    wait_for_revision_after(page, before)
    expect(panel.get_by_role("rowheader", name="steps", exact=True)).to_be_visible()

    # long enough to be stopped; drawn while it runs
    press(page, "steps", "End", 1)
    press(page, "probes", "End", 1)
    before = revision(page)
    run.click()
    expect(stop).to_be_enabled()
    wait_for_revision_after(page, before)
    stop.click()
    expect(note).to_have_text(re.compile("stopped, kept what was there"))
    expect(run).to_be_enabled()
    assert len(curve(page)) > 10

    # an error in words, no traceback anywhere in the notebook
    text = panel.get_by_label("layers", exact=True)
    text.fill("no.such.layer")
    text.press("Enter")
    expect(note.get_by_role("alert")).to_contain_text("no.such.layer")  # before anybody runs it
    assert (
        page.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], "
            ".jp-OutputArea-output pre:has-text('Traceback')"
        ).count()
        == 0
    )


def test_panel_follows_theme_and_width_and_names_its_controls(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_notebook(page, lab, "panel.ipynb")
    run_all(page)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".wb-plot-figure .main-svg").first).to_be_visible()
    ink = "document.querySelector('.wb-plot-figure')._fullLayout.font.color"
    light = page.evaluate(f"() => {ink}")
    set_theme(page, "JupyterLab Dark")
    page.wait_for_function(f"() => {ink} !== '{light}'")
    set_theme(page, "JupyterLab Light")
    page.set_viewport_size({"width": 640, "height": 900})
    page.wait_for_function("() => document.querySelector('.wb-plot-figure')._fullLayout.width < 620")
    assert page.evaluate(
        "() => { const p = document.querySelector('.wb-panel'); return p.scrollWidth <= p.clientWidth + 1 }"
    )
    # every control has a name a screen reader finds
    unnamed = page.evaluate("""() => [...document.querySelectorAll('.wb-panel input, .wb-panel select, \
.wb-panel button')]
        .filter((e) => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') \
|| e.textContent.trim() || e.title)).length""")
    assert unnamed == 0


def test_index_lists_everything_and_opens_a_panel(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_notebook(page, lab, "index.ipynb")
    run_all(page)
    expect(page.get_by_role("link", name="compress", exact=True)).to_be_visible()
    for name in ("spectrum", "prune", "quantize", "latency"):
        expect(
            page.locator(".jp-RenderedHTMLCommon code", has_text=re.compile(f"^{name}$")).first
        ).to_be_attached()
    bench = page.locator(".wb-bench")
    bench.get_by_label("instrument", exact=True).select_option(label="quantize")
    bench.get_by_role("button", name="Open").click()
    expect(bench.get_by_role("heading", name="quantize on digits-vit")).to_be_visible()


def test_launcher_has_a_card_that_opens_the_index(lab: Lab, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{lab.url}/lab?token={lab.token}&reset")
    page.locator(".jp-LauncherCard", has_text="Model workbench").click()
    expect(page.locator(".jp-NotebookPanel")).to_be_visible()
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.path === 'index.ipynb'")
