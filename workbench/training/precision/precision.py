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

SPELLED = re.compile(r"(\S+)(?: rotation (\d+))?(?: gradients (\S+))?")


def number_format(text: str) -> Mapping[str, Any] | None:
    """`int8`, `int8 rotation 2` with Hadamard rotations, or `e4m3fn gradients e5m2`, as options of `rounded`.

    The formats are looked up by their axis, not imported: what trains in float32 does not depend on them.
    """
    found = SPELLED.fullmatch(text)
    if found is None:
        return None
    name, rotation, gradients = found.groups()
    try:
        for each in (name, gradients):
            if each is not None:
                axis("number-format").chosen(each)
    except BadInput:
        return None
    options: dict[str, Any] = {"rotation": int(rotation)} if rotation else {}
    return (
        {"name": "rounded", "format": name} | options | ({"gradient_format": gradients} if gradients else {})
    )


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
