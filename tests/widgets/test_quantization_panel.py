"""The quantization panel without a browser: controls to numbers, numbers to figures."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest

import workbench
from widgets.quantization import FAMILIES, AllocationPanel, FormatPanel
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Allocate, AllocationScores, Quantize
from workbench.quantization.allocation.budget import budget_in


@pytest.fixture()
def panel(checkpoints: dict[str, Path]) -> FormatPanel:
    return FormatPanel(workbench.subject(checkpoints["bert"], data="random"), examples=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_draws_its_grid(panel: FormatPanel, family: str) -> None:
    panel.family.value = family
    assert panel.found is not None and len(panel.plot.figure.data) == 2
    assert panel.format in panel.plot.figure.layout.title.text
    panel.instrument.check(panel.on)


def test_numbers_equal_the_instruments(panel: FormatPanel) -> None:
    panel.bits.value, panel.group.value = 3, 16
    result = panel.instrument.with_fields(calibration_examples=4, predict_examples=0, test_examples=0).run(
        panel.on, Progress(), cache=False
    )
    row = result.table.set_index("layer").loc[panel.layer.value]
    assert panel.found is not None
    assert panel.found.weight_error == pytest.approx(
        row["weight_error"], rel=1e-4
    ) and panel.found.output_error == pytest.approx(row["output_error"], rel=1e-3)
    assert panel.found.bits == pytest.approx(row["bits"])


def test_sliders_change_the_picture_quickly(panel: FormatPanel) -> None:
    times, errors = [], []
    for bits in (2, 3, 4, 5, 6, 7, 8):
        began = time.perf_counter()
        panel.bits.value = bits
        times.append(time.perf_counter() - began)
        assert panel.found is not None
        errors.append(panel.found.weight_error)
    assert len(set(errors)) >= 6 and min(errors) == errors[-1]
    assert statistics.median(times) < 5  # a hang, not a speed, is what this catches


def test_the_controls_shown_are_those_that_matter(panel: FormatPanel) -> None:
    panel.family.value = "minifloat"
    assert panel.exponent.layout.display == "" and panel.bits.layout.display == "none"
    panel.family.value = "mxfp4"
    assert panel.granularity.layout.display == "none"


def test_a_rotation_evens_the_spread(panel: FormatPanel) -> None:
    """A feature a hundred times as large as the others is the first of the curve;
    the rotation shares it out.
    """
    layer = panel._layers[panel.layer.value]
    panel._moments[layer.name].gram[0, 0, 0] *= 1e4
    panel._matrices.clear()
    assert [t.name for t in panel.spread.figure.data] == ["inputs, as they are", "weights, as they are"]
    panel.rotate.value = True
    plain, _, rotated, _ = panel.spread.figure.data
    assert rotated.name == "inputs, rotated" and len(rotated.y) == layer.shape[1]
    assert np.median(plain.y) < 0.1 < np.median(rotated.y)


def test_allocation_panel_walks_the_front(checkpoints: dict[str, Path]) -> None:
    on = workbench.subject(checkpoints["bert"], data="random")
    result = Allocate(
        layers="*.0.*",
        budget=3,
        widths=[2, 4],
        group_size=16,
        calibration_examples=4,
        predict_examples=4,
        draws=0,
        test_examples=4,
    ).run(on, Progress(), cache=False)
    panel = AllocationPanel(result)
    panel.average.value = panel.average.max
    most = sum(panel.widths.values())
    panel.average.value = panel.average.min
    assert set(panel.widths.values()) == {2} and most > sum(panel.widths.values())
    with pytest.raises(BadInput, match="allocate"):
        AllocationPanel(
            Quantize(layers="*.0.*", predict_examples=0, test_examples=0, calibration_examples=4).run(
                on, Progress(), cache=False
            )
        )


def test_the_allocation_panel_answers_a_budget_and_measures_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget in words is answered from the scores, its cost is told, and Measure sets it beside others."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    on = workbench.subject(checkpoints["bert"], data="random")
    scores = AllocationScores(
        layers="*.0.*", widths=[2, 4], group_size=16, calibration_examples=4, predict_examples=4, swaps=0
    ).run(on, Progress())
    panel = AllocationPanel(scores, on)
    panel.budget.value = "4 bits"
    assert panel.widths == scores.allocation(bits=4).widths
    assert "bits a weight with scales and zero points" in panel.facts.value
    assert "takes about" in panel.cost.value
    panel.budget.value = "1 furlong"
    assert "no number of bytes" in panel.note.value
    panel.budget.value = "4.2 bits"
    assert panel.instrument.scorer().key(on) == scores.instrument.key(on)
    panel.job.now(Progress())
    assert panel.measured is not None and "uniform" in panel.table.value
    assert panel.measured.table["average_bits"].max() <= 4.2 + 1e-9
    panel.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("80MB", {"size": "80MB"}),
        ("1.5 GiB", {"size": "1.5 GiB"}),
        ("4.5 bits", {"bits": 4.5}),
        ("KL 0.05", {"target_kl": 0.05}),
        ("1e-3 nats", {"target_kl": 0.001}),
        ("12ms", {"milliseconds": 12.0}),
    ],
)
def test_a_budget_is_read(text: str, said: dict[str, object]) -> None:
    assert budget_in(text) == said


@pytest.mark.parametrize("text", ["", "80", "many", "1.2.3 bits", "kl"])
def test_what_is_no_budget_is_said(text: str) -> None:
    with pytest.raises(BadInput, match="budget: "):
        budget_in(text)
