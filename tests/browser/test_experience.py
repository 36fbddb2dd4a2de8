"""A panel as a user meets it: a few settings open, the figure above the fold, layers walked with the keys,
what is wrong marked where it is, and what was seen kept in the notebook's file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_notebook, photograph, run_all, serve_cells

CODE = (
    "import widgets, workbench\nfrom workbench.pruning import Prune\n"
    "on = workbench.subject('digits-vit')\n"
    "panel = widgets.panel(Prune, on, calibration_examples=16, predict_examples=8)\npanel"
)
# controls that are shown and that a screen reader has no name for
UNNAMED = """() => [...document.querySelectorAll('.wb-panel .noUi-handle, .wb-panel input, .wb-panel select, \
.wb-panel .widget-readout, .wb-panel button')].filter((e) => e.offsetParent && !(e.ariaLabel \
|| e.labels?.length || e.textContent.trim() || e.getAttribute('aria-labelledby'))) \
.map((e) => e.outerHTML.slice(0, 200))"""
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(tmp_path_factory, {"prune": CODE}) as found:
        yield found


@pytest.mark.long
def test_essentials_figure_keys_mistakes_copies_and_what_is_kept(lab: Lab, watched: Watched) -> None:
    page = watched.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.set_viewport_size({"width": 1280, "height": 1000})
    open_notebook(page, lab, "prune.ipynb")
    run_all(page)
    panel = page.locator(".wb-panel-prune")
    note = panel.locator(".wb-job .wb-note")
    expect(note).to_have_text("ready")
    groups = panel.locator(".wb-group-head")
    assert [text.split(" (")[0] for text in groups.all_inner_texts()] == [
        "▸ Pruning method",
        "▸ Data",
        "▸ Machine and seed",
    ]
    seed = panel.get_by_label("seed", exact=True)
    expect(seed).to_be_hidden()
    groups.nth(2).press("Enter")
    expect(seed).to_be_visible()
    groups.nth(2).press("Enter")
    expect(seed).to_be_hidden()

    run = panel.get_by_role("button", name="Run", exact=True)
    run.click()
    expect(note).to_have_text(re.compile("done after"))
    figure = panel.locator(".wb-plot-figure").first
    expect(figure).to_have_attribute(
        "aria-label", re.compile(r"^Sparsity of each layer: obert.*sparsity of 18 layers: largest 0\.")
    )
    box = figure.bounding_box()
    assert box is not None and box["y"] < 700, box
    figure.focus()
    page.keyboard.press("End")
    expect(panel.locator(".wb-plot-picked").first).to_contain_text("layers.")
    photograph(page, "prune")

    # every control has a name, the slider's handle too
    unnamed = page.evaluate(UNNAMED)
    assert unnamed == []

    # what is wrong is marked while it is typed
    layers = panel.get_by_label("layers", exact=True)
    layers.fill("no.such.layer")
    layers.press("Enter")
    expect(note.get_by_role("alert")).to_contain_text("no.such.layer")
    expect(panel.locator(".wb-field-layers.wb-wrong")).to_be_visible()
    expect(panel.locator(".wb-outdated .wb-plot").first).to_be_visible()
    panel.get_by_role("button", name="Back to the run shown").click()
    expect(panel.locator(".wb-wrong")).to_have_count(0)
    expect(panel.locator(".wb-outdated")).to_have_count(0)

    panel.get_by_role("button", name="Copy as command").click()
    command = panel.locator(".wb-toolbar pre")
    expect(command).to_have_text(
        "workbench run prune --subject digits-vit --calibration-examples 16 --predict-examples 8"
    )
    expect(panel.locator(".wb-toolbar [role=status]")).to_have_text("copied:")
    assert page.evaluate("() => navigator.clipboard.readText()") == command.inner_text()

    # kept in the file: the figure for Plotly and as a picture, facts, and hidden while the panel lives
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget.content.widgets[0].model.outputs.toJSON()"
        ".some((o) => o.data?.['image/png'])"
    )
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    file = lab.root / "prune.ipynb"
    for _ in range(100):
        outputs = json.loads(file.read_text())["cells"][0]["outputs"]
        if any("image/png" in output.get("data", {}) for output in outputs):
            break
        page.wait_for_timeout(200)
    live, figure_kept, facts = outputs
    assert "application/vnd.jupyter.widget-view+json" in live["data"]
    assert "application/vnd.plotly.v1+json" in figure_kept["data"]
    assert len(figure_kept["data"]["image/png"]) > 5000
    assert "sparsity" in "".join(facts["data"]["text/html"]) and "Prune(" in "".join(
        facts["data"]["text/html"]
    )
    shown = page.locator(".jp-OutputArea-child:visible")
    assert shown.count() == 1
