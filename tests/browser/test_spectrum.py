"""The spectrum panel in a real JupyterLab: run and watch it refine, click a layer,
lay a pruned subject over it, move the batch slider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, photograph, serve_cells

CODE = """\
import workbench
from widgets.spectrum import SpectrumPanel
from workbench import pruning
subject = workbench.subject("digits-vit")
pruned = pruning.Prune(method="magnitude", sparsity=0.7).run(subject).subject
SpectrumPanel(subject, others={"pruned": pruned}, layers="blocks", probes=4, steps=24, examples=16, \
batch_size=8)"""
expect.set_options(timeout=PATIENCE)

FIGURES = "[...document.querySelectorAll('.wb-plot')].filter((e) => !e.closest('.wb-layers'))"
TRACES = f"({FIGURES}[0].querySelector('.wb-plot-figure')._fullData ?? []).map((t) => t.name ?? '')"
# every picture of the density there has been, by its title
WATCH = f"""() => {{ const plot = {FIGURES}[0]; window.titles = [];
new MutationObserver(() => window.titles.push(plot.querySelector('.wb-plot-figure')?.layout?.title?.text ?? \
'')).observe(
  plot, {{ attributes: true, attributeFilter: ['data-revision'] }}); }}"""
# where a layer's cell, bar or point is on the page
CELL = """(name) => { const plot = document.querySelector('.wb-layers .wb-plot-figure'), \
full = plot?._fullLayout, shown = plot?._fullData?.[0];
if (!shown?.meta?.layers) return null;
plot.scrollIntoView({ block: 'center' });
const box = plot.getBoundingClientRect();
const at = (x, y) => [box.left + full._size.l + full.xaxis.d2p(x), \
box.top + full._size.t + full.yaxis.d2p(y)];
for (const [i, row] of shown.meta.layers.entries()) {
  if (row === name) return at(shown.type === 'bar' ? shown.x[i] / 2 : shown.x[i], shown.y[i]);
  const j = Array.isArray(row) ? row.indexOf(name) : -1;
  if (j >= 0) return at(shown.x[j], shown.y[i]);
}
return null; }"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(tmp_path_factory, {"spectrum": CODE}) as found:
        yield found


def test_run_refine_click_overlay_and_batch(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "spectrum", height=1800)
    panel = page.locator(".wb-panel")
    note = panel.locator(".wb-job .wb-note")
    title = panel.locator(".wb-plot:not(.wb-layers .wb-plot) .gtitle").first

    # refines while it runs: pictures of unfinished spectra before the last one
    page.evaluate(WATCH)
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(note).to_have_text(re.compile("done after"))
    expect(title).to_have_text("Hessian spectrum, blocks")
    titles = page.evaluate("() => window.titles")
    assert len(titles) >= 3 and all("running" in text for text in titles[:2]), titles
    photograph(page, "spectrum-run")

    # a clicked layer shows its own spectrum
    layer = "vit.layers.1.mlp.fc1"
    place = page.wait_for_function(CELL, arg=layer).json_value()
    page.mouse.move(*place)
    page.mouse.click(*place)
    expect(panel.get_by_label("layers", exact=True)).to_have_value(layer)
    expect(title).to_contain_text(layer)
    expect(note).to_have_text(re.compile("done after"))
    photograph(page, "spectrum-layer")
    panel.get_by_role("button", name="All layers").click()
    expect(panel.get_by_label("layers", exact=True)).to_have_value("blocks")
    expect(title).to_contain_text("blocks")
    expect(panel.get_by_role("button", name="All layers")).to_be_disabled()

    # another subject over it
    panel.get_by_label("Lay over").select_option(label="pruned")
    page.wait_for_function(f"() => {TRACES}.some((name) => name.startsWith('pruned: '))")
    expect(panel).to_contain_text(re.compile(r"top eigenvalue of pruned: \S+, \S+ times"))
    photograph(page, "spectrum-overlay")

    # the batch size on its slider: predicted top and noise edge
    assert not any("at B=" in name for name in page.evaluate(f"() => {TRACES}"))
    page.locator(".wb-field-batch .noUi-handle").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        f"() => {TRACES}.some((name) => /^noise edge at B=/.test(name)) && {TRACES}.some((name) => "
        "/^predicted top at B=/.test(name))"
    )
    photograph(page, "spectrum-batch")


def test_a_click_while_it_runs_is_kept(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "spectrum", height=1800)
    panel = page.locator(".wb-panel")
    note = panel.locator(".wb-job .wb-note")
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(note).to_have_text(re.compile("done after"))
    layer = "vit.layers.0.attention.q_proj"
    page.locator(".wb-field-steps .noUi-handle").focus()
    page.keyboard.press("End")
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(panel.get_by_role("button", name="Stop", exact=True)).to_be_enabled()
    place = page.wait_for_function(CELL, arg=layer).json_value()
    page.mouse.move(*place)
    page.mouse.click(*place)
    expect(panel).to_contain_text(f"next, after this run: spectrum of {layer}")
    panel.get_by_role("button", name="Stop", exact=True).click()
    expect(note).to_have_text(re.compile("stopped, kept what was there"))
    expect(panel.get_by_label("layers", exact=True)).to_have_value("blocks")  # Stop forgets what was to come
