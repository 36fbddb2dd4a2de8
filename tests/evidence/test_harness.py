"""How claims are judged: by intervals, the same everywhere."""

from __future__ import annotations

import json
import math

import pytest

from workbench.evidence.harness import below, interval, together, words
from workbench.storage import data_folder, verdict


def test_a_claim_holds_fails_or_is_open():
    assert below(-2.0, -1.0) is True and below(1.0, 2.0) is False and below(-1.0, 1.0) is None
    assert below(-2.0, 0.5, margin=1.0) is True and below(1.5, 2.0, margin=1.0) is False


@pytest.mark.parametrize("values", [[-0.5], [-0.5, -0.5, -0.5]])
def test_one_value_found_once_or_several_times_decides_nothing(values):
    """A run without anything drawn is one measurement, however many seeds it is given."""
    assert below(*interval(values)[1:]) is None


def test_a_record_holds_when_all_of_it_does():
    assert together([True, True]) is True and together([True, None, False]) is False
    assert together([True, None]) is None and verdict({"holds": None}) == "cannot be shown here"
    assert words([("a < b", True), ("a < c", False), ("a < d", None)]) == "failed: a < c; undecided: a < d"
    assert words([("a < b", True)]) == ""


def stored_claims():
    for file in sorted((data_folder() / "evidence" / "pruning").glob("*.json")):
        record = json.loads(file.read_text())
        claims = [c for c in record.get("claims") or () if isinstance(c.get("difference"), dict)]
        if claims:
            yield pytest.param(record, claims, id=file.stem)


@pytest.mark.parametrize(("record", "claims"), stored_claims())
def test_stored_claims_are_judged_by_their_intervals(record, claims):
    for claim in claims:
        mean, half = claim["difference"]["mean"], claim["difference"]["half_width"]
        low, high = (math.nan, math.nan) if half is None else (mean - half, mean + half)
        assert claim["holds"] is below(low, high, claim.get("margin", 0.0))
    if len(claims) == len(record["claims"]):
        assert record["holds"] is together(c["holds"] for c in claims)


@pytest.mark.parametrize(
    "file", sorted((data_folder() / "evidence" / "scaling").glob("*.json")), ids=lambda f: f.stem
)
def test_no_verdict_stands_on_a_fit_that_has_not_converged(file):
    """Kind: evidence that holds, or does not, by what the product itself does not believe."""
    record = json.loads(file.read_text())
    if "NOT converged" in record.get("certificate", ""):
        assert verdict(record) == "cannot be shown here"
