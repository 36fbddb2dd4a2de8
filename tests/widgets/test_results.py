"""The results browser finds what is stored, draws any number of runs on one scale, and deletes them."""

from __future__ import annotations

from pathlib import Path

import workbench
from widgets import Results
from widgets.results import EVERY
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.storage.kept_results import chosen


def test_runs_of_two_subjects_are_found_compared_and_deleted(cache: Path) -> None:
    vit, softmax = (workbench.subject(name) for name in ("digits-vit", "digits-softmax"))
    small = {"method": "magnitude", "calibration_examples": 8, "predict_examples": 0}
    for sparsity in (0.5, 0.9):
        Prune(sparsity=sparsity, **small).run(vit, Progress())  # type: ignore[arg-type]
    Prune(sparsity=0.5, layers="*", **small).run(softmax, Progress())  # type: ignore[arg-type]
    browser = Results()
    assert len(browser.runs.options) == 3 and list(browser.instrument.options) == [EVERY, "prune"]
    assert "3 of 3 results" in browser.note.value and browser.delete.disabled
    browser.subject.value = "softmax"
    assert [
        label.split(": ")[0].endswith("prune on digits-softmax") for label, _ in browser.runs.options
    ] == [True]
    browser.subject.value = ""

    browser.runs.value = tuple(key for _, key in browser.runs.options)
    assert len(browser.shown) == len(browser.plots.children) == 3
    assert len({plot.figure.layout.height for plot in browser.plots.children}) == 1
    assert "digits-softmax" in browser.table.value and "sparsity" in browser.table.value
    one = next(key for label, key in browser.runs.options if "softmax" in label)
    browser.runs.value = (one,)
    browser.delete.click()
    assert len(browser.runs.options) == 2 and one not in {entry.key for entry in chosen()}
    assert browser.plots.children == () and "removed 1 results" in browser.note.value
    assert len(Results(instrument="prune").runs.options) == 2
    browser.close()
