"""The axis of precisions: in which numbers the forward and backward pass compute.

An entry is a function (subject, options) -> context manager in which the loss is computed, one that may be
entered again and again. Trait "loss-scaling": the loss is scaled dynamically, so that small gradients do not
underflow (Micikevicius et al. 2018).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.axis import Axis, axis
from workbench.errors import BadInput

if TYPE_CHECKING:
    from workbench.subjects import Subject

ROTATED = re.compile(r"(\S+) rotation (\d+)")


def number_format(text: str) -> Mapping[str, Any] | None:
    """`int8`, or `int8 rotation 2` with Hadamard rotations, as options of `rounded`.

    The formats are looked up by their axis, not imported: what trains in float32 does not depend on them.
    """
    found = ROTATED.fullmatch(text)
    name, rotation = (found[1], int(found[2])) if found else (text, 0)
    try:
        axis("number-format").chosen(name)
    except BadInput:
        return None
    return {"name": "rounded", "format": name} | ({"rotation": rotation} if rotation else {})


PRECISION = Axis(
    "precision",
    "precision of the forward and backward pass; a number format as int8 or e4m3fn rounds the operands of "
    "its matrix products",
    found_in=("workbench.training.precision.floating", "workbench.training.quantized_products"),
    shorthand=number_format,
    home="train.precision",
)


def arithmetic_of(
    subject: Subject, precision: str | Mapping[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """What the forward pass runs in; it may be entered again and again."""
    made: contextlib.AbstractContextManager[Any] = PRECISION.chosen(precision, "precision")(subject)
    return made
