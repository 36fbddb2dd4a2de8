"""Identity records: a method run beside others' code, or beside its equations derived a second time, on the
same seeded inputs. `data/evidence/identity/METHOD.json` holds a list of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from workbench.errors import notice
from workbench.storage.places import data_folder

AUTHORS, PEER, TABLE, FP64 = (
    "authors' code",
    "peer's code",
    "table of a format",
    "second derivation in fp64",
)
#: Whose numbers ours were held against, the strongest evidence first.
KINDS = (AUTHORS, PEER, TABLE, FP64)
#: Those that somebody else wrote.
OTHERS = KINDS[:3]
#: Field of a record -> what it holds.
FIELDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "peer": (str,),
    "version": (str,),
    "kind": (str,),
    "compared": (str,),
    "inputs": (str,),
    "seed": (int,),
    "shapes": (list,),
    "theirs": (list,),
    "ours": (list,),
    "difference": (float, int),
    "relative": (float, int),
    "tolerance": (float, int),
    "equal": (bool,),
    "finding": (str,),
    "date": (str,),
    "command": (str,),
}


def identity_records(name: str) -> list[dict[str, Any]]:
    """What a method, or an axis' entry, was held against; empty where nothing is stored.
    A damaged file is named and counts for nothing.
    """
    file = data_folder() / "evidence" / "identity" / f"{name}.json"
    if not file.is_file():
        return []
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(records, list):
            raise ValueError(f"it holds {type(records).__name__}, not a list of records")
        for record in records:
            if wrong := incomplete(record):
                raise ValueError(wrong)
    except (OSError, ValueError, RecursionError) as error:
        notice(
            f"identity: {str(file)!r} cannot be read ({error}) and counts for nothing; run its command again"
        )
        return []
    return sorted(records, key=lambda record: KINDS.index(record["kind"]))


def incomplete(record: Any) -> str:
    """What a record lacks or contradicts, in words; empty when it is whole."""
    if not isinstance(record, Mapping):
        return f"a record is an object, not {type(record).__name__}"
    for field, types in FIELDS.items():
        value = record.get(field)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return f"{field} is {str(value)[:60]!r}, not {' or '.join(t.__name__ for t in types)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field} is {value}"
    if record["kind"] not in KINDS:
        return f"kind is {record['kind']!r}; known: {', '.join(KINDS)}"
    if record["equal"] != (record["difference"] <= record["tolerance"]):
        return f"equal is {record['equal']} at {record['difference']} of {record['tolerance']} allowed"
    if not record["equal"] and not record["finding"]:
        return "finding is empty, and the difference is above the tolerance"
    return ""


def identity_sentence(record: Mapping[str, Any]) -> str:
    """'equals hqq 0.2.8 (authors' code) to 2e-06 on 64 x 128 normal weights, 4 bits'."""
    peer = " ".join(part for part in (record["peer"], record["version"]) if part)
    against = f"{peer} ({record['kind']})"
    difference = record["difference"]
    if record["equal"]:
        words = f"equals {against} " + (f"to {difference:.1g}" if difference else "exactly")
    else:
        words = f"differs from {against} by {difference:.1g}"
    finding = f": {record['finding']}" if record["finding"] else ""
    return f"{words} in {record['compared']}, on {record['inputs']}{finding}"


def identity_kind(name: str) -> str:
    """The strongest kind of code that a method was found equal to; empty where there is none."""
    return next((record["kind"] for record in identity_records(name) if record["equal"]), "")
