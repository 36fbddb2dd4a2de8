"""The matrices of a model by name, a stack of experts one after another, seen as (out, in)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.arithmetic.sources import own_tensors
from workbench.subjects import Subject


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: in the tensor `tensor` of the model, as number `expert` of a stack (None: it is
    no stack), the module keeping it as (in, out) where it is `transposed`.
    """

    name: str
    tensor: str
    layer: str
    parameter: Tensor
    expert: int | None = None
    transposed: bool = False

    def part(self, whole: Tensor | None) -> Tensor:
        """(out, in), float32, of a tensor that has the parameter's shape; zeros for none."""
        whole = torch.zeros_like(self.parameter) if whole is None else whole
        one = whole if self.expert is None else whole[self.expert]
        return (one.mT if self.transposed else one).detach().to("cpu", torch.float32)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        value = matrix.mT if self.transposed else matrix
        held = self.parameter if self.expert is None else self.parameter[self.expert]
        held.copy_(value)


def places_of(on: Subject, glob: str) -> dict[str, Place]:
    """The matrices of the layers that a glob chooses, of a model without changes on its weights."""
    names = {id(value): name for name, value in own_tensors(on.model).items()}
    found: dict[str, Place] = {}
    for layer in on.layers(glob):
        parameter = layer.original
        tensor = names[id(parameter)]
        experts: list[int | None] = list(range(len(parameter))) if parameter.ndim == 3 else [None]
        for expert in experts:
            name = tensor if expert is None else f"{tensor}[{expert}]"
            found[name] = Place(name, tensor, layer.name, parameter, expert, layer.transposed)
    return found
