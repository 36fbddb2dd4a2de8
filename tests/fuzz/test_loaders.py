"""A few damaged inputs for every loader; `make fuzz` opens ten thousand of each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.campaign import GOOD, briefly, campaign
from tests.fuzz.loaders import LOADERS

#: Inputs in the suite; the slow ones have fewer.
COUNT = {"configs": 8, "saved-subjects": 6, "training-checkpoints": 8, "command-line": 12, "gguf": 10}
SLOW = ("processes",)
NEEDED = {"gguf": "gguf", "task-files": "lm_eval"}
#: Inputs of seed 0 that ended in something else than one line once.
FOUND = {"tokenizers": (2938, 4596), "results": (1266, 3841)}


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in SLOW])
def test_damaged_inputs_open_or_are_refused_in_one_line(name: str) -> None:
    """Kind: whatever is wrong with an input is one line that says so, soon, and never a traceback."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    ends, told = briefly(name, LOADERS[name], range(COUNT.get(name, 24)), seed=7)
    assert set(ends) <= set(GOOD), "\n".join(told)


@pytest.mark.parametrize("name", list(FOUND))
def test_what_ten_thousand_inputs_found_stays_mended(name: str) -> None:
    """Kind: a part of a file that opening it does not look at, and using it does."""
    ends, told = briefly(name, LOADERS[name], FOUND[name], seed=0)
    assert set(ends) <= set(GOOD), "\n".join(told)


def test_a_campaign_goes_on_where_it_stopped_and_counts_what_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are kept; another call adds what is missing and opens nothing twice."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    state = tmp_path / "values.json"
    first = campaign("values", 30, 1, state)
    assert first["done"] == 30 and sum(first["ends"].values()) == 30
    both = campaign("values", 50, 1, state)
    assert both["done"] == 50 and sum(both["ends"].values()) == 50 and set(both["ends"]) <= set(GOOD)
