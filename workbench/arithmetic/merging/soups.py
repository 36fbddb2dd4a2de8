"""Soups whose ingredients the validation split chooses: greedily, or with learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.arithmetic.merging.merging import MERGE, Setting, combined
from workbench.arithmetic.models import Parts, Rule
from workbench.arithmetic.sources import own_tensors
from workbench.axis import Options, parameter
from workbench.statistics.gradients import learning
from workbench.subjects import Batch, Subject


@dataclass(frozen=True)
class Mixed:
    """A weighted mean of the parents; the weights are kept, for whoever asks what a merge is made of."""

    weights: tuple[float, ...]

    def __call__(self, parts: Parts, strength: float) -> Tensor:
        return combined(parts, self.weights)


@MERGE.add(
    "greedy-soup",
    formula="models by validation score; one more is in the mean where that does not get worse",
    source="Wortsman et al. 2022, Model soups, recipe 1",
    needs="validation",
    title="Greedy soup",
)
def greedy_soup(setting: Setting, options: Options) -> Rule:
    """Start from the best model on validation, try the others from better to worse."""
    parents = setting.models.parents
    scores = [setting.alone(which) for which in setting.progress.track(range(len(parents)), "each alone")]
    order = sorted(range(len(scores)), key=scores.__getitem__)
    soup, best = order[:1], scores[order[0]]
    for which in setting.progress.track(order[1:], "greedy soup"):
        trial = [*soup, which]
        setting.mix(mean_of(trial, len(parents)))
        found = setting.score()
        if found <= best:
            soup, best = trial, found
    return Mixed(tuple(mean_of(soup, len(parents))))


def mean_of(chosen: Sequence[int], count: int) -> list[float]:
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(count)]


class Learned(Options):
    epochs: int = parameter(3, "passes over the validation examples", ge=1, le=100)
    learning_rate: float = parameter(0.1, "of AdamW on the logits of the weights", gt=0, le=10, scale="log")
    batch_size: int = parameter(32, "examples a step", ge=1, le=4096)


@MERGE.add(
    "learned-soup",
    formula="min_a L(sum_i softmax(a)_i w_i) on validation",
    source="Wortsman et al. 2022, Model soups, appendix I",
    needs="validation",
    title="Learned soup",
    options=Learned,
)
def learned_soup(setting: Setting, options: Learned) -> Rule:
    """Descend the validation loss over the models' weights: the gradient of the mixed model, taken along
    each model, one tensor at a time.
    """
    logits = torch.zeros(len(setting.models.parents), requires_grad=True)
    optimizer = torch.optim.AdamW([logits], lr=options.learning_rate)
    for _ in setting.progress.track(range(options.epochs), "learned soup"):
        for host in setting.hosts:
            for batch in host.batches(setting.split, options.batch_size, setting.examples):
                if host.task.items(batch) == 0:
                    continue
                weights = logits.softmax(0)
                along = slopes(setting, host, batch, weights.tolist())
                optimizer.zero_grad()
                weights.backward(along)
                optimizer.step()
    return Mixed(tuple(logits.detach().softmax(0).tolist()))


def slopes(setting: Setting, host: Subject, batch: Batch, weights: list[float]) -> Tensor:
    """(models,) the batch's loss of the mixed model, differentiated by the weight of each model."""
    setting.mix(weights)
    held = own_tensors(host.model)
    learned = [name for name in setting.models.names if isinstance(held[name], torch.nn.Parameter)]
    values = [held[name] for name in learned]
    with torch.enable_grad(), learning(values):  # type: ignore[arg-type]
        found = torch.autograd.grad(host.loss(batch), values, allow_unused=True)
    gradients = dict(zip(learned, found, strict=True))
    total = torch.zeros(len(weights))
    for name, gradient in gradients.items():
        if gradient is not None:
            total += setting.models.parts(name).parents.flatten(1) @ gradient.flatten().cpu()
    return total
