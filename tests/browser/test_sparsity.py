"""The sparsity panel in a real JupyterLab: the slider re-thresholds, the bitmap zooms by wheel and keys,
two methods lie over each other.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, photograph, serve_cells, set_theme

CODE = """\
from widgets.sparsity import SparsityPanel
SparsityPanel("digits-vit", methods="magnitude,obd", gradients=16, calibration_examples=16)"""

# From the key to the picture of the new threshold, by the page's own clock:
# the key event, the kernel's answer, the canvas painted.
CLOCK = """() => {
  const bitmap = document.querySelector('.wb-bitmap'), status = bitmap.querySelector('.wb-bitmap-status');
  window.waited = [];
  let began = null, before = '';
  document.addEventListener('keydown', () => { began = performance.now(); \
before = status.textContent; }, true);
  new MutationObserver(() => {
    if (began !== null && status.textContent !== before) { window.waited.push(performance.now() - began); \
began = null; }
  }).observe(status, { childList: true, characterData: true, subtree: true });
}"""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(tmp_path_factory, {"sparsity": CODE}) as found:
        yield found


@pytest.fixture()
def computed(lab: Lab, watched: Watched) -> Page:
    """The panel with its saliencies computed."""
    page = watched.page
    open_and_run(page, lab, "sparsity")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".wb-bitmap-status")).to_contain_text("kept by magnitude at 70%")
    return page


def shown(page: Page) -> float:
    """Share of the canvas's pixels that are painted."""
    return page.evaluate("""() => { const c = document.querySelector('.wb-bitmap canvas'), \
d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4) }""")


def press(page: Page, handle: Locator, status: Locator, keys: list[tuple[str, str]]) -> None:
    for key, expected in keys:
        handle.press(key)
        expect(status).to_contain_text(expected)


def test_the_slider_moves_the_threshold_and_the_page_says_how_fast(
    computed: Page, record_property: Callable[[str, object], None]
) -> None:
    page = computed
    handle, status = page.locator(".wb-field-sparsity .noUi-handle"), page.locator(".wb-bitmap-status")
    before, facts = shown(page), page.locator(".wb-sparsity-facts").inner_text()
    handle.focus()
    page.evaluate(CLOCK)
    press(page, handle, status, [("ArrowRight", f"at {percent}%") for percent in range(71, 81)])
    waited = page.evaluate("() => window.waited")
    assert len(waited) == 10 and all(w > 0 for w in waited)
    record_property("milliseconds from key to picture, median", round(statistics.median(waited), 1))
    record_property("milliseconds from key to picture, worst", round(max(waited), 1))
    assert shown(page) < before  # fewer weights are kept
    expect(page.locator(".wb-sparsity-facts")).not_to_have_text(facts)
    press(page, handle, status, [("Home", "at 0%"), ("End", "at 99%")])
    expect(page.locator(".wb-sparsity-facts")).to_contain_text("kept in this layer")


def test_the_bitmap_zooms_by_wheel_and_by_keys(computed: Page) -> None:
    page = computed
    canvas, bitmap = page.locator(".wb-bitmap canvas"), page.locator(".wb-bitmap")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": 60, "y": 60})
    for _ in range(3):
        page.mouse.wheel(0, -100)
    expect(bitmap).to_have_attribute("data-zoom", re.compile(r"^1\.953"))
    assert (
        page.evaluate(
            "() => document.querySelector('.jp-WindowedPanel-outer, .jp-NotebookPanel-notebook').scrollTop"
        )
        == 0
    )  # the notebook stayed
    canvas.focus()
    page.keyboard.press("0")
    expect(bitmap).to_have_attribute("data-zoom", "1.000")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    expect(bitmap).to_have_attribute("data-zoom", "1.250")
    expect(page.locator(".wb-bitmap-status")).to_contain_text(re.compile(r"row \d+, column \d+: (set|empty)"))
    # a new threshold keeps the place
    page.locator(".wb-field-sparsity .noUi-handle").press("ArrowLeft")
    expect(page.locator(".wb-bitmap-status")).to_contain_text("at 69%")
    expect(bitmap).to_have_attribute("data-zoom", "1.250")


def test_two_methods_are_laid_over_each_other_in_either_theme(computed: Page) -> None:
    page = computed
    status = page.locator(".wb-bitmap-status")
    page.get_by_label("overlay", exact=True).select_option(label="obd")
    expect(status).to_contain_text("magnitude and obd")
    expect(status).to_contain_text(re.compile(r"Jaccard 0\.\d\d"))
    legend = page.locator(".wb-bitmap-scale")
    for name in ("both", "only magnitude", "only obd"):
        expect(legend.get_by_text(name, exact=True)).to_be_visible()
    page.locator(".wb-bitmap canvas").focus()
    page.keyboard.press("ArrowRight")
    expect(status).to_contain_text(re.compile(r"column \d+: (both|only magnitude|only obd|neither)"))
    for view in ("density of each head", "predicted loss", "overlap of methods", "density of each layer"):
        before = int(page.evaluate("() => document.querySelector('.wb-plot').dataset.revision"))
        page.get_by_label("view", exact=True).select_option(label=view)
        page.wait_for_function(f"() => +document.querySelector('.wb-plot').dataset.revision > {before}")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator(".wb-sparsity-facts")).to_contain_text("measured: magnitude at 70%")
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        set_theme(page, theme)
    photograph(page, "sparsity")


def test_a_wrong_method_is_told_in_words(computed: Page) -> None:
    page = computed
    field = page.get_by_label("methods", exact=True)
    field.fill("magnitude,loud")
    field.press("Enter")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("loud")
    assert page.locator(".jp-OutputArea-output pre:has-text('Traceback')").count() == 0
