"""The schedule panel draws what the schedulers give, follows its controls,
and says what is wrong in words.
"""

from __future__ import annotations

import numpy as np
import pytest

from widgets.training import SchedulePanel
from workbench.training.schedule.drawings import schedule_areas, schedule_table
from workbench.training.schedule.schedules import profile


def test_the_table_is_what_the_schedulers_give() -> None:
    uba = profile("uba", phi=4.0)
    table = schedule_table([{"name": "uba", "phi": 4.0}, "constant"], steps=50, learning_rate=0.1, warmup=0.0)
    np.testing.assert_allclose(table.lr[table.name == "uba"], [0.1 * uba(t / 50) for t in range(50)])
    areas = schedule_areas(table).set_index("name")
    assert (
        areas.area["constant"] == pytest.approx(1.0)
        and areas.above_half["constant"] == 1.0
        and areas.area["uba"] < 0.5
    )


def test_the_panel_follows_its_controls() -> None:
    panel = SchedulePanel(names=("cosine", "rex"), steps=100)
    assert [trace.name.split()[0] for trace in panel.plot.figure.data] == ["cosine", "rex"]
    panel.lr.value, panel.warmup.value = 0.1, 0.0
    assert panel.table.lr.max() == pytest.approx(0.1)
    panel.names.value = ("uba",)
    before = panel.table.lr.mean()
    panel.phi.value = 10.0
    assert panel.table.lr.mean() < before and "uba" in panel.areas.value
    panel.names.value = ()
    assert "choose at least one" in panel.note.value and panel.training is None
