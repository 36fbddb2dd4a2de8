"""The parts in which two models of one architecture differ, and putting a part of one into the other.

A part is a block, one kind of module (a role) in one block, or a role in all blocks. It is swapped as the
modules themselves are: weights, number formats, masks and what acts on activations go together.
"""

from __future__ import annotations

import contextlib
import copy
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.curvature.estimators.gauss_newton import gauss_newton_scores
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.subjects import Layer, Subject
from workbench.subjects.changes import Change, bake, baked, changes_of, restoring, stacks_of

OUTSIDE = "outside"


@dataclass(frozen=True)
class Part:
    """Modules that are swapped together.

    level : block, role or module;  block : "" where it is in several;  role : "" for a whole block
    """

    level: str
    block: str
    role: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        return ".".join(piece for piece in (self.block, self.role) if piece)


def parts_of(dense: Subject, changed: Subject) -> list[Part]:
    """Everything that differs: blocks, then roles, then modules, each in forward order. Modules outside of
    the blocks are parts by themselves among blocks and modules. A block of another build (heads or channels
    removed) has no modules to swap.
    """
    blocks = [name for name, _ in dense.blocks()]
    other = [name for name, _ in changed.blocks()]
    if blocks != other:
        raise BadInput(
            f"changed: {changed.name!r} has {len(other)} blocks and the reference {len(blocks)}; only models "
            "with the same blocks can be swapped part by part"
        )
    whole, fine = list[Part](), list[Part]()
    roles: dict[str, list[str]] = {}
    for block in blocks:
        names = differing(dense.model.get_submodule(block), changed.model.get_submodule(block))
        if names is None or names:
            whole.append(Part("block", block, "", (block,)))
        inside: dict[str, list[str]] = {}
        for name in names or ():
            inside.setdefault(role_of(name), []).append(f"{block}.{name}" if name else block)
        for role, modules in inside.items():
            fine.append(Part("module", block, role, tuple(modules)))
            roles.setdefault(role, []).extend(modules)
    for name in outside(dense.model, changed.model, blocks):
        whole.append(Part("block", OUTSIDE, name, (name,)))
        fine.append(Part("module", OUTSIDE, name, (name,)))
    return [*whole, *(Part("role", "", role, tuple(names)) for role, names in roles.items()), *fine]


def role_of(name: str) -> str:
    """`mlp.experts.7.up` -> `mlp.experts.*.up`: the experts of one block are one part."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters, persistent buffers or changes of their own, by name."""
    found = {}
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        if stacks_of(module) or next(module.parameters(recurse=False), None) is not None or module._buffers:
            found[name] = module
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The values that a module computes with: parameters, changed weights as they come out, buffers."""
    found = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    found |= {name: value for name, value in module.named_buffers(recurse=False)}
    found |= {name: getattr(module, name).detach() for name in stacks_of(module)}
    return found


@torch.no_grad()
def differing(dense: nn.Module, changed: nn.Module) -> list[str] | None:
    """Names of the modules that do not compute the same; None where the two are not built alike."""
    mine, others = owners(dense), owners(changed)
    if list(mine) != list(others):
        return None
    found = []
    for name, module in mine.items():
        same = alike(module, others[name])
        if same is None:
            return None
        if not same:
            found.append(name)
    return found


def alike(dense: nn.Module, changed: nn.Module) -> bool | None:
    """Whether two modules compute the same; None where their tensors have other names or shapes."""
    one, two = tensors_of(dense), tensors_of(changed)
    if one.keys() != two.keys() or any(one[name].shape != two[name].shape for name in one):
        return None
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (dense, changed)]
    kinds = [{type(c) for t in stacks_of(m) for c in changes_of(m, t)} for m in (dense, changed)]
    restores = any(kind.restored is not Change.restored for kind in kinds[0] ^ kinds[1])
    return hooks[0] == hooks[1] and not restores and all(torch.equal(one[name], two[name]) for name in one)


def outside(dense: nn.Module, changed: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the modules that differ and are in no block."""
    mine, others = owners(dense), owners(changed)
    within = tuple(f"{block}." for block in blocks)
    names = [n for n in mine if n and n not in blocks and not n.startswith(within)]
    found = []
    for name in names:
        same = alike(mine[name], others[name]) if name in others else None
        if same is None:
            raise BadInput(
                f"changed: its {name!r} is not built like the reference's; outside of the blocks only values "
                "may differ"
            )
        if not same:
            found.append(name)
    return found


@contextlib.contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the model has these modules in the places of its own."""
    before = []
    try:
        for name, module in modules.items():
            above, _, last = name.rpartition(".")
            parent = model.get_submodule(above)
            before.append((parent, last, parent.get_submodule(last)))
            parent._modules[last] = module
        with parametrize.cached():
            yield
    finally:
        for parent, last, own in reversed(before):
            parent._modules[last] = own


def taken(model: nn.Module, part: Part) -> dict[str, nn.Module]:
    """A part's modules out of a model."""
    return {name: model.get_submodule(name) for name in part.modules}


def pairs_in(dense: nn.Module, changed: nn.Module, part: Part) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, dense module, changed module) of all that hold weights in a part and have the same shapes."""
    for name in part.modules:
        one, two = dense.get_submodule(name), changed.get_submodule(name)
        others = owners(two)
        for inner, module in owners(one).items():
            if inner in others and alike(module, others[inner]) is not None:
                yield ".".join(piece for piece in (name, inner) if piece), module, others[inner]


@torch.no_grad()
def weight_error(dense: nn.Module, changed: nn.Module, part: Part) -> float:
    """|W' - W|^2 / |W|^2 over the tensors of a part that changed; NaN where shapes differ."""
    error = size = 0.0
    for _, one, two in pairs_in(dense, changed, part):
        others = tensors_of(two)
        for name, value in tensors_of(one).items():
            if value.is_floating_point() and not torch.equal(others[name], value):
                error += float((others[name].float() - value.float()).square().sum())
                size += float(value.float().square().sum())
    return error / size if size else float("nan")


@torch.no_grad()
def noisy(dense: nn.Module, changed: nn.Module, part: Part, seed: int) -> dict[str, nn.Module]:
    """The dense modules of a part, each changed tensor moved by Gaussian noise of the change's own norm."""
    found: dict[str, nn.Module] = {}
    for name, one, two in pairs_in(dense, changed, part):
        moved = bake(copy.deepcopy(one))
        others = tensors_of(two)
        touched = False
        for tensor, value in tensors_of(moved).items():
            norm = (others[tensor].float() - value.float()).norm() if value.is_floating_point() else 0.0
            if not float(norm):
                continue
            touched = True
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{name}.{tensor}".encode()))
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            getattr(moved, tensor).data.add_((noise * (norm / noise.norm())).to(value.dtype))
        if touched:
            found[name] = moved
    return found


def beside(dense: Subject, changed: Subject) -> tuple[Subject, Subject]:
    """Both on one device and in one dtype, ready to be swapped; what a change needs of the whole model
    is asked for on both.
    """
    wanted = next(iter(dense.model.parameters()))
    held = next(iter(changed.model.parameters()))
    if (held.dtype, held.device) != (wanted.dtype, wanted.device):
        changed = changed.copy()
        changed.model.to(wanted.device, wanted.dtype)
    changed.model.eval()
    asking = list(restoring(changed.model))
    if not asking:
        changed = changed.with_model(baked(changed.model))  # weights computed once, not at every swap
    else:
        dense = dense.copy()
        dense.model.eval()
        for change in asking:
            change.restored(dense.model)
    return dense, changed


class Deltas(Mapping[str, Sequence[Tensor]]):
    """Layer name -> [changed weight less the dense one], formed when it is asked for."""

    def __init__(self, dense: Sequence[Layer], changed: Sequence[Layer]) -> None:
        self.pairs = {one.name: (one, two) for one, two in zip(dense, changed, strict=True)}

    def __getitem__(self, name: str) -> Sequence[Tensor]:
        dense, changed = self.pairs[name]
        return [changed.weight.detach() - dense.weight.detach()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def second_order(
    dense: Subject,
    changed: Subject,
    parts: Sequence[Part],
    split: str,
    examples: int,
    draws: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """1/2 d.G d of each part in nats an item, d the change of its matrices and G Gauss-Newton's matrix of the
    dense model: what the divergence is for small changes. NaN for a part without a changed matrix.
    """
    mine = {layer.name: layer for layer in dense.layers("*")}
    pairs = [(mine[two.name], two) for two in changed.layers("*") if two.name in mine]
    pairs = [(one, two) for one, two in pairs if one.shape == two.shape and not one.weight.equal(two.weight)]
    if not pairs:
        return [float("nan")] * len(parts)
    layers = [one for one, _ in pairs]
    deltas = Deltas(layers, [two for _, two in pairs])
    scores = gauss_newton_scores(dense, layers, deltas, split, examples, draws, seed, progress)[:, :, 0]
    found = []
    for part in parts:
        inside = [
            place
            for place, layer in enumerate(layers)
            if any(layer.name == name or layer.name.startswith(f"{name}.") for name in part.modules)
        ]
        found.append(float(np.square(scores[:, inside].sum(1)).sum()) if inside else float("nan"))
    return found


class OutputScores:
    """Inside, some modules' answers are compared with those of their changed twins on the same inputs.

    sums : name -> [|y' - y|^2, |y|^2, y' y, |y'|^2]
    """

    def __init__(self, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = dict(pairs)
        self.sums = {name: [0.0] * 4 for name in pairs}

    def __enter__(self) -> OutputScores:
        self._handles = [
            dense.register_forward_hook(self._hook(name, changed), with_kwargs=True)
            for name, (dense, changed) in self.pairs.items()
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, changed: nn.Module) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            other = changed(*args, **kwargs)
            mine, theirs = (value if isinstance(value, Tensor) else value[0] for value in (output, other))
            if mine.shape != theirs.shape:
                return
            sums = self.sums[name]
            mine, theirs = mine.detach().float(), theirs.detach().float()
            for place, value in enumerate(
                (
                    (theirs - mine).square().sum(),
                    mine.square().sum(),
                    (mine * theirs).sum(),
                    theirs.square().sum(),
                )
            ):
                sums[place] += float(value)

        return see

    def of(self, names: Sequence[str]) -> tuple[float, float]:
        """(relative squared output error, 1 - cosine) over some modules; NaN where none was compared."""
        error, size, product, other = (
            sum(self.sums[n][i] for n in names if n in self.sums) for i in range(4)
        )
        if not size or not other:
            return float("nan"), float("nan")
        return error / size, max(0.0, 1 - product / (size * other) ** 0.5)
