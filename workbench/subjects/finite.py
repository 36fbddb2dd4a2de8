"""Where numbers that are not finite arise: the first tensor, layer, batch or gradient that holds one.

NaN spreads: a Cholesky factor, a sort or a search for a threshold that meets one fails far from its cause,
or never ends. So weights and inputs are looked at before anything is computed with them, and an instrument
that fails or returns NaN is explained by the first place at which the model's own numbers stop being finite.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.storage.resident import let_go
from workbench.subjects.layers import block_after_block

Splits = Mapping[str, Mapping[str, Tensor]]
#: Examples that the model is tried with before an instrument runs, and when its failure is explained.
TRIED = 2
EXPLAINED = 128
#: Bytes of the weights of a model whose derivatives are tried too.
DIFFERENTIATED = 200_000_000


def said(value: Tensor) -> str:
    """What is not finite in a tensor, in words: `3 of 64 values are NaN`."""
    missing, infinite = int(value.isnan().sum()), int(value.isinf().sum())
    kinds = [f"{count} NaN" for count in (missing,) if count] + [f"{n} infinite" for n in (infinite,) if n]
    return f"{' and '.join(kinds)} of {value.numel()} values"


def holds(value: Tensor, infinite: bool = True) -> bool:
    """True when a tensor holds NaN, or infinity where that counts too."""
    if not (value.is_floating_point() or value.is_complex()) or not value.numel() or value.is_meta:
        return False
    value = value.detach()
    if value.element_size() < 2:  # float8: torch sums none of them
        value = value.float()
    if value.sum().isfinite():  # one pass without a copy; a sum that overflows says nothing
        return False
    return bool((~value.isfinite() if infinite else value.isnan()).any())


def check(model: nn.Module, splits: Splits, targets: str) -> None:
    """Raise `BadInput` for weights, buffers and inputs that are not finite.

    Buffers and columns called masks may hold infinities, and targets NaN where an example has none.
    """
    for name, value in model.named_parameters():
        if holds(value):
            raise BadInput(
                f"subject: the weight {plain(name)!r} holds nan or inf ({said(value.detach())}); "
                "open another checkpoint, or repair it"
            )
        let_go([value])
    for name, kept in model.named_buffers():
        if holds(kept, infinite=False):
            raise BadInput(
                f"subject: the buffer {plain(name)!r} holds nan ({said(kept)}); "
                "open another checkpoint, or repair it"
            )
    for split, columns in splits.items():
        for name, column in columns.items():
            if name != targets and holds(column, infinite="mask" not in name):
                first = int((~column.isfinite()).flatten(1 if column.ndim > 1 else 0).nonzero()[0, 0])
                raise BadInput(
                    f"data: the column {name!r} of the split {split!r} holds nan or inf "
                    f"({said(column)}, first in example {first}); leave such examples out"
                )


def plain(name: str) -> str:
    """A parameter's name without what a change puts around it."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def check_outputs(subject: Any, examples: int = TRIED) -> None:
    """Raise `BadInput` when the loss of the first examples of a split is not finite: a model whose weights
    are, but whose activations overflow.
    """
    for split in subject.splits:
        if (told := first_place(subject, split, examples, gradients=False)) is not None:
            raise BadInput(told)
        return


def explanation(subject: Any) -> str | None:
    """The first place at which a subject's own numbers are not finite, by split and batch; None when all
    that is tried is. Derivatives of a large model, which take many times its memory, are not tried.
    """
    small = sum(p.nbytes for p in subject.model.parameters()) <= DIFFERENTIATED
    for split in subject.splits:
        if (told := first_place(subject, split, EXPLAINED, gradients=small)) is not None:
            return told
    return None


@torch.no_grad()
def measured_loss(subject: Any, batch: Any) -> float:
    with block_after_block(subject.model):
        return float(subject.task.measured(subject.model, batch)[0])


def first_place(subject: Any, split: str, examples: int, gradients: bool) -> str | None:
    model: nn.Module = subject.model
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(subject.batches(split, min(16, examples), examples)):
            if not subject.task.items(batch):
                continue
            where = f"in batch {number} of the split {split!r}"
            if not gradients and math.isfinite(measured_loss(subject, batch)):
                continue  # a language model that nobody watches forms no logits, and no gradient of its head
            with watched(model) as found, torch.set_grad_enabled(gradients):
                loss = subject.loss(batch)
            if holds(loss):
                first = found[0] if found else "the loss is the first that is, every layer's output is finite"
                return f"subject: its loss is {float(loss):g} {where}: {first}"
            if gradients and loss.requires_grad:
                named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
                if (told := first_gradient(loss, named)) is not None:
                    return (
                        f"subject: {told} {where}; the loss is finite, so look for an overflow, a root, a "
                        "logarithm or a quotient at zero behind it"
                    )
    except BadInput:
        raise
    except Exception:  # a model that cannot be called is not what is looked for here
        return None
    finally:
        model.train(was_training)
    return None


def first_gradient(loss: Tensor, named: list[tuple[str, nn.Parameter]]) -> str | None:
    """The last weight whose first or second derivative (its product with ones) is not
    finite: derivatives are computed from the last layer to the first.
    """
    weights = [weight for _, weight in named]
    grads = torch.autograd.grad(loss, weights, allow_unused=True, create_graph=True)
    told = last_of("the gradient", named, grads)
    used = [grad for grad in grads if grad is not None and grad.requires_grad]
    if told is not None or not used:
        return told
    along = sum((grad * torch.ones_like(grad)).sum() for grad in used)
    assert isinstance(along, Tensor)
    return last_of("the second derivative", named, torch.autograd.grad(along, weights, allow_unused=True))


def last_of(what: str, named: list[tuple[str, nn.Parameter]], found: tuple[Tensor | None, ...]) -> str | None:
    for (name, _), value in reversed(list(zip(named, found, strict=True))):
        if value is not None and holds(value):
            return f"{what} of {plain(name)!r} is not finite ({said(value.detach())})"
    return None


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """The modules whose outputs are not finite, in the order in which they finish."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor) and holds(value):
                found.append(
                    f"the output of {name!r} ({type(module).__name__}) is the first that is not finite "
                    f"({said(value.detach())}); scale its weights or its inputs down, or compute wider"
                )
                return

    handles = [
        module.register_forward_hook(lambda module, given, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
