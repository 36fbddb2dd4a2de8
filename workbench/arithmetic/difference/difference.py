"""The axis of differences: how what fine-tuning has added to a matrix is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workbench.axis import Axis, Choice

#: An entry is a class, made of its options, of packings: see `Packing`.
#: Traits: "strength" and "density" where an option of this name may be searched, "surveyed" where the packing
#: looks at all differences before it packs one (`survey`), "learned" where it has a `learn(course)`.
DIFFERENCE = Axis(
    "difference",
    "how a fine-tune's difference from its base is stored",
    found_in="workbench.arithmetic.difference",
    home="delta.method",
)

#: What is stored of a matrix: tensors by a short name, in the types they take on disk.
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) of the fine-tune and of the base, float32.

    gram : () -> (in, in) second moment of what it reads, of methods that need inputs
    seed : of its own draws
    """

    name: str
    base: Tensor
    tuned: Tensor
    seed: int = 0
    gram: Callable[[], Tensor] | None = None

    @property
    def difference(self) -> Tensor:
        return self.tuned - self.base


class Packing(Protocol):
    """A way to store a difference. What `unpack` gives is float32 and depends on nothing but its arguments,
    so that a stored difference is the same weight wherever it is opened.
    """

    def __init__(self, options: Any) -> None: ...

    def pack(self, matrix: Matrix) -> Stored: ...

    def unpack(self, stored: Stored, base: Tensor) -> Tensor: ...


def packing_of(chosen: Choice) -> Packing:
    made: Packing = chosen.value(chosen.options)
    return made


def bytes_of(stored: Stored) -> int:
    return sum(value.numel() * value.element_size() for value in stored.values())


def half(value: Tensor) -> Tensor:
    """16-bit floats; a number beyond their range becomes the largest."""
    return value.clamp(-65504.0, 65504.0).to(torch.float16)
