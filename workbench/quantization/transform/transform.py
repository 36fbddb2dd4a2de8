"""The axis of equivalent transforms: W x = (W T)(T^-1 x), rounded in the transform's coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.axis import Axis, Choice, Options, parameter, warn

if TYPE_CHECKING:
    from workbench.quantization.rounding.problem import Problem
    from workbench.quantization.transform.coordinates import Transform


def old_name(text: str) -> Mapping[str, Any] | None:
    """A name of one release ago."""
    if text != "awq":
        return None
    warn("transform awq is called activation-aware now; what its authors do is `equalize` of kind awq")
    return {"name": "activation-aware"}


#: `entry(problem, options)` gives a `Transform`, or None for the model's own coordinates. Traits say what it
#: asks for ("needs ranges", "needs rows" of the inputs) and that it "mixes inputs", so zeros do not stay.
TRANSFORM = Axis(
    "transform",
    "equivalent transform in whose coordinates rounding happens (online)",
    found_in="workbench.quantization.transform",
    home="quantize.transform",
    shorthand=old_name,
)


class TransformSteps(Options):
    steps: int = parameter(300, "optimizer steps", ge=1, le=10000, scale="log")


def in_coordinates(
    problem: Problem, transform: Choice | str, **options: Any
) -> tuple[Problem, Transform | None]:
    """The problem in the coordinates of a transform, and that transform."""
    found: Transform | None = TRANSFORM.chosen(transform, **options)(problem)
    return (problem, None) if found is None else (problem.moved(found), found)
