"""`workbench evidence METHOD`: measure a method's claim again and store the record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from workbench.commands.options import Parser
from workbench.errors import BadInput
from workbench.names import methods
from workbench.progress import TextProgress
from workbench.results import plain
from workbench.storage import replacing, verdict


def evidence(arguments: list[str]) -> int:
    import time

    from workbench import evidence as measurements
    from workbench.storage import evidence_target

    parser = Parser(prog="workbench evidence")
    parser.add_argument("method", nargs="*")
    parser.add_argument("--family")
    parser.add_argument("--out", help="folder to write to, in place of the project's or your own")
    parser.add_argument("--missing", action="store_true", help="only those without stored evidence")
    space = parser.parse_args(arguments)
    cards = methods()
    target = Path(space.out) if space.out else evidence_target()
    names = space.method or [n for n, c in cards.items() if space.family and c.family == space.family]
    unknown = [n for n in names if n not in cards]
    if unknown or not names:
        raise BadInput(f"method: {', '.join(unknown) or 'none given'}; known: {', '.join(cards)}")
    for name in names:
        card = cards[name]
        if not measurements.measurable(name):
            raise BadInput(f"method: {name} has no measurement to run")
        if space.missing and card.evidence() is not None:
            continue
        began = time.perf_counter()
        record = measurements.measure(name, TextProgress())
        record |= {
            "method": name,
            "claim": card.claim,
            "seconds": round(time.perf_counter() - began, 1),
            "code": measurements.code(name),
            "versions": versions(),
        }
        with replacing(target / card.family / f"{name}.json") as draft:
            draft.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n")
        print(f"{name}: {verdict(record)}; {record.get('note', '')} ({record['seconds']} s)")
    return 0


def finite(value: Any) -> Any:
    """The record as strict JSON: numpy values as plain ones, infinities and NaN as words."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else finite(plain(value))


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        p: version(p) for p in ("torch", "transformers", "numpy", "scipy")
    }
