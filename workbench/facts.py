"""Facts as people read them: what matters first, with units, shares in percent and bytes in MB.

>>> facts = {"packed_bytes": 51148, "kl": 0.02, "kl_low": 0.01, "kl_high": 0.03}
>>> [f"{name}: {value}" for name, value in told(facts)]
['KL: 0.02 nats (0.01 to 0.03)', 'packed size: 51.1 kB']
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: What a reader looks for first, in this order; the others follow as they come.
FIRST = (
    "accuracy",
    "perplexity",
    "loss",
    "kl",
    "distance",
    "top_eigenvalue",
    "trace",
    "sparsity",
    "packed_bytes",
    "bytes",
    "measured_change",
    "predicted_change",
)
#: Words in the place of a fact's name.
WORDS = {
    "kl": "KL",
    "packed_bytes": "packed size",
    "bytes": "size",
    "dense_bytes": "size before",
    "two_over_top": "2/λ",
    "top_eigenvalue": "largest eigenvalue",
    "mass": "mass of the density",
    "measured_change": "loss change, measured",
    "predicted_change": "loss change, predicted",
    "two_over_top_change": "change of 2/λ",
}
#: The unit at a name's end, which its value says.
UNIT = re.compile(r"_(bytes|ms|seconds|flops)$")
SHARES = ("accuracy", "sparsity", "density", "share", "top1", "flips", "acceptance", "held_out_error")
NATS = ("loss", "kl", "measured_change", "predicted_change", "change")


def told(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of each fact in words, an interval beside the number that it is of; tables and lists
    among them are left out.
    """
    shown = {name: value for name, value in facts.items() if not isinstance(value, (dict, list))}
    ends = {name + end for name in shown for end in ("_low", "_high")}
    for name in sorted(shown, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        if name in ends:
            continue
        value = with_unit(name, shown[name])
        if {f"{name}_low", f"{name}_high"} <= shown.keys():
            low, high = (with_unit(name, shown[f"{name}_{end}"]) for end in ("low", "high"))
            value += f" ({low.partition(' ')[0]} to {high.partition(' ')[0]})"
        yield WORDS.get(name, UNIT.sub("", name).replace("_", " ")), value


def with_unit(name: str, value: Any) -> str:
    """A fact's value with its unit, by the fact's name."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not known" if math.isnan(value) else str(value)
    last = name.removesuffix("_low").removesuffix("_high")
    if last.endswith("bytes") or last == "size":
        return in_bytes(value)
    if any(last == share or last.endswith(f"_{share}") for share in SHARES) and -1 <= value <= 1:
        return f"{100 * value:.4g} %"
    for ending, unit in (("_ms", "ms"), ("_seconds", "s"), ("seconds", "s"), ("_flops", "FLOPs")):
        if last.endswith(ending):
            return f"{value:.4g} {unit}"
    if any(last == nats or last.endswith(f"_{nats}") for nats in NATS):
        return f"{value:.5g} nats"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def in_bytes(value: float) -> str:
    """51148 -> '51.1 kB'"""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} bytes"
