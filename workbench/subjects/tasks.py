"""Tasks: how a batch becomes an output, a loss and metrics.
A new modality is a new task, registered by `@task(name, formula=...)`; nothing else changes.

A batch is a dict of tensors whose first dimension is the example. A task declares what its columns are
(`columns`): tokens and masks of which sequence, targets and the value that marks a missing one. Every loss is
the mean over *items* (examples, target tokens, pixels), those that have a target, so totals over batches are
exact: sum of `loss * items` divided by the sum of items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.axis import Axis
from workbench.errors import BadInput
from workbench.subjects.columns import DECODED, SOURCE, TARGET, TEXT, Column, ends
from workbench.subjects.vocabulary import Unspoken, unspoken, wide

Batch = dict[str, Tensor]
#: What `Task.measured` gives: the mean loss over the items, and sums over items of each metric.
Measured = tuple[float, dict[str, float]]
#: Gets a batch's output (`Unspoken` of a language model) and the batch; may give what it measured of them.
Seen = Callable[[Any, Batch], Measured | None]
Made = TypeVar("Made", bound="Task")


TASK = Axis("task", "how a batch becomes an output, a loss that is a mean over items, and metrics")


@dataclass(frozen=True)
class Task:
    """How a batch becomes a loss. `flat` gives (outputs, targets) with one row per item:
    what curvature and metrics need.
    """

    name: ClassVar[str] = ""
    loss_kind: ClassVar[str] = "cross_entropy"  # cross_entropy | squared_error | other
    targets: ClassVar[str] = "labels"
    missing: ClassVar[int] = -100  # the target of an item without one
    columns: ClassVar[Mapping[str, Column]] = {}

    def inputs(self, batch: Batch) -> Batch:
        return {k: v for k, v in batch.items() if k != self.targets}

    # ---- what follows from the declaration -----------------------------------------------------------------
    def real(self, batch: Batch) -> dict[str, Tensor]:
        """sequence -> (examples, positions), True where a mask column says that there is no padding;
        sequences without a mask are left out.
        """
        found: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            if column.role == "mask" and name in batch and batch[name].ndim == 2:
                mask = batch[name] != 0
                found[column.sequence] = mask & found[column.sequence] if column.sequence in found else mask
        return found

    def trimmed(self, batch: Batch) -> Batch:
        """Without the positions at the end of each sequence that no example of the batch uses. A batch with
        a column that the task does not declare is left as it is: it may run along any of them.
        """
        if any(name not in self.columns and value.ndim > 1 for name, value in batch.items()):
            return batch
        widths = {sequence: ends(real) for sequence, real in self.real(batch).items()}
        wanted = self.columns.get(self.targets)
        if wanted is not None and wanted.sequence in widths and self.targets in batch:
            known = ends(batch[self.targets] != self.missing)
            widths[wanted.sequence] = max(widths[wanted.sequence], known)
        return {
            name: value[:, : widths[self.columns[name].sequence]]
            if value.ndim > 1 and self.columns[name].sequence in widths
            else value
            for name, value in batch.items()
        }

    def lengths(self, batch: Batch) -> Tensor | None:
        """(examples,) real positions of each, over all sequences; None where no sequence has a mask."""
        real = list(self.real(batch).values())
        return torch.stack([each.sum(1) for each in real]).sum(0) if real else None

    def longest(self, batch: Batch) -> int:
        """Positions of the longest sequence without its padding; 1 where no column runs along one."""
        along = (v for k, v in batch.items() if k in self.columns and self.columns[k].sequence and v.ndim > 1)
        widest = max((value.shape[1] for value in along), default=1)
        lengths = self.lengths(batch)
        return widest if lengths is None or not len(lengths) else min(widest, max(int(lengths.max()), 1))

    def exported(self, model: nn.Module, batch: Batch) -> Batch:
        """The columns that a file of this model takes, in the dtypes of a file."""
        kinds = {name: column.exported for name, column in self.columns.items()}
        return {k: v.to(kinds.get(k) or v.dtype) for k, v in self.inputs(batch).items()}

    def free_axes(self, batch: Batch) -> dict[str, dict[int, str]]:
        """column -> axis -> what runs along it, for the axes whose length may change."""
        found: dict[str, dict[int, str]] = {}
        for name, value in batch.items():
            sequence = self.columns[name].sequence if name in self.columns else ""
            found[name] = {0: "batch"} | ({1: sequence} if sequence and value.ndim > 1 else {})
        return found

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits or predictions, straight from the model."""
        options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        return first_tensor(model(**self.inputs(batch), **options))

    def deferred(self, model: nn.Module, batch: Batch) -> Tensor | Unspoken:
        """The output, or what a language model says before its product with the vocabulary.
        `criterion` and `metrics` take either; `flat` forms the whole output.
        """
        return self.output(model, batch)

    def flat(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(items, classes) outputs and (items,) targets; items without a target are left out."""
        return with_target(output, batch[self.targets], self.missing)

    def criterion(self, output: Any, batch: Batch) -> Tensor:
        """Mean loss over the batch's items, a scalar; in float32 or wider."""
        rows, targets = self.flat(output, batch)
        return F.cross_entropy(wide(rows), targets)

    def items(self, batch: Batch) -> int:
        return int((batch[self.targets] != self.missing).sum())

    def metrics(self, output: Any, batch: Batch) -> dict[str, float]:
        """Sums over items of each metric."""
        rows, targets = self.flat(output, batch)
        return {"accuracy": float((rows.argmax(-1) == targets).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(self.deferred(model, batch), batch)

    def measured(self, model: nn.Module, batch: Batch, seen: Seen | None = None) -> Measured:
        """(mean loss over the items, sums over items of each metric); `seen` gets the output they are of."""
        output = self.output(model, batch)
        known = None if seen is None else seen(output, batch)
        if known is not None:
            return known
        return float(self.criterion(output, batch)), self.metrics(output, batch)


def task(name: str, *, formula: str, source: str = "") -> Callable[[type[Made]], type[Made]]:
    """Register the task that follows under `name`, which is also its own."""

    def register(cls: type[Made]) -> type[Made]:
        cls.name = name
        TASK.add(name, formula=formula, source=source)(cls)
        return cls

    return register


@task("sequence-classification", formula="-mean_i log softmax(z_i)[y_i] over texts")
@dataclass(frozen=True)
class SequenceClassification(Task):
    """One class for a text."""

    columns: ClassVar[Mapping[str, Column]] = {**TEXT, "labels": Column("targets")}


@task(
    "multi-label-classification",
    formula="-mean_ic [y_ic log s(z_ic) + (1 - y_ic) log(1 - s(z_ic))], s the logistic function",
)
@dataclass(frozen=True)
class MultiLabelClassification(Task):
    """Each of the classes holds for a text or not: `labels` (examples, classes) are 1, 0, or -100 where that
    is not known. An item is one class of one text.
    """

    loss_kind: ClassVar[str] = "other"
    columns: ClassVar[Mapping[str, Column]] = {**TEXT, "labels": Column("targets")}

    def criterion(self, output: Tensor, batch: Batch) -> Tensor:
        rows, targets = self.flat(output, batch)
        return F.binary_cross_entropy_with_logits(wide(rows), targets.to(wide(rows).dtype))

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        rows, targets = self.flat(output, batch)
        return {"accuracy": float(((rows > 0) == (targets > 0.5)).sum())}


@task("image-classification", formula="-mean_i log softmax(z_i)[y_i] over images")
@dataclass(frozen=True)
class ImageClassification(Task):
    """One class for an image."""

    columns: ClassVar[Mapping[str, Column]] = {
        "pixel_values": Column("values"),
        "labels": Column("targets"),
    }


@task("semantic-segmentation", formula="-mean_p log softmax(z_p)[y_p] over pixels p")
@dataclass(frozen=True)
class SemanticSegmentation(Task):
    """One class for each pixel: `labels` (examples, height, width), 255 where there is none. Logits
    (examples, classes, h, w) of another size are brought to the labels' by bilinear interpolation.
    """

    missing: ClassVar[int] = 255
    columns: ClassVar[Mapping[str, Column]] = {
        "pixel_values": Column("values"),
        "labels": Column("targets"),
    }

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch[self.targets]
        if output.shape[2:] != targets.shape[1:]:
            output = F.interpolate(output, targets.shape[1:], mode="bilinear", align_corners=False)
        return with_target(output.movedim(1, -1), targets, self.missing)


@dataclass(frozen=True)
class TokenTask(Task):
    """Losses over tokens; label -100 marks positions without a target."""

    shift: ClassVar[int] = 0
    columns: ClassVar[Mapping[str, Column]] = {**TEXT, "labels": Column("targets", SOURCE)}

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = self.kept(batch)
        labels = batch[self.targets][:, self.shift :]
        return output[:, : output.shape[1] - self.shift][keep], labels[keep]

    def items(self, batch: Batch) -> int:
        return int(self.kept(batch).sum())

    def kept(self, batch: Batch) -> Tensor:
        """(examples, positions less the shift) which targets count."""
        known: Tensor = batch[self.targets][:, self.shift :] != self.missing
        return known


@task("token-classification", formula="-mean_t log softmax(z_t)[y_t] over labelled tokens")
@dataclass(frozen=True)
class TokenClassification(TokenTask):
    """One class for each labelled token."""


@dataclass(frozen=True)
class LanguageModel(TokenTask):
    """A target is a word of the vocabulary. Loss and metrics form the logits of a few tokens at a time
    (see `vocabulary`); `output` has all of them. A model whose output embeddings cannot be left out of its
    forward pass (no transformers class, a head that is being watched: see `unspoken`) computes them whole.
    """

    def call(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The model's arguments."""
        options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        return {**self.inputs(batch), **options}

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(**self.call(model, batch)))

    def deferred(self, model: nn.Module, batch: Batch) -> Tensor | Unspoken:
        found = unspoken(
            model, self.call(model, batch), lambda hidden: self.flat(hidden, batch), first_tensor
        )
        return self.output(model, batch) if found is None else found

    def flat(self, output: Tensor | Unspoken, batch: Batch) -> tuple[Tensor, Tensor]:
        if isinstance(output, Unspoken):
            return output.logits(), output.targets[output.targets != self.missing]
        return super().flat(output, batch)

    def criterion(self, output: Tensor | Unspoken, batch: Batch) -> Tensor:
        return output.loss() if isinstance(output, Unspoken) else super().criterion(output, batch)

    def metrics(self, output: Tensor | Unspoken, batch: Batch) -> dict[str, float]:
        if isinstance(output, Unspoken):
            return {"accuracy": float(output.measured()[1])}
        return super().metrics(output, batch)

    def measured(self, model: nn.Module, batch: Batch, seen: Seen | None = None) -> Measured:
        output = self.deferred(model, batch)
        known = None if seen is None else seen(output, batch)
        if known is not None:
            return known
        if isinstance(output, Unspoken):
            loss, hits = output.measured()
            return float(loss), {"accuracy": float(hits)}
        return float(self.criterion(output, batch)), self.metrics(output, batch)


@task(
    "masked-lm",
    formula="-mean_t log p(x_t | the rest) over hidden tokens t",
    source="Devlin et al. 2019, sec. 3.1",
)
@dataclass(frozen=True)
class MaskedLM(LanguageModel):
    """The hidden tokens of a text; `labels` are -100 elsewhere."""


@task("causal-lm", formula="-mean_t log p(x_t | x_<t)", source="Bengio et al. 2003, sec. 2")
@dataclass(frozen=True)
class CausalLM(LanguageModel):
    """Next-token prediction: `labels` are the input ids (-100 at padding); the shift happens here. What is
    predicted from padding, the first word of a text with padding on its left, is no target.
    """

    shift: ClassVar[int] = 1

    def kept(self, batch: Batch) -> Tensor:
        known, mask = super().kept(batch), batch.get("attention_mask")
        return known if mask is None or mask.ndim != 2 else known & (mask[:, :-1] != 0)


@task("seq2seq-lm", formula="-mean_t log p(y_t | y_<t, x)", source="Sutskever et al. 2014, eq. 1")
@dataclass(frozen=True)
class Seq2SeqLM(LanguageModel):
    """Encoder-decoder: `labels` are the decoder's targets; its inputs are the labels shifted right."""

    columns: ClassVar[Mapping[str, Column]] = {**TEXT, **DECODED, "labels": Column("targets", TARGET)}

    def real(self, batch: Batch) -> dict[str, Tensor]:
        """The decoder's padding is where no target is, unless it has a mask of its own."""
        found = super().real(batch)
        if TARGET not in found and self.targets in batch:
            found[TARGET] = batch[self.targets] != self.missing
        return found

    def call(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        made: dict[str, Any] = {**self.inputs(batch), "use_cache": False}
        if "decoder_input_ids" not in made:
            made["decoder_input_ids"] = self.decoded(model, batch)
        return made

    def decoded(self, model: nn.Module, batch: Batch) -> Tensor:
        """(examples, positions) what the decoder reads: the targets shifted right."""
        inner: Any = getattr(model, "module", model)  # of transformers' encoder-decoders
        decoder: Tensor = inner.prepare_decoder_input_ids_from_labels(labels=batch[self.targets])
        return decoder

    def exported(self, model: nn.Module, batch: Batch) -> Batch:
        given = {"decoder_input_ids": self.decoded(model, batch)} if self.targets in batch else {}
        return super().exported(model, given | batch)


@dataclass(frozen=True)
class SquaredErrorTask(Task):
    """Half the mean over items of the squared error summed over outputs:
    the Hessian in the outputs is the identity.
    """

    loss_kind: ClassVar[str] = "squared_error"

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch[self.targets].to(output.dtype)
        rows, wanted = output.reshape(len(output), -1), targets.reshape(len(targets), -1)
        shapes = [without_ones(each) for each in (output, targets)]
        if rows.shape == wanted.shape and shapes[0] != shapes[1]:
            raise BadInput(
                f"{self.targets}: an example has the shape {shapes[1]} and the output {shapes[0]}; "
                "give targets of the output's shape"
            )
        if rows.shape != wanted.shape:
            raise BadInput(
                f"{self.targets}: {wanted.shape[1]} numbers an example, but the model predicts "
                f"{rows.shape[1]}; give as many targets as outputs"
            )
        return rows, wanted

    def items(self, batch: Batch) -> int:
        return int(batch[self.targets].shape[0])

    def criterion(self, output: Tensor, batch: Batch) -> Tensor:
        rows, targets = self.flat(output, batch)
        return 0.5 * (rows - targets).square().sum(-1).mean()

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        rows, targets = self.flat(output, batch)
        return {"squared_error": float((rows - targets).square().sum())}


@task("regression", formula="mean_i |z_i - y_i|^2 / 2")
@dataclass(frozen=True)
class Regression(SquaredErrorTask):
    """One or more numbers for a text."""

    columns: ClassVar[Mapping[str, Column]] = {**TEXT, "labels": Column("targets")}


@task("embedding", formula="mean_i |h_i - y_i|^2 / 2, h_i the mean over tokens of the hidden states")
@dataclass(frozen=True)
class Embedding(SquaredErrorTask):
    """A checkpoint without a head: mean-pooled hidden states against target vectors
    (by default the dense model's own).
    """

    columns: ClassVar[Mapping[str, Column]] = {**TEXT, "labels": Column("targets")}

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden = super().output(model, batch)
        if hidden.ndim == 2:
            return hidden
        mask = batch.get("attention_mask")
        weights = (
            torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.dtype)
        )
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)


MODULE: Mapping[str, Column] = {"inputs": Column("values"), "labels": Column("targets")}


@task("classification", formula="-mean_i log softmax(z_i)[y_i]")
@dataclass(frozen=True)
class ModuleTask(Task):
    """A plain `nn.Module` called as `model(batch["inputs"])` with cross-entropy on integer labels, or on
    the chances of the classes (floating labels of the output's shape).

    class_axis : the axis of the output that the classes lie along, 1 in (batch, classes, height, width)
    ignored : the label of an item without a target
    """

    columns: ClassVar[Mapping[str, Column]] = MODULE
    class_axis: int = -1
    ignored: int = -100

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, targets = output.movedim(self.class_axis, -1), batch[self.targets]
        if targets.is_floating_point():
            chances = targets.movedim(self.class_axis, -1)
            return rows.reshape(-1, rows.shape[-1]), chances.reshape(-1, rows.shape[-1])
        return with_target(rows.reshape(-1, rows.shape[-1]), targets.reshape(-1), self.ignored)

    def items(self, batch: Batch) -> int:
        targets = batch[self.targets]
        if targets.is_floating_point():
            return targets.numel() // targets.shape[self.class_axis]
        return int((targets != self.ignored).sum())

    def metrics(self, output: Any, batch: Batch) -> dict[str, float]:
        rows, targets = self.flat(output, batch)
        wanted = targets.argmax(-1) if targets.ndim == 2 else targets
        return {"accuracy": float((rows.argmax(-1) == wanted).sum())}


@task("module-regression", formula="mean_i |z_i - y_i|^2 / 2")
@dataclass(frozen=True)
class ModuleRegression(SquaredErrorTask):
    columns: ClassVar[Mapping[str, Column]] = MODULE

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))


@dataclass(frozen=True)
class CustomLoss(Task):
    """A plain `nn.Module` with the user's own `loss(output, batch) -> scalar mean over examples`, or over
    as many items as `counted(batch)` says.
    """

    name: ClassVar[str] = "custom"
    loss_kind: ClassVar[str] = "other"
    columns: ClassVar[Mapping[str, Column]] = {"inputs": Column("values")}
    function: Callable[[Tensor, Batch], Tensor] = F.mse_loss  # type: ignore[assignment]
    counted: Callable[[Batch], int] | None = None

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))

    def criterion(self, output: Tensor, batch: Batch) -> Tensor:
        return self.function(output, batch)

    def items(self, batch: Batch) -> int:
        return len(next(iter(batch.values()))) if self.counted is None else int(self.counted(batch))

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        return {}


def without_ones(values: Tensor) -> tuple[int, ...]:
    """The shape of one example, without ones at its end."""
    shape = list(values.shape[1:])
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def with_target(output: Tensor, targets: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """The rows of output (..., classes) and the targets (...,) that are not `missing`."""
    keep = targets != missing
    if output.ndim == 2 and bool(keep.all()):
        return output, targets
    return output[keep], targets[keep]


def first_tensor(output: Any) -> Tensor:
    """The logits (or first tensor) of whatever a model returned."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    return output[0]
