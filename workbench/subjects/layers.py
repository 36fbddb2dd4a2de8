"""Layers: the weight matrices that compression and per-layer curvature work on, chosen by glob.

A layer is a matrix (out, in), or a stack of them (experts, out, in) for mixture-of-experts weights, wherever
the module keeps it: `nn.Linear.weight`, GPT-2's transposed `Conv1D.weight`, a fused expert parameter.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import BadInput
from workbench.storage.resident import disk, let_go
from workbench.subjects.changes import (
    Change,
    attach,
    changes_of,
    detach,
    holder_of,
    is_shared,
    original_of,
    restack,
    write,
)


@dataclass(frozen=True)
class Layer:
    """One weight matrix of the model, always seen as (..., out, in)."""

    name: str
    module: nn.Module
    tensor: str = "weight"
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The effective weight (..., out, in): after mask, number format and low-rank terms."""
        value = getattr(self.module, self.tensor)
        return value.mT if self.transposed else value

    @property
    def original(self) -> nn.Parameter:
        """The trainable parameter underneath, in the module's own orientation."""
        return original_of(self.module, self.tensor)

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, "bias", None) if self.tensor == "weight" else None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., out, in)"""
        shape = tuple(self.original.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def changes(self) -> list[Change]:
        return changes_of(self.module, self.tensor)

    def let_go(self) -> None:
        """Give back what lies in files; the next to read it gets it again."""
        let_go([self.original, *(buffer for change in self.changes for buffer in change.buffers())])

    @property
    def shared(self) -> bool:
        """True while the parameter underneath has the memory of another model's (`Subject.copy`)."""
        return is_shared(self.original)

    def write(self, weight: Tensor) -> None:
        """Set the parameter underneath from a matrix (..., out, in); changes stay on top of it."""
        write(*holder_of(self.module, self.tensor), weight.mT if self.transposed else weight)

    @torch.no_grad()
    def shift_bias(self, shift: Tensor) -> None:
        """Add to the bias, which this layer must have."""
        bias = self.bias
        assert bias is not None
        write(self.module, "bias", bias + shift)

    def attach(self, change: Change) -> None:
        """Put a change (mask, number format, low-rank term) on this weight."""
        attach(self.module, self.tensor, change, self.transposed)

    def detach(self, change: Change) -> None:
        """Take one change off this weight, keeping the others and the parameter underneath."""
        detach(self.module, self.tensor, change)

    def restack(self, changes: Iterable[Change]) -> None:
        """Let this changed weight carry these changes, innermost first, and no others."""
        restack(self.module, self.tensor, changes)


def all_layers(model: nn.Module) -> list[Layer]:
    """Every weight matrix: linears, Conv1Ds and fused experts;
    a tied weight (shared with an embedding) is left out.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    found, seen = [], set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            candidates = [Layer(name or "model", module, "weight", isinstance(module, Conv1D))]
        elif "experts" in type(module).__name__.lower():
            names = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
            names += [n for n in getattr(module, "parametrizations", {}) if n not in names]
            turned = bool(getattr(module, "is_transposed", False))
            candidates = [Layer(f"{name}.{n}", module, n, turned) for n in sorted(names)]
        else:
            continue
        for layer in candidates:
            if id(layer.original) not in embeddings and id(layer.original) not in seen:
                seen.add(id(layer.original))
                found.append(layer)
    return found


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks (encoder then decoder), in forward order:
    members of module lists that hold at least one layer.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(block + ".") for block, _ in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found += [
                (f"{name}.{i}", block)
                for i, block in enumerate(module)
                if any(isinstance(m, (nn.Linear, Conv1D)) for m in block.modules())
            ]
    return found


def weights_in_turn(layers: Iterable[Layer]) -> Iterator[Tensor]:
    """The layers' weights (..., out, in), each given back when the next is asked for."""
    for layer in layers:
        yield layer.weight.detach()
        layer.let_go()


@contextlib.contextmanager
def block_after_block(model: nn.Module) -> Iterator[None]:
    """Inside, a run that holds one block's worth gives back a block when it has answered."""
    if disk() is None:
        yield
        return

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        let_go([*module.parameters(), *module.buffers()])

    hooks = [module.register_forward_hook(leave) for _, module in blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def select(model: nn.Module, glob: str = "blocks", least: int = 1) -> list[Layer]:
    """Layers by comma-separated globs over their names; `blocks` means all those inside the repeated blocks
    (heads excluded).
    """
    layers = all_layers(model)
    if not layers:
        raise BadInput("layers: the model holds no linear weight; instruments that change weights need one")
    if glob == "blocks":
        prefixes = tuple(name + "." for name, _ in blocks(model))
        chosen = [layer for layer in layers if layer.name.startswith(prefixes)] if prefixes else layers
    else:
        patterns = [part.strip() for part in glob.split(",")]
        chosen = [layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, p) for p in patterns)]
    if len(chosen) < least:
        examples = ", ".join(layer.name for layer in layers[:3])
        raise BadInput(
            f"layers: {glob!r} matches no layer; names look like {examples} ({len(layers)} in all), "
            "globs like '*.query' or '*' are accepted"
        )
    return chosen


@torch.no_grad()
def revived(before: nn.Module, after: nn.Module) -> int:
    """Weights that were zero in one model and are not in the other, in layers that both have and that were
    neither dense nor all zero.
    """
    found, count = {layer.name: layer for layer in all_layers(after)}, 0
    for layer in all_layers(before):
        other = found.get(layer.name)
        if other is None or other.shape != layer.shape:
            continue
        zero = layer.weight == 0
        if zero.any() and not zero.all():
            count += int((zero & (other.weight.to(zero.device) != 0)).sum())
            other.let_go()
        layer.let_go()
    return count


def plain_experts(model: nn.Module) -> nn.Module:
    """Mixture-of-experts models compute expert by expert: grouped kernels hide each expert's inputs and have
    no second derivative.
    """
    choose = getattr(model, "set_experts_implementation", None)
    chooses = getattr(model, "_can_set_experts_implementation", None)
    if choose is not None and chooses is not None and chooses():
        choose("eager")
    return model
