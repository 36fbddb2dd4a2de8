"""Tasks: how a batch becomes an output, a loss and metrics.
A new modality is a new task, registered by `@task(name, formula=...)`; nothing else changes.

A batch is a dict of tensors whose first dimension is the example. Every loss is the mean over *items*
(examples, or target tokens), so totals over batches are exact:
sum of `loss * items` divided by the sum of items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.axis import Axis
from workbench.subjects.vocabulary import Unspoken, unspoken

Batch = dict[str, Tensor]
#: Gets a batch's output (`Unspoken` of a language model) and the batch.
Seen = Callable[[Any, Batch], None]
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

    def inputs(self, batch: Batch) -> Batch:
        return {k: v for k, v in batch.items() if k != self.targets}

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
        """(items, classes) outputs and (items,) targets; items that are padding are left out."""
        return output, batch[self.targets]

    def criterion(self, output: Any, batch: Batch) -> Tensor:
        """Mean loss over the batch's items, a scalar; in float32 or wider."""
        rows, targets = self.flat(output, batch)
        return F.cross_entropy(
            rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows, targets
        )

    def items(self, batch: Batch) -> int:
        return int(batch[self.targets].shape[0])

    def metrics(self, output: Any, batch: Batch) -> dict[str, float]:
        """Sums over items of each metric."""
        rows, targets = self.flat(output, batch)
        return {"accuracy": float((rows.argmax(-1) == targets).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(self.deferred(model, batch), batch)

    def measured(
        self, model: nn.Module, batch: Batch, seen: Seen | None = None
    ) -> tuple[float, dict[str, float]]:
        """(mean loss over the items, sums over items of each metric); `seen` gets the output they are of."""
        output = self.output(model, batch)
        if seen is not None:
            seen(output, batch)
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


@task("image-classification", formula="-mean_i log softmax(z_i)[y_i] over images")
@dataclass(frozen=True)
class ImageClassification(Task):
    """One class for an image."""


@dataclass(frozen=True)
class TokenTask(Task):
    """Losses over tokens; label -100 marks positions without a target."""

    shift: ClassVar[int] = 0

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch[self.targets][:, self.shift :]
        keep = labels != -100
        return output[:, : output.shape[1] - self.shift][keep], labels[keep]

    def items(self, batch: Batch) -> int:
        return int((batch[self.targets][:, self.shift :] != -100).sum())


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
            return output.logits(), output.targets[output.targets != -100]
        return super().flat(output, batch)

    def criterion(self, output: Tensor | Unspoken, batch: Batch) -> Tensor:
        return output.loss() if isinstance(output, Unspoken) else super().criterion(output, batch)

    def metrics(self, output: Tensor | Unspoken, batch: Batch) -> dict[str, float]:
        if isinstance(output, Unspoken):
            return {"accuracy": float(output.measured()[1])}
        return super().metrics(output, batch)

    def measured(
        self, model: nn.Module, batch: Batch, seen: Seen | None = None
    ) -> tuple[float, dict[str, float]]:
        output = self.deferred(model, batch)
        if seen is not None:
            seen(output, batch)
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
    """Next-token prediction: `labels` are the input ids (-100 at padding); the shift happens here."""

    shift: ClassVar[int] = 1


@task("seq2seq-lm", formula="-mean_t log p(y_t | y_<t, x)", source="Sutskever et al. 2014, eq. 1")
@dataclass(frozen=True)
class Seq2SeqLM(LanguageModel):
    """Encoder-decoder: `labels` are the decoder's targets; its inputs are the labels shifted right."""

    def call(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        inner: Any = getattr(model, "module", model)  # of transformers' encoder-decoders
        decoder = inner.prepare_decoder_input_ids_from_labels(labels=batch[self.targets])
        return {**self.inputs(batch), "decoder_input_ids": decoder, "use_cache": False}


@dataclass(frozen=True)
class SquaredErrorTask(Task):
    """Half the mean over items of the squared error summed over outputs:
    the Hessian in the outputs is the identity.
    """

    loss_kind: ClassVar[str] = "squared_error"

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch[self.targets].to(output.dtype)
        return output.reshape(len(output), -1), targets.reshape(len(targets), -1)

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


@task("embedding", formula="mean_i |h_i - y_i|^2 / 2, h_i the mean over tokens of the hidden states")
@dataclass(frozen=True)
class Embedding(SquaredErrorTask):
    """A checkpoint without a head: mean-pooled hidden states against target vectors
    (by default the dense model's own).
    """

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden = super().output(model, batch)
        if hidden.ndim == 2:
            return hidden
        mask = batch.get("attention_mask")
        weights = (
            torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.dtype)
        )
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)


@task("classification", formula="-mean_i log softmax(z_i)[y_i]")
@dataclass(frozen=True)
class ModuleTask(Task):
    """A plain `nn.Module` called as `model(batch["inputs"])` with cross-entropy on integer labels."""

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))

    def flat(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return output.reshape(-1, output.shape[-1]), batch[self.targets].reshape(-1)

    def items(self, batch: Batch) -> int:
        return int(batch[self.targets].numel())


@task("module-regression", formula="mean_i |z_i - y_i|^2 / 2")
@dataclass(frozen=True)
class ModuleRegression(SquaredErrorTask):
    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))


@dataclass(frozen=True)
class CustomLoss(Task):
    """A plain `nn.Module` with the user's own `loss(output, batch) -> scalar mean over examples`."""

    name: ClassVar[str] = "custom"
    loss_kind: ClassVar[str] = "other"
    function: Callable[[Tensor, Batch], Tensor] = F.mse_loss  # type: ignore[assignment]

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        return first_tensor(model(batch["inputs"]))

    def criterion(self, output: Tensor, batch: Batch) -> Tensor:
        return self.function(output, batch)

    def items(self, batch: Batch) -> int:
        return len(next(iter(batch.values())))

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        return {}


def first_tensor(output: Any) -> Tensor:
    """The logits (or first tensor) of whatever a model returned."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    return output[0]
