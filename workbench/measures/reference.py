"""A model to compare with, known by its answers: run once, kept as last hidden states, asked many times.

What a language model says before its head is a few hundred numbers a token instead of its vocabulary's, so
these are kept and the logits of both models are formed again a chunk at a time, each by its own head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workbench.errors import BadInput
from workbench.measures.classification import AnswerPairs, classification_measures
from workbench.measures.embedding import (
    VectorPairs,
    embedding_measures,
    output_distances,
    output_measures,
)
from workbench.measures.language import TokenPairs, language_measures, pairs_in_chunks
from workbench.progress import Progress
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import (
    Batch,
    Embedding,
    LanguageModel,
    Measured,
    ModuleTask,
    SquaredErrorTask,
    Task,
    TokenTask,
)
from workbench.subjects.vocabulary import Unspoken, wide

TOKENS = 2048  # of a batch: what is held of activations does not grow with the number of texts


class Stopped(Exception):
    """Somebody asked to stop before all answers were there; nothing is remembered."""


Pairs = TokenPairs | AnswerPairs | VectorPairs


def kind_of(task: Task) -> str:
    """How two models of a task are compared: language, classification, embedding or output;
    "" for a loss of somebody's own, which says nothing about what its outputs are.
    """
    if isinstance(task, LanguageModel):
        return "language"
    if isinstance(task, Embedding):
        return "embedding"
    if isinstance(task, SquaredErrorTask):
        return "output"
    return "classification" if task.loss_kind == "cross_entropy" else ""


def check_kind(on: Subject) -> None:
    """`BadInput` for a loss of somebody's own."""
    if not kind_of(on.task):
        raise BadInput(f"subject: the task {on.task.name} has a loss of its own; its outputs do not compare")


@dataclass(frozen=True)
class Answer:
    """What a model answers to the items of one batch, before its head when it is a language model.

    rows : (items, width);  head : (n, width) -> (n, outputs)
    example, position : (items,), the row of the split and the place in it
    """

    rows: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor
    example: Tensor
    position: Tensor
    outputs: int
    spoken: bool = False  # before a language model's head
    plain: bool = False  # and the head is a product with its weight, and its bias

    def known(self) -> Tensor:
        return wide(self.head(self.rows))


def same(rows: Tensor) -> Tensor:
    return rows


def answer_of(task: Task, output: Any, batch: Batch, examples: Tensor) -> Answer:
    """The answer in what a task's `measured` shows."""
    example, position = places(task, batch, examples)
    if isinstance(output, Unspoken):
        kept = output.targets != -100
        rows, targets, head = output.rows[kept], output.targets[kept], output.head
        plain = output.weight is not None
        return Answer(rows, head, targets, example, position, output.vocabulary, True, plain)
    rows, targets = task.flat(output, batch)
    if not isinstance(task, SquaredErrorTask) and targets.is_floating_point():
        targets = targets.argmax(-1)
    return Answer(wide(rows).clone(), same, targets, example, position, rows.shape[-1])


def places(task: Task, batch: Batch, examples: Tensor) -> tuple[Tensor, Tensor]:
    """(items,) the row of the split that each item is of, and its position there, in the order of `flat`."""
    targets = batch[task.targets].cpu()
    if isinstance(task, SquaredErrorTask):
        return examples, torch.zeros(len(examples), dtype=torch.long)
    if isinstance(task, TokenTask):
        row, position = task.kept(batch).cpu().nonzero(as_tuple=True)
        return examples[row], position + task.shift
    known = classes_of(task, targets) != (task.ignored if isinstance(task, ModuleTask) else task.missing)
    row, position = known.reshape(len(examples), -1).nonzero(as_tuple=True)
    return examples[row], position


def classes_of(task: Task, targets: Tensor) -> Tensor:
    """The classes; the most likely ones where chances of all were given."""
    if not targets.is_floating_point():
        return targets
    return targets.argmax(task.class_axis if isinstance(task, ModuleTask) else -1)


@dataclass
class Reference:
    """The answers of a model to the first `limit` examples of a split. Made by `reference_of`."""

    on: Subject
    split: str
    limit: int
    batch_size: int
    answers: list[Answer] = field(default_factory=list)
    heads: tuple[tuple[Tensor, int], ...] = ()

    @property
    def kind(self) -> str:
        return kind_of(self.on.task)

    @property
    def readable(self) -> bool:
        """Whether the head that the answers need is still what it was."""
        return all(tensor._version == version for tensor, version in self.heads)

    @property
    def bytes(self) -> int:
        return sum(a.rows.numel() * a.rows.element_size() for a in self.answers)

    def against(self, changed: Subject, progress: Progress | None = None, seed: int = 0) -> Comparison | None:
        """Run the other model on the same examples, once. Its loss is remembered as `evaluated` would.

        Of what was reached when it was stopped; None when that is nothing. Raises `BadInput` for a model with
        other outputs.
        """
        look = functools.partial(paired, self.kind)
        found, evaluation = self.beside(changed, look, progress or Progress())
        if not found:
            return None
        return Comparison(self.kind, joined(self.kind, found), evaluation, seed)

    def beside(
        self, changed: Subject, look: Callable[[Answer, Answer], Any], progress: Progress
    ) -> tuple[list[Any], dict[str, float]]:
        """What `look` makes of both models' answers to each batch, and the loss and metrics of the other."""
        if not self.readable:
            raise BadInput(
                "subject: the head of the reference was written to since it was asked; ask it again"
            )
        found: list[Any] = []

        def compare(examples: Tensor, output: Any, batch: Batch) -> Measured | None:
            mine, dense = answer_of(changed.task, output, batch, examples), self.answers[len(found)]
            if mine.outputs != dense.outputs:
                raise BadInput(
                    f"subject: {changed.name!r} has {mine.outputs} outputs and the reference "
                    f"{self.on.name!r} has {dense.outputs}; only models that say the same words compare"
                )
            found.append(look(dense, mine))
            return measured_in(found[-1]) if self.kind == "language" else None

        evaluation = changed.evaluate(self.split, self.batch_size, self.limit, progress, seen=compare)
        if found and not progress.stopped:
            changed.memo(("evaluate", self.split, self.limit), lambda: dict(evaluation))
        return found, evaluation


def paired(kind: str, dense: Answer, changed: Answer) -> Any:
    """What is kept of a batch."""
    if kind == "language":
        found = pairs_in_chunks(
            dense.rows, dense.head, changed.rows, changed.head, dense.targets, dense.outputs
        )
        return found | {"window": dense.example, "position": dense.position}
    return dense, changed


def measured_in(pairs: dict[str, Tensor]) -> Measured:
    """Loss and metrics of the changed model in what is kept of a batch: its logits are formed once."""
    return -float(pairs["changed_log_p"].mean()), {"accuracy": float(pairs["right"].sum())}


def joined(kind: str, found: Sequence[Any]) -> Pairs:
    if kind == "language":
        return TokenPairs.of(found)
    one, two = (torch.cat([pair[i].known() for pair in found]).double().cpu() for i in (0, 1))
    if kind == "classification":
        targets = torch.cat([dense.targets for dense, _ in found]).cpu()
        example = torch.cat([dense.example for dense, _ in found]).cpu()
        dense_log_p, changed_log_p = (values.log_softmax(-1).numpy() for values in (one, two))
        return AnswerPairs(dense_log_p, changed_log_p, targets.numpy(), example.numpy())
    return VectorPairs(one.numpy(), two.numpy())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items: `pairs` holds one entry an item, `measures` the numbers."""

    kind: str
    pairs: Pairs
    evaluation: dict[str, float]  # loss and metrics of the changed model
    seed: int = 0

    def measures(self) -> dict[str, float]:
        if isinstance(self.pairs, TokenPairs):
            return language_measures(self.pairs, self.seed)
        if isinstance(self.pairs, AnswerPairs):
            return classification_measures(self.pairs, self.seed)
        return (embedding_measures if self.kind == "embedding" else output_measures)(self.pairs, self.seed)

    def distances(self) -> NDArray[np.float64]:
        """(items,) what `distance` is the mean of."""
        if not isinstance(self.pairs, VectorPairs):
            return self.pairs.divergence
        return 1 - self.pairs.cosine if self.kind == "embedding" else output_distances(self.pairs)

    def distance(self) -> tuple[float, float, float]:
        """(value, low, high) of what a verdict is about: the divergence in nats, else 1 - cosine or the
        change of the outputs.
        """
        found = self.measures()
        name = "kl" if "kl" in found else "distance"
        return found[name], found[f"{name}_low"], found[f"{name}_high"]


def reference_of(
    on: Subject,
    split: str = "test",
    limit: int | None = None,
    progress: Progress | None = None,
    batch_size: int = 64,
    changing: bool = False,
) -> Reference | None:
    """The answers of `on` as it is now, in one pass that also measures its loss (as `evaluated` remembers).

    changing : keep a copy of a language model's head, because its weight will be written to
    Kept in memory with the subject while its weights stay. None when there is nothing to compare (a loss of
    somebody's own) or when it was stopped.
    """
    if not kind_of(on.task):
        return None
    progress = progress or Progress()
    size = min(on.size(split), limit or on.size(split))

    def ask() -> list[Answer]:
        answers = list[Answer]()

        def keep(examples: Tensor, output: Any, batch: Batch) -> None:
            answers.append(answer_of(on.task, output, batch, examples))

        evaluation = on.evaluate(split, batch_size, size, progress, seen=keep)
        if progress.stopped:
            raise Stopped
        on.memo(("evaluate", split, size), lambda: dict(evaluation))
        # the rows are remembered with the subject, and must not keep a copy of its model alive
        return [replace(answer, head=same) if answer.plain else answer for answer in answers]

    try:
        answers = on.memo(("reference", split, size, batch_size), ask)
    except Stopped:
        return None
    held = head_of(on.model)
    if held is None or not any(answer.spoken for answer in answers):
        return Reference(on, split, size, batch_size, answers)
    if changing and all(answer.plain for answer in answers):
        weight, bias = held.weight.detach().clone(), None if held.bias is None else held.bias.detach().clone()
        return Reference(on, split, size, batch_size, own_head(answers, linear(weight, bias)))
    tensors = tuple((p, p._version) for p in held.parameters())
    if not all(answer.plain for answer in answers):
        answers = ask()  # what these do after the head is the model's own code, with this model's weights
        return Reference(on, split, size, batch_size, answers, tensors)
    return Reference(on, split, size, batch_size, own_head(answers, held.forward), tensors)


def own_head(answers: Sequence[Answer], head: Callable[[Tensor], Tensor]) -> list[Answer]:
    return [replace(answer, head=head) for answer in answers]


def head_of(model: nn.Module) -> Any:
    """The module of a language model's output embeddings, or None."""
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda rows: nn.functional.linear(rows, weight, bias)


def compare(
    dense: Subject,
    changed: Subject,
    split: str = "test",
    limit: int | None = None,
    progress: Progress | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Comparison:
    """Both models on the first `limit` examples of the dense one's split. Raises `BadInput` for a task whose
    outputs have no meaning that is known here.
    """
    check_kind(dense)
    reference = reference_of(dense, split, limit, progress, batch_size)
    if reference is None:
        raise KeyboardInterrupt("the comparison was stopped")
    if changed is not dense:
        changed = other_model(dense, changed)
    found = reference.against(changed, progress, seed)
    if found is None:
        raise KeyboardInterrupt("the comparison was stopped")
    return found


def measured_beside(
    reference: Reference | None,
    changed: Subject,
    split: str,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Loss and metrics of a changed model, and its distance to the reference with the 95 % interval: `kl`, or
    `distance` where outputs are no distributions. One pass. Only the first without a reference that can still
    be read.
    """
    if reference is None or not reference.readable:
        return changed.evaluate(split, limit=limit, progress=progress)
    found = reference.against(changed, progress)
    if found is None:
        return {}
    return found.evaluation | distance_facts(found.measures())


def distance_facts(numbers: dict[str, float]) -> dict[str, float]:
    """`kl` or `distance` with its interval, of all measures."""
    wanted = [f"{kind}{end}" for kind in ("kl", "distance") for end in ("", "_low", "_high")]
    return {name: numbers[name] for name in wanted if name in numbers}


def on_its_data(dense: Subject, changed: Subject) -> Subject:
    """The changed model on the dense one's data, where it is not there already."""
    return changed if changed.splits is dense.splits else other_model(dense, changed)


def other_model(dense: Subject, changed: Subject) -> Subject:
    """The changed model on the dense one's data."""
    if changed.task.name != dense.task.name:
        raise BadInput(
            f"subject: {changed.name!r} has the task {changed.task.name}, the reference {dense.name!r} has "
            f"{dense.task.name}; only models of one task compare"
        )
    return Subject(
        changed.name,
        changed.model,
        dense.task,
        dense.splits,
        tokenizer=dense.tokenizer,
        data_note=dense.data_note,
        labels=dense.labels,
        history=list(changed.history),
        origin=changed.origin,
    )


def batch_of(on: Subject, split: str) -> int:
    """Examples of a batch of at most 2,048 tokens; 64 where an example is not a text."""
    ids = on.split(split).get("input_ids")
    return 64 if ids is None or ids.ndim != 2 else max(1, min(64, TOKENS // ids.shape[1]))
