"""The scaling panel in a real JupyterLab: cut-off, a clicked run, a budget."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, serve_cells
from workbench.scaling import law

CODE = """\
from widgets.scaling import ScalingPanel
ScalingPanel("runs.csv", columns="params=size")"""
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9.5, 6), np.logspace(9, 11, 6)))
    loss = law("chinchilla").predict(
        dict(E=1.8, A=480, B=2000, alpha=0.35, beta=0.37), {"params": n, "tokens": d}
    )
    with serve_cells(tmp_path_factory, {"scaling": CODE}) as found:
        pd.DataFrame(
            {
                "size": n,
                "tokens": d,
                "loss": loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(36)),
            }
        ).to_csv(found.root / "runs.csv", index=False)
        yield found


def test_cutoff_click_and_budget(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "scaling", height=1400)
    note, plan, facts = (
        page.locator(".wb-note"),
        page.locator(".wb-scaling-plan"),
        page.locator(".wb-scaling-facts"),
    )
    expect(note).to_contain_text("36 runs fitted: converged")
    expect(plan).to_contain_text("N*")
    page.wait_for_function("() => +document.querySelector('.wb-plot')?.dataset.revision > 0")

    before = plan.inner_text()
    page.locator(".wb-field-budget .noUi-handle").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(plan).not_to_have_text(before)
    expect(note).to_contain_text("36 runs fitted")  # a budget does not refit

    page.locator(".wb-field-cutoff .noUi-handle").focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    expect(facts).to_contain_text("held-out error")
    expect(note).to_contain_text(re.compile(r"^(?!36)\d+ runs fitted"))
    page.keyboard.press("End")
    expect(note).to_contain_text("36 runs fitted")
    expect(facts).not_to_contain_text("held-out error")

    # the words come before the plot: wait until the last run is drawn again, then ask where it is
    place = page.wait_for_function(
        """() => { const plot = document.querySelector('.wb-plot-figure'), full = plot?._fullLayout, \
trace = plot?._fullData?.find((t) => t.name === 'fitted runs');
        if (!trace || trace.x.length !== 36) return null;
        const box = plot.getBoundingClientRect(), i = 35;
        const place = [box.left + full._size.l + full.xaxis.d2p(trace.x[i]), \
box.top + full._size.t + full.yaxis.d2p(trace.y[i])];
        return place.every(Number.isFinite) ? place : null; }"""
    ).json_value()
    page.mouse.move(*place)
    page.mouse.click(*place)
    expect(note).to_contain_text("35 runs fitted; 1 dropped")
    page.get_by_role("button", name="Bring back dropped runs").click()
    expect(note).to_contain_text("36 runs fitted")
