"""The axis of merges: how one tensor is made from a base's and those of the models made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.arithmetic.models import Models, Parts, Rule
from workbench.arithmetic.sources import Source, own_tensors
from workbench.axis import Axis
from workbench.progress import Progress
from workbench.subjects import Subject

#: `entry(setting, options)` gives a rule: (one tensor of every model, strength) -> the merged tensor.
#: Traits: "strength" where the rule reads one, "share" where that lies between 0 and 1, "density" where an
#: option of this name says what is kept, "one" where a single parent is enough, "pair" where it takes two.
MERGE = Axis(
    "merge",
    "how the weights of several models become one model's",
    found_in="workbench.arithmetic.merging",
    home="merge.method",
)


@dataclass
class Setting:
    """What a rule may ask for before it is applied.

    hosts : models whose weights may be written to, each on data that merges are chosen on: one, or one for
        each parent;  judged : what is to be small, of their evaluations on `split`
    """

    models: Models
    hosts: Sequence[Subject]
    split: str
    examples: int
    judged: Callable[[Sequence[Mapping[str, float]]], float]
    progress: Progress = field(default_factory=Progress)

    def measured(self) -> list[dict[str, float]]:
        """Loss and metrics of what the hosts hold now, on each one's data."""
        quiet = self.progress.quiet()
        return [host.evaluate(self.split, limit=self.examples, progress=quiet) for host in self.hosts]

    def score(self) -> float:
        return self.judged(self.measured())

    def hold(self, source: Source) -> None:
        """Give every host a model's weights."""
        for host in self.hosts:
            write(host, self.models.names, source.tensor)

    def holding(self, which: int) -> Subject:
        """A parent's weights on its own data, or on all parents' where that is one."""
        host = self.hosts[which if len(self.hosts) > 1 else 0]
        write(host, self.models.names, self.models.parents[which].tensor)
        return host

    def alone(self, which: int) -> float:
        """The score of one parent."""
        self.hold(self.models.parents[which])
        return self.score()

    def mix(self, weights: Sequence[float]) -> None:
        """Give every host a weighted sum of the parents."""
        self.place(lambda parts, strength: combined(parts, weights), 1.0)

    def place(self, rule: Rule, strength: float, keep_zeros: bool = False) -> None:
        """Write a merge into every host, tensor by tensor; `keep_zeros`: see `merged`."""
        place(self.hosts, self.models, rule, strength, keep_zeros)


def combined(parts: Parts, weights: Sequence[float]) -> Tensor:
    """sum_i c_i w_i."""
    shape = [-1] + [1] * (parts.parents.ndim - 1)
    return (torch.tensor(weights, dtype=torch.float32).reshape(shape) * parts.parents).sum(0)


@torch.no_grad()
def write(host: Subject, names: Sequence[str], tensor: Callable[[str], Tensor]) -> None:
    """Give the model, which has no changes on its weights, these values."""
    held = own_tensors(host.model)
    for name in names:
        held[name].copy_(tensor(name))


@torch.no_grad()
def place(
    hosts: Sequence[Subject], models: Models, rule: Rule, strength: float, keep_zeros: bool = False
) -> None:
    """Write the merge into each model, which has no changes on its weights; a tensor is made once."""
    held = [own_tensors(host.model) for host in hosts]
    for name, value in streamed(models, rule, strength, keep_zeros):
        for tensors in held:
            tensors[name].copy_(value)


def merged(parts: Parts, rule: Rule, strength: float, keep_zeros: bool) -> Tensor:
    """One tensor of the merge, float32.

    keep_zeros : what is zero in every parent stays zero
    """
    value = rule(parts, strength)
    return torch.where((parts.parents == 0).all(0), 0.0, value) if keep_zeros else value


def streamed(
    models: Models, rule: Rule, strength: float, keep_zeros: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor) in turn, for whoever writes them to a model or a file."""
    return ((parts.name, merged(parts, rule, strength, keep_zeros)) for parts in models.each())
