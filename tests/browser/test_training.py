"""The three training panels in a real JupyterLab: a sweep that is seen live, stopped,
and gone on with from the command line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, photograph, serve_cells

SURFACE = """\
import widgets, workbench
from workbench.training import LearningRateBatchSize
widgets.panel(LearningRateBatchSize(examples=2048, learning_rate_points=4, batch_sizes=[8, 32], seeds=2, \
workers=1, evaluate_limit=64), "digits-vit")"""
SCHEDULES = """\
from widgets.training import SchedulePanel
SchedulePanel(steps=400)"""
OPTIMIZERS = """\
import widgets
from workbench.training import OptimizerComparison
widgets.panel(OptimizerComparison(optimizers="adamw,sgd", examples=1024, learning_rate_points=1, seeds=2, \
workers=1, evaluate_limit=64), "digits-vit")"""
DRAWN = "document.querySelector('.wb-plot-figure')"
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(
        tmp_path_factory, {"surface": SURFACE, "schedules": SCHEDULES, "optimizers": OPTIMIZERS}
    ) as found:
        yield found


def revision_after(page: Page, before: int) -> int:
    page.wait_for_function(f"() => +document.querySelector('.wb-plot')?.dataset.revision > {before}")
    return int(page.evaluate("() => document.querySelector('.wb-plot').dataset.revision"))


def test_a_sweep_seen_live_stopped_and_gone_on_with_from_the_command_line(
    lab: Lab, watched: Watched, tmp_path: Path
) -> None:
    page = watched.page
    open_and_run(page, lab, "surface")
    panel = page.locator(".wb-panel")
    note = panel.locator(".wb-job .wb-note")
    run, stop = (
        panel.get_by_role("button", name="Run", exact=True),
        panel.get_by_role("button", name="Stop", exact=True),
    )
    run.click()
    # live: cells appear while the sweep runs, and the note says how far it is
    first = revision_after(page, 0)
    expect(note).to_contain_text("trials")
    revision_after(page, first)
    expect(run).to_be_disabled()
    photograph(page, "surface-live")
    stop.click()
    expect(note).to_have_text(re.compile("stopped, kept what was there"))
    table = panel.locator(".wb-facts")
    expect(table).to_contain_text("runs")
    stopped = int(re.search(r"runs\D+(\d+)", table.inner_text()).group(1))
    assert 0 < stopped < 16

    # the same settings from the command line find the same sweep and go on
    cache = next(lab.root.parent.rglob("sweeps.sqlite")).parent.parent
    command = [
        str(Path(sys.executable).parent / "workbench"),
        "run",
        "learning-rate-batch-size",
        "--subject",
        "digits-vit",
        "--examples",
        "2048",
        "--learning-rate-points",
        "4",
        "--batch-sizes",
        "[8, 32]",
        "--seeds",
        "2",
        "--workers",
        "1",
        "--evaluate-limit",
        "64",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "WORKBENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    # and the panel shows the whole of it without another run
    before = revision_after(page, 0)
    run.click()
    revision_after(page, before)
    expect(note).to_have_text(re.compile("done after"))
    expect(table).to_contain_text(re.compile(r"runs\D+16"))
    photograph(page, "surface")
    before = revision_after(page, 0)
    panel.get_by_label("show", exact=True).select_option(label="slices")
    revision_after(page, before)
    page.wait_for_function(f"() => {DRAWN}._fullData.some((t) => t.name === 'batch 8')")
    photograph(page, "slices")


def test_schedules_are_drawn_and_redrawn(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "schedules")
    panel = page.locator(".wb-panel")
    page.wait_for_function(f"() => {DRAWN}?._fullData?.length >= 5")
    photograph(page, "schedules")
    before = revision_after(page, 0)
    panel.get_by_label("schedules", exact=True).select_option(label=["cosine", "infinite"])
    revision_after(page, before)
    page.wait_for_function(f"() => {DRAWN}._fullData.length === 2")
    expect(panel.get_by_role("cell", name="infinite", exact=True)).to_be_visible()
    # the budget by keyboard: the last step drawn follows
    steps = f"Math.max(...{DRAWN}._fullData[0].x)"
    last = page.evaluate(f"() => {steps}")
    panel.locator(".wb-field-steps .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => {steps} > {last}")


def test_optimizers_are_ranked(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "optimizers")
    panel = page.locator(".wb-panel")
    note = panel.locator(".wb-job .wb-note")
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(note).to_have_text(re.compile("done after"))
    expect(panel.locator(".wb-facts")).to_contain_text("best")
    page.wait_for_function(f"() => {DRAWN}?._fullData?.[0]?.y?.length === 2")
    photograph(page, "optimizers")
    text = panel.get_by_label("optimizers", exact=True)
    text.fill("adamw,mun")
    text.press("Enter")
    expect(note).to_have_text("ready")  # the change has arrived
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(note.get_by_role("alert")).to_contain_text("did you mean muon")
