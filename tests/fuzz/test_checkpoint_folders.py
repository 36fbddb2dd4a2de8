"""A short run of the campaign over damaged checkpoint folders."""

from __future__ import annotations

from tests.fuzz.checkpoint_folders import campaign


def test_damaged_checkpoint_folders_open_or_are_refused_in_one_line():
    """Kind 45: what is wrong with a file is one line that names it, never a traceback."""
    ends = campaign(60, seed=7, show=False)
    assert set(ends) <= {"opened", "refused"} and ends["refused"] > 30
