"""Subjects from a plain `nn.Module` and tensors: the class axis, the missing targets and the loss are what
the task declares, and are checked on the first examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.subjects.changes import Change, stacks_of
from workbench.subjects.subject import Split, Subject
from workbench.subjects.tasks import TASK, CustomLoss, ModuleTask, Task
from workbench.subjects.text import cut


def from_module(
    module: nn.Module,
    data: Any,
    loss: Any,
    name: str,
    seed: int,
    class_axis: int | None = None,
    ignored: int = -100,
    items: Callable[[dict[str, Tensor]], int] | None = None,
) -> Subject:
    """A plain module called as `module(inputs)`; data holds tensors `inputs` and `labels`."""
    if not isinstance(data, dict) or not data:
        raise BadInput(
            "data: a plain module needs data={'inputs': tensor, 'labels': "
            "tensor}, or one such dict for each split"
        )
    if not any(True for _ in module.parameters()):
        raise BadInput("subject: the module has no parameters; there is nothing to measure or compress")
    check_plain(module)
    if all(isinstance(v, dict) for v in data.values()):
        splits = {split: as_tensors(columns, f" of the split {split!r}") for split, columns in data.items()}
    else:
        splits = cut(as_tensors(data), seed)
    first = next(iter(splits.values()))
    if "inputs" not in first or ("labels" not in first and not callable(loss)):
        raise BadInput(f"data: columns are {', '.join(first)}; inputs and labels are needed")
    kinds = {"cross_entropy": "classification", "squared_error": "module-regression"}
    if loss is None:
        loss = "cross_entropy" if not first["labels"].is_floating_point() else "squared_error"
    if not callable(loss) and loss not in kinds:
        raise BadInput(
            f"loss: {loss!r} is unknown; give cross_entropy, squared_error or a function (output, "
            "batch) -> scalar"
        )
    task: Task = CustomLoss(function=loss, counted=items) if callable(loss) else TASK[kinds[loss]].value()
    if not callable(loss):
        check_targets(splits)
    made = Subject(name, module.eval(), task, splits, data_note="tensors given in Python")
    try:
        with torch.no_grad():
            batch = next(made.batches(next(iter(splits)), 2))
            if isinstance(task, ModuleTask):
                made.task = declared(task, task.output(module, batch), splits, class_axis, ignored)
            value = made.loss(batch)
    except (RuntimeError, TypeError, IndexError) as error:
        raise BadInput(
            f"data: the module failed on the first two examples: {str(error).splitlines()[0]}"
        ) from None
    if value.ndim != 0:
        raise BadInput(f"loss: must be a scalar mean over examples, got shape {tuple(value.shape)}")
    check_mean(made)
    return made


def as_tensors(columns: Mapping[str, Any], whose: str = "") -> Split:
    """Columns of one length; arrays and lists of numbers become tensors."""
    found: Split = {}
    for name, column in columns.items():
        try:
            found[name] = column if isinstance(column, Tensor) else torch.as_tensor(column)
        except (TypeError, ValueError, RuntimeError):
            kind = type(column).__name__
            raise BadInput(f"data: the column {name!r}{whose} is a {kind}, not a tensor of numbers") from None
    lengths = {name: len(column) if column.ndim else 0 for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise BadInput(f"data: the columns{whose} have not one number of examples ({told}); give one")
    return found


def check_plain(module: nn.Module) -> None:
    """`BadInput` for a weight that is computed from others at every step: it could be neither changed nor
    saved.
    """
    for path, part in module.named_modules():
        for tensor, stack in stacks_of(part).items():
            if foreign := next((change for change in stack if not isinstance(change, Change)), None):
                kind = type(foreign).__name__.lstrip("_")
                advice = f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r})"
                raise BadInput(
                    f"subject: {tensor} of {path!r} is computed ({kind}); make it plain by {advice}"
                )
        if isinstance(vars(part).get("weight"), Tensor):
            raise BadInput(
                f"subject: weight of {path!r} is computed by a hook; make it plain by "
                "torch.nn.utils.remove_weight_norm or remove_spectral_norm"
            )


def check_targets(splits: Mapping[str, Split]) -> None:
    """`BadInput` for numbers to predict that are none."""
    for name, split in splits.items():
        lost = ~split["labels"].isfinite()
        if lost.any():
            row = int(lost.flatten(1 if lost.ndim > 1 else 0).nonzero()[0, 0])
            raise BadInput(
                f"labels: example {row} of split {name!r} is nan or inf; leave out what has no target, "
                "or give a loss and items=function(batch) that do"
            )


def declared(
    task: ModuleTask, output: Tensor, splits: dict[str, Split], class_axis: int | None, ignored: int
) -> ModuleTask:
    """The task with its class axis and its ignored label, which the labels of every split must fit."""
    labels = next(iter(splits.values()))["labels"]
    shape, wanted = tuple(output.shape[1:]), tuple(labels.shape[1:])
    axes = {
        axis
        for axis in {1, output.ndim - 1}
        if output.ndim > 1
        and (shape if labels.is_floating_point() else shape[: axis - 1] + shape[axis:]) == wanted
    }
    told = f"class_axis: the output (batch, {', '.join(map(str, shape))}) "
    if class_axis is not None:
        if class_axis % output.ndim not in axes:
            raise BadInput(
                f"{told}does not fit labels (batch, {', '.join(map(str, wanted))}) along axis {class_axis}; "
                f"accepted: {', '.join(map(str, sorted(axes))) or 'none'}"
            )
        axes = {class_axis % output.ndim}
    if len(axes) == 2:
        raise BadInput(
            f"{told}fits the labels (batch, {', '.join(map(str, wanted))}) along axis 1 and axis "
            f"{output.ndim - 1}; give class_axis=1 or class_axis=-1"
        )
    integers = {axis for axis in {1, output.ndim - 1} if shape[: axis - 1] + shape[axis:] == wanted}
    if not axes and output.ndim > 1 and labels.is_floating_point() and integers:
        raise BadInput(
            f"labels: are {str(labels.dtype).removeprefix('torch.')}, and classes are integers: give "
            "labels.long(); floats are chances of the classes, in the output's shape"
        )
    if not axes:
        raise BadInput(
            f"labels: shape (batch, {', '.join(map(str, wanted))}) fits no axis of classes of the output "
            f"(batch, {', '.join(map(str, shape))}); give one label for each item"
        )
    axis = axes.pop()
    classes = output.shape[axis]
    if classes == 1:
        raise BadInput(
            f"{told}has one class, and the cross-entropy of one class is 0 whatever the module computes: "
            "give an output for each class, or a loss of your own (binary_cross_entropy_with_logits)"
        )
    for name, split in splits.items():
        given = split["labels"]
        if given.is_floating_point():
            continue
        wrong = (given != ignored) & ((given < 0) | (given >= classes))
        if wrong.any():
            value = int(given[wrong][0])
            raise BadInput(
                f"labels: {value} is no class of the {classes} (0 to {classes - 1}), in split {name!r}; "
                f"give ignored={value} if it marks what has no label"
            )
    return ModuleTask(class_axis=-1 if axis == output.ndim - 1 else axis, ignored=ignored)


def check_mean(on: Subject, examples: int = 8) -> None:
    """`BadInput` when a user's loss is no mean over its items, or a network's answer depends on what else is
    in the batch: a batch's total is not its parts'.
    """
    coarse = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in on.model.parameters())
    tolerance = 3e-2 if coarse else 1e-4
    split = next(iter(on.splits))
    whole = next(on.batches(split, examples, examples))
    parts = list(on.batches(split, 1, examples))

    def total(batch: dict[str, Tensor]) -> float:
        count = on.task.items(batch)
        return float(on.loss(batch)) * count if count else 0.0

    with torch.no_grad():
        together, again = total(whole), total(whole)
        try:
            apart = sum(total(part) for part in parts)
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadInput(
                f"subject: the module takes no batch of one example ({str(error).splitlines()[0][:120]}); "
                "a loss has to be one of single examples"
            ) from None
    close = abs(together - apart) <= tolerance * max(abs(together), abs(apart), 1e-6)
    if math.isfinite(together) and together == again and not close:
        count = on.task.items(whole)
        if not isinstance(on.task, CustomLoss):
            raise BadInput(
                "subject: what the module computes for an example depends on the others of its batch: "
                f"{count} items together have the loss {together / count:.6g}, one example at a time "
                f"{apart / count:.6g}; statistics and products over the batch are not supported"
            )
        raise BadInput(
            f"loss: is no mean over examples: {count} items together give {together / count:.6g} and one "
            f"example at a time {apart / count:.6g}; return the mean over the examples, or give "
            "items=function(batch) -> the number of items that it is a mean over"
        )
