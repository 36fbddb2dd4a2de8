"""An invertible change of a layer's input coordinates: what it does to weights, inputs and second moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.quantized.kronecker import kronecker
from workbench.quantization.transform.hadamard_orders import mixed


@dataclass(frozen=True)
class Transform:
    """T = diag(scale), then a rotation (signs times a Hadamard matrix on consecutive blocks of
    `block` inputs, see `hadamard_orders`), then left kron right.

    scale : (..., in) positive, or None;  signs : (in,) of +-1, or None (no rotation)
    left, right : (..., a, a) and (..., b, b) invertible with a b = in, or both None; a dense matrix is a = 1
    orthogonal : left and right are, so their transposes are their inverses
    """

    scale: Tensor | None = None
    signs: Tensor | None = None
    block: int = 0
    left: Tensor | None = None
    right: Tensor | None = None
    orthogonal: bool = False

    def weight(self, weight: Tensor) -> Tensor:
        """W T for a matrix (..., out, in)."""
        if self.scale is not None:
            weight = weight * self.scale.unsqueeze(-2)
        if self.signs is not None:
            weight = mixed(weight * self.signs.to(weight.dtype), self.block)
        if self.left is None or self.right is None:
            return weight
        return kronecker(weight, self.left.mT, self.right)

    def weight_back(self, weight: Tensor) -> Tensor:
        if self.left is not None and self.right is not None:
            weight = kronecker(weight, self.inverse(self.left).mT, self.inverse(self.right))
        if self.signs is not None:
            weight = mixed(weight, self.block, back=True) * self.signs.to(weight.dtype)
        return weight if self.scale is None else weight / self.scale.unsqueeze(-2)

    def inputs(self, inputs: Tensor) -> Tensor:
        """T^-1 x for rows (..., in)."""
        if self.scale is not None:
            inputs = inputs / self.scale
        if self.signs is not None:
            inputs = mixed(inputs * self.signs.to(inputs.dtype), self.block)
        return (
            inputs
            if self.left is None or self.right is None
            else kronecker(inputs, self.inverse(self.left), self.inverse(self.right).mT)
        )

    def inputs_back(self, inputs: Tensor) -> Tensor:
        if self.left is not None and self.right is not None:
            inputs = kronecker(inputs, self.left, self.right.mT)
        if self.signs is not None:
            inputs = mixed(inputs, self.block, back=True) * self.signs.to(inputs.dtype)
        return inputs if self.scale is None else inputs * self.scale

    def gram(self, gram: Tensor) -> Tensor:
        """Second moment of the transformed inputs."""
        return self.inputs(self.inputs(gram).mT).mT

    def detached(self) -> Transform:
        scale, left, right = (None if t is None else t.detach() for t in (self.scale, self.left, self.right))
        return replace(self, scale=scale, left=left, right=right)

    def inverse(self, factor: Tensor) -> Tensor:
        return factor.mT if self.orthogonal else torch.linalg.inv(factor)

    @property
    def bytes(self) -> float:
        """What is stored besides the weights: 16 bits a scale or matrix entry, one bit a sign."""
        numbers = sum(t.numel() for t in (self.scale, self.left, self.right) if t is not None)
        return 2 * numbers + (0 if self.signs is None else self.signs.numel() / 8)

    @property
    def tensors(self) -> dict[str, Any]:
        """What a change has to keep, by the names of its buffers."""
        named = {"smooth": self.scale, "signs": self.signs, "left": self.left, "right": self.right}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor | None], block: int = 0, orthogonal: bool = False
    ) -> Transform | None:
        """The transform of `tensors` (its property's names); None when all are missing."""
        smooth, signs, left, right = (tensors.get(name) for name in ("smooth", "signs", "left", "right"))
        return (
            None
            if smooth is None and signs is None and left is None
            else cls(smooth, signs, block, left, right, orthogonal)
        )


def haar(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal (width, width), float64, from the Haar measure (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * torch.sign(r.diagonal())


def half(scale: Tensor) -> Tensor:
    """Scales as stored, in 16 bits."""
    return scale.clamp(1e-4, 1e4).to(torch.float16).float()
