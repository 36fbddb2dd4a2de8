"""Which weights a derivative is taken with respect to, and the state of the model while it is taken.

Coordinates are *effective* weights: where a weight carries changes (mask, number format, low-rank term),
the derivative is with respect to the value the layer multiplies with, so a pruned weight has a gradient like
any other. A weight used in several places (tied) is one coordinate block.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.curvature.operators.attention import twice_differentiable
from workbench.curvature.operators.precision import KeepDouble
from workbench.errors import BadInput
from workbench.subjects import Layer, select
from workbench.subjects.changes import original_of, stacks_of

WHOLE = ("all", "*")


@dataclass(frozen=True)
class Place:
    """Where a weight is kept: `module.tensor`; `transposed` when the module stores it as (in, out)."""

    name: str
    module: nn.Module
    tensor: str
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The trainable tensor underneath; its identity tells tied weights."""
        if parametrize.is_parametrized(self.module, self.tensor):
            return original_of(self.module, self.tensor)
        parameter = self.module._parameters[self.tensor]
        assert parameter is not None  # a place is made of a weight that is there
        return parameter


def place_of(layer: Layer) -> Place:
    return Place(layer.name, layer.module, layer.tensor, layer.transposed)


def trainable_places(model: nn.Module) -> list[Place]:
    """Every distinct trainable floating-point weight, in the model's order, tied ones once."""
    found: list[Place] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{path}.":
            continue
        # first, where a weight stands among a module's parameters
        names = [n for n, s in stacks_of(module).items() if any(p.requires_grad for p in s.parameters())]
        names += [
            n for n, p in module._parameters.items() if p is not None and p.requires_grad and n not in names
        ]
        for name in names:
            place = Place(f"{path}.{name}".lstrip("."), module, name)
            if id(place.parameter) not in seen and place.parameter.is_floating_point():
                seen.add(id(place.parameter))
                found.append(place)
    return found


def find_places(model: nn.Module, glob: str = "all") -> list[Place]:
    """`all` or `*`: every trainable weight; else layers by glob (matrices only),
    or parameters by glob over their full names.

    `BadInput` when nothing matches or the model has nothing to differentiate.
    """
    everything = trainable_places(model)
    if glob in WHOLE:
        if not everything:
            raise BadInput(
                "subject: the model has no trainable parameter, so there is no curvature to measure; "
                "set requires_grad on some"
            )
        return everything
    try:
        return [place_of(layer) for layer in select(model, glob)]
    except BadInput as error:
        patterns = [part.strip() for part in glob.split(",")]
        named = [p for p in everything if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in patterns)]
        if not named:
            raise error from None
        return named


@contextlib.contextmanager
def plain_weights(
    model: nn.Module, values: dict[tuple[nn.Module, str], Tensor] | None = None
) -> Iterator[None]:
    """Inside, every changed weight is an ordinary parameter holding its effective value;
    `values` replaces chosen ones.

    Originals are set aside, not written to, and come back on leaving.
    """
    values = values or {}
    kept: list[tuple[nn.Module, type, str, nn.Parameter | None]] = []
    try:
        for module in list(model.modules()):
            fresh = {
                n: getattr(module, n).detach() for n in stacks_of(module) if n not in module._parameters
            }  # nested: plain already
            replaced = {n for m, n in values if m is module}
            original = type(module)
            for name in fresh.keys() | replaced:
                kept.append((module, original, name, None if name in fresh else module._parameters[name]))
            if fresh:
                module.__class__ = original.__bases__[0]
            for name in fresh.keys() | replaced:
                value = values.get((module, name), fresh.get(name))
                assert value is not None
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, cls, name, before in reversed(kept):
            if before is None:
                module._parameters.pop(name, None)
            else:
                module._parameters[name] = before
            module.__class__ = cls


@contextlib.contextmanager
def differentiable(model: nn.Module, places: Sequence[Place]) -> Iterator[list[Tensor]]:
    """The effective weights at `places`, as leaves of the model's graph; only they require a gradient inside.

    Evaluation mode (dropout off), twice differentiable attention; everything is as before on leaving.
    """
    training = [(m, m.training) for m in model.modules()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(twice_differentiable())
        stack.enter_context(plain_weights(model))
        parameters = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
        if any(p.dtype == torch.float64 for p in parameters.values()):
            stack.enter_context(KeepDouble())
        flags = [(p, p.requires_grad) for p in parameters.values()]
        try:
            model.eval()
            for p, _ in flags:
                p.requires_grad_(False)
            leaves = [p.module._parameters[p.tensor] for p in places]
            for leaf in leaves:
                assert leaf is not None
                leaf.requires_grad_(True)
            yield leaves  # type: ignore[misc]
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
            for module, mode in training:
                module.training = mode


@contextlib.contextmanager
def with_weights(model: nn.Module, places: Sequence[Place], values: Sequence[Tensor]) -> Iterator[None]:
    """The model with other effective weights (in stored orientation) at `places`, tied uses included."""
    wanted = {id(p.parameter): v for p, v in zip(places, values, strict=True)}
    chosen: dict[tuple[nn.Module, str], Tensor] = {
        (p.module, p.tensor): v for p, v in zip(places, values, strict=True)
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                chosen[module, name] = wanted[id(parameter)]
    with plain_weights(model, chosen):
        yield


def check_finite(loss: Tensor, where: str) -> None:
    """`BadInput` when a batch's loss is not a finite number or carries no gradient."""
    if not loss.requires_grad:
        raise BadInput(
            f"loss: the loss of {where} does not depend differentiably on the chosen weights; "
            "choose other layers or a differentiable loss"
        )
    if not torch.isfinite(loss):
        raise BadInput(
            f"loss: the loss of {where} is {float(loss.detach())}; "
            "curvature needs a finite loss (check the data and the weights)"
        )
