"""Kind: a command that is killed without a word leaves nothing that its next call does not mend or use.
`python -m tests.unfinished.kills` does it ten times each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unfinished.kills import COMMANDS, campaign


@pytest.mark.long
@pytest.mark.parametrize("kind", COMMANDS)
def test_kill_9_at_random_moments(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_CACHE")  # the trained subjects come from the user's
    notes = campaign(kind, 3, 1, tmp_path / "state.json")
    assert [note["wrong"] for note in notes] == [[]] * 3
