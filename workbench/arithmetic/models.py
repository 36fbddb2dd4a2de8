"""A base and the models made from it, side by side: which tensors they share, and each taken in turn."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.arithmetic.sources import Source, block_of
from workbench.errors import BadInput
from workbench.progress import Progress


@dataclass(frozen=True)
class Parts:
    """One tensor of every model, float32.

    parents : (models, ...) the tensor in each, stacked;  seed : of this tensor's own draws
    """

    name: str
    base: Tensor
    parents: Tensor
    seed: int

    @functools.cached_property
    def differences(self) -> Tensor:
        """(models, ...) what each has added to the base."""
        return self.parents - self.base

    def generator(self) -> torch.Generator:
        """The same draws for a tensor whenever it is asked for."""
        return torch.Generator().manual_seed(self.seed)


#: `rule(parts, strength)` gives the merged tensor.
Rule = Callable[[Parts, float], Tensor]


@dataclass(frozen=True)
class Models:
    """names : tensors that all have, in the base's order
    left_out : those that a head or a vocabulary of another size keeps apart, with what differs
    """

    base: Source
    parents: tuple[Source, ...]
    names: tuple[str, ...]
    left_out: Mapping[str, str]
    seed: int = 0

    def parts(self, name: str) -> Parts:
        parents = torch.stack([parent.tensor(name) for parent in self.parents])
        seed = zlib.crc32(f"{self.seed} {name}".encode())
        return Parts(name, self.base.tensor(name), parents, seed)

    def each(self, progress: Progress | None = None, label: str = "") -> Iterator[Parts]:
        """Tensor by tensor; a few are held at a time."""
        names = progress.track(self.names, label) if progress is not None and label else self.names
        return (self.parts(name) for name in names)

    @property
    def numbers(self) -> int:
        """Numbers of all common tensors."""
        return sum(torch.Size(self.base.shapes[name]).numel() for name in self.names)


def side_by_side(base: Source, parents: Sequence[Source], seed: int = 0) -> Models:
    """Compare names and shapes, from headers alone. A tensor outside the repeated blocks that differs is a
    head or a vocabulary and is left out. `BadInput` for anything inside a block that differs.
    """
    names, left_out = list[str](), dict[str, str]()
    for name, shape in base.shapes.items():
        wrong = next((p for p in parents if p.shapes.get(name) != shape), None)
        if wrong is None:
            names.append(name)
            continue
        told = f"{list(wrong.shapes[name])} in {wrong.name}" if name in wrong else f"missing in {wrong.name}"
        if block_of(name):
            raise BadInput(
                f"parents: {name} is {list(shape)} in {base.name} and {told}; give models of one "
                "architecture and size"
            )
        left_out[name] = f"{list(shape)} in {base.name}, {told}"
    for parent in parents:
        more = [n for n in parent.shapes if n not in base.shapes]
        if inside := next((n for n in more if block_of(n)), ""):
            raise BadInput(
                f"parents: {inside} of {parent.name} is missing in {base.name}; give models of one "
                "architecture and size"
            )
        left_out |= {n: f"missing in {base.name}, {list(parent.shapes[n])} in {parent.name}" for n in more}
    if not names:
        raise BadInput(
            f"parents: {parents[0].name} and {base.name} have no tensor in common; give models of one "
            "architecture"
        )
    return Models(base, tuple(parents), tuple(names), left_out, seed)
