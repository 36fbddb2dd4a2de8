from __future__ import annotations

import time

import numpy as np

import workbench
from widgets.sparsity import SparsityPanel


def test_panel_computes_thresholds_overlays_and_measures():
    panel = SparsityPanel(
        workbench.subject("digits-vit"), methods="magnitude,obd", gradients=8, calibration_examples=8
    )
    panel.job.start()
    assert panel.job.wait(120)
    assert panel.result is not None and panel.method.options == ("magnitude", "obd")
    before = panel.bitmap.cells
    panel.sparsity.value = 0.3
    assert panel.bitmap.cells != before
    share = np.frombuffer(panel.bitmap.cells, np.uint8).astype(bool).mean()
    assert abs(share - 0.7) < 0.01 and "magnitude" in panel.bitmap.label
    panel.overlay.value = "obd"
    assert panel.bitmap.kind == "classes" and "Jaccard" in panel.bitmap.label
    for view in ("predicted", "overlap", "density"):
        panel.view.value = view
        assert panel.plot.spec["data"]
    panel.measure.start()
    assert panel.measure.wait(120)
    assert len(panel.measured) == 1 and "measured" in panel.facts.value


def test_measuring_before_there_is_a_mask_says_what_to_press():
    panel = SparsityPanel(workbench.subject("digits-vit"), methods="magnitude")
    panel.measure.start()
    assert panel.measure.wait(60) and panel.measured == []
    deadline = time.monotonic() + 5
    while "Run first" not in panel.measure.note.value and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "Run first" in panel.measure.note.value


def test_a_wrong_method_is_told_in_words():
    panel = SparsityPanel(workbench.subject("digits-vit"), methods="nonsense")
    panel.job.start()
    panel.job.wait(60)
    deadline = time.monotonic() + 5
    while "nonsense" not in panel.job.note.value and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "nonsense" in panel.job.note.value
