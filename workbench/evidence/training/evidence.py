"""What the measurements behind the training cards share:
small subjects, three seeds, tuned on validation, reported on test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from workbench.evidence.harness import SEEDS
from workbench.progress import Progress
from workbench.subjects import Subject, subject
from workbench.subjects.tasks import ModuleTask
from workbench.training.loop import Training, fit
from workbench.training.studies.comparison import interval
from workbench.training.sweep.objective import reinitialised

Record = dict[str, Any]


def digits_net(norm: Callable[[int], nn.Module] | None = None, hidden: int = 64) -> Subject:
    """scikit-learn's digits with a network of two hidden layers, by default without normalisation;
    untrained.
    """
    data = subject("digits-softmax")
    layers: list[nn.Module] = []
    for width_in in (64, hidden):
        layers += [nn.Linear(width_in, hidden), *([norm(hidden)] if norm else []), nn.ReLU()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Linear(hidden, 10))
    return Subject(
        "digits-net",
        model,
        ModuleTask(),
        {k: data.split(k) for k in ("train", "validation", "test")},
        data_note=data.data_note,
    )


def over_seeds(make: Callable[[int], float]) -> tuple[float, float, float, list[float]]:
    values = [make(seed) for seed in SEEDS]
    return (*interval(values), values)


def tuned(
    on: Subject,
    rates: Sequence[float],
    arguments: dict[str, Any] | Callable[[float, int], dict[str, Any]],
    progress: Progress,
    label: str = "tune",
    metric: str = "loss",
    fresh: Callable[[Subject, int], Subject] = reinitialised,
) -> Record:
    """The best of `rates` by validation loss at the first seed, then its test metric over all seeds;
    `arguments`, or what it returns for (lr, seed), go to `fit`.

    Returns lr, test (mean), low, high, values, at_end, validation and the trained subjects and runs under
    "done".
    """

    def given(lr: float, seed: int) -> dict[str, Any]:
        return arguments(lr, seed) if callable(arguments) else arguments

    def run(lr: float, seed: int) -> tuple[Training, Subject]:
        mine = fresh(on, seed)
        fixed: dict[str, Any] = {"seed": seed, "learning_rate": lr, "progress": progress.quiet()}
        return fit(mine, **(fixed | given(lr, seed))), mine

    found = {lr: run(lr, SEEDS[0]) for lr in progress.track(rates, label, len(rates))}
    best = min(found, key=lambda lr: found[lr][0].validation)
    done = [found[best], *(run(best, seed) for seed in SEEDS[1:])]
    limit = given(best, SEEDS[0]).get("evaluate_limit")
    values = [mine.evaluate("test", limit=limit)[metric] for _, mine in done]
    mean, low, high = interval(values)
    return {
        "lr": best,
        "at_end": best in (min(rates), max(rates)),
        "validation": [r.validation for r, _ in done],
        "test": mean,
        "low": low,
        "high": high,
        "values": values,
        "done": done,
    }


def told(found: dict[str, Record]) -> dict[str, Record]:
    """Without what no file can hold."""
    return {label: {k: v for k, v in record.items() if k != "done"} for label, record in found.items()}
