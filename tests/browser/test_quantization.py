"""The quantization panels in a real JupyterLab: formats follow the slider, the allocation walks its front,
bars are sorted, filtered and laid over each other.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

import workbench
from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, photograph, serve_cells
from workbench.progress import Progress
from workbench.quantization import Allocate

OPEN = (
    "import widgets, workbench, widgets.quantization\nfrom workbench.quantization import Quantize\n"
    "on = workbench.subject('digits-vit')\n"
)
CELLS = {
    "formats": "widgets.quantization.FormatPanel(on)",
    "allocation": (
        "from workbench.instruments import Result\n"
        "widgets.quantization.AllocationPanel(Result.load('allocated', open_subject=False))"
    ),
    "layers": (
        "widgets.panel(Quantize, on, format='int3', calibration_examples=16, predict_examples=8, "
        "test_examples=64)"
    ),
}

# From the key to the picture of the new format, by the page's own clock:
# the key event, the kernel's rounding, the figure drawn.
CLOCK = """() => {
  const plot = document.querySelector('.wb-plot');
  window.waited = [];
  let began = null;
  document.addEventListener('keydown', () => { began = performance.now(); }, true);
  new MutationObserver(() => {
    if (began !== null) { window.waited.push(performance.now() - began); began = null; }
  }).observe(plot, { attributes: true, attributeFilter: ['data-revision'] });
}"""
TRACES = "[...document.querySelector('.wb-plot-figure')._fullData]"

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    on = workbench.subject("digits-vit")
    small = Allocate(
        layers="*layers.0.*",
        widths=[2, 3, 4, 8],
        calibration_examples=16,
        predict_examples=8,
        draws=0,
        test_examples=32,
    )
    with serve_cells(tmp_path_factory, {name: OPEN + cell for name, cell in CELLS.items()}) as found:
        small.run(on, Progress(), cache=False).save(found.root / "allocated", with_subject=False)
        yield found


def opened(lab: Lab, watched: Watched, name: str) -> Page:
    open_and_run(watched.page, lab, name, height=1200)
    return watched.page


def test_the_grid_and_the_error_follow_the_slider_and_the_page_says_how_fast(
    lab: Lab, watched: Watched, record_property: Callable[[str, object], None]
) -> None:
    page = opened(lab, watched, "formats")
    panel = page.locator(".wb-panel-quantization")
    facts, title = panel.locator(".wb-facts"), page.locator(".wb-plot [role=group], .wb-plot-figure").first
    expect(title).to_have_attribute("aria-label", re.compile("^int4 on "))
    values = f"() => {TRACES}.find((t) => t.name === 'values of the format').x.length"
    assert page.evaluate(values) == 16
    page.evaluate(CLOCK)
    handle = page.locator(".wb-field-bits .noUi-handle")
    handle.focus()
    errors = []
    for key, bits in [("ArrowRight", b) for b in (5, 6, 7, 8)] + [
        ("ArrowLeft", b) for b in (7, 6, 5, 4, 3, 2)
    ]:
        handle.press(key)
        expect(title).to_have_attribute("aria-label", re.compile(f"^int{bits} on "))
        page.wait_for_function(
            f"() => {TRACES}.find((t) => t.name === 'values of the format').x.length === {2**bits}"
        )
        errors.append((bits, facts.inner_text()))
    waited = page.evaluate("() => window.waited")
    assert len(waited) == 10 and all(w > 0 for w in waited)
    record_property("milliseconds from key to picture, median", round(statistics.median(waited), 1))
    record_property("milliseconds from key to picture, worst", round(max(waited), 1))
    assert len({text for _, text in errors}) >= 7  # the layer's errors are shown with every width

    panel.get_by_label("format", exact=True).select_option(label="minifloat")
    expect(title).to_have_attribute("aria-label", re.compile("^e2m1 on "))
    expect(page.locator(".wb-field-bits")).to_be_hidden()
    page.locator(".wb-field-exponent .noUi-handle").press("ArrowRight")
    expect(title).to_have_attribute("aria-label", re.compile("^e3m1 on "))
    before = facts.inner_text()
    panel.get_by_label("Hadamard rotation of the inputs").check()
    expect(facts).not_to_have_text(before)
    panel.get_by_label("layer", exact=True).select_option(index=1)
    expect(facts).to_contain_text("kurtosis")
    photograph(page, "formats")


def test_the_allocation_slider_walks_the_front(lab: Lab, watched: Watched) -> None:
    page = opened(lab, watched, "allocation")
    panel = page.locator(".wb-panel-allocation")
    expect(panel).to_contain_text("proven bound")
    page.wait_for_function("() => document.querySelectorAll('.wb-plot-figure')[0]?._fullData?.length")
    bars = "() => [...document.querySelectorAll('.wb-plot-figure')[0]._fullData[0].x]"
    before = page.evaluate(bars)
    handle = page.locator(".wb-field-average .noUi-handle")
    handle.press("End")
    total = f"() => ({bars})().reduce((sum, width) => sum + width, 0)"
    page.wait_for_function(f"() => ({total})() > {sum(before)}")
    handle.press("Home")
    page.wait_for_function(f"() => ({bars})().every((width) => width === 2)")
    for _ in range(20):
        handle.press("ArrowRight")
    page.wait_for_function(f"() => new Set(({bars})()).size > 1")
    assert len(page.evaluate(bars)) == len(before)
    photograph(page, "allocation")


def test_bars_are_sorted_filtered_and_laid_over_another_run(lab: Lab, watched: Watched) -> None:
    page = opened(lab, watched, "layers")
    panel = page.locator(".wb-panel-quantize")
    note = panel.locator(".wb-job .wb-note")
    run = panel.get_by_role("button", name="Run", exact=True)
    run.click()
    expect(note).to_have_text(re.compile("done after"))
    heights = f"() => [...{TRACES}[0].x]"
    page.wait_for_function(f"() => {TRACES}[0].type === 'scatter'")
    plain = page.evaluate(heights)
    panel.get_by_label("sort", exact=True).select_option(label="largest first")
    page.wait_for_function(
        f"() => {{ const y = ({heights})(); return y.every((v, i) => !i || v <= y[i - 1]) }}"
    )
    assert sorted(page.evaluate(heights)) == sorted(plain)
    only = panel.get_by_label("only", exact=True)
    only.fill("fc1")
    only.press("Enter")
    page.wait_for_function(
        f"() => [...{TRACES}[0].y].every((name) => name.includes('fc1')) && {TRACES}[0].x.length < "
        f"{len(plain)}"
    )
    only.fill("")
    only.press("Enter")
    page.wait_for_function(f"() => {TRACES}[0].x.length === {len(plain)}")
    panel.get_by_label("rounding", exact=True).select_option(label="gptq")
    run.click()
    page.wait_for_function(
        f"() => {{ const y = ({heights})(); return y.length === {len(plain)} && Math.max(...y) < "
        f"{max(plain)} }}"
    )
    expect(note).to_have_text(re.compile("done after"))
    panel.get_by_label("Compare with").select_option(index=1)
    page.wait_for_function(f"() => {TRACES}.length === 2")
    expect(panel.get_by_role("rowheader", name="rounding", exact=True)).to_be_visible()
    photograph(page, "layers")
