"""Stored identity records: whole, about something that exists, and as equal as they say."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT
from workbench.index import current
from workbench.storage.identity import identity_records, identity_sentence, incomplete

FOLDER = ROOT / "data" / "evidence" / "identity"
FILES = sorted(FOLDER.glob("*.json"))


def test_every_record_is_whole_and_holds() -> None:
    index = current()
    known = {*index["methods"], *index["instruments"]}
    known |= {*(name for axis in index["axes"].values() for name in axis["entries"])}
    assert FILES
    for file in FILES:
        assert file.stem in known, file.stem
        for record in json.loads(file.read_text(encoding="utf-8")):
            assert not incomplete(record), (file.name, incomplete(record))
            assert record["method"] == file.stem and record["command"].endswith(file.stem)


def test_show_says_what_a_method_or_an_instrument_equals() -> None:
    from workbench.names import doors

    said = dict(doors("wanda")[0].facts)["identity"]
    assert said.startswith("equals llmcompressor 0.14.0.1 (peer's code) exactly in the weights")
    assert "identity" in dict(doors("nvfp4")[-1].facts)
    assert dict(doors("fidelity")[0].facts)["identity"].startswith("equals llama.cpp b4748 ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "hearsay"),
        ("equal", False),
        ("difference", float("nan")),
        ("version", None),
        ("difference", 1.0),
        ("seed", True),
    ],
)
def test_a_record_that_contradicts_itself_is_told(field: str, value: object) -> None:
    """The kind: a record whose fields are missing, of another type, or say equal above the tolerance."""
    whole = identity_records("wanda")[0]
    assert not incomplete(whole)
    assert incomplete(whole | {field: value})


def test_a_difference_is_said_with_its_finding() -> None:
    record = identity_records("wanda")[0] | {"equal": False, "difference": 0.5, "finding": "theirs is wrong"}
    assert not incomplete(record)
    assert identity_sentence(record).startswith("differs from llmcompressor 0.14.0.1 (peer's code) by 0.5 in")
    assert identity_sentence(record).endswith(": theirs is wrong")
