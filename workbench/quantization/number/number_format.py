"""The axis of number formats, and the texts that stand for one with options: int4, e3m4, fixed8.4, nf4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from workbench.axis import Axis


def read(text: str) -> Mapping[str, Any] | None:
    """`uint3` -> {name: int, bits: 3, symmetric: False}; None for a text that stands for no format."""
    if found := re.fullmatch(r"(u?)int(\d{1,2})(-odd)?", text):
        if found[1] and found[3]:
            return None
        odd = {"full": False} if found[3] else {}
        return {"name": "int", "bits": int(found[2]), "symmetric": not found[1]} | odd
    if found := re.fullmatch(r"e(\d)m(\d{1,2})(fn|ieee)?", text):
        special = found[3] or "finite"
        return {"name": "ExMy", "exponent": int(found[1]), "mantissa": int(found[2]), "special": special}
    if found := re.fullmatch(r"fixed(\d{1,2})\.(\d{1,2})", text):
        return {"name": "fixed", "width": int(found[1]), "fraction": int(found[2])}
    if found := re.fullmatch(r"(nf|quantile)(\d)", text):
        return {"name": found[1], "bits": int(found[2])}
    return None


#: `entry(options)` gives a `Format`.
NUMBER_FORMAT = Axis(
    "number-format",
    "format: int4, uint4, e4m3fn, e3m4 (ExMy), bf16, nf4, mxfp4, nvfp4, ternary, binary, fixed8.4, ...",
    found_in="workbench.quantization.number.formats",
    shorthand=read,
    home="quantize.format",
)
