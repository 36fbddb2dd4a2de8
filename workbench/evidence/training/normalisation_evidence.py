"""The measurements behind the cards of normalisation, and of losses that large batches ask for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from workbench.evidence.training.evidence import Record, digits_net, over_seeds, told, tuned
from workbench.progress import Progress
from workbench.subjects import Layer, Subject
from workbench.training.batch.adversary import ConcurrentAdversary
from workbench.training.batch.normalisation import (
    BatchChannelNorm,
    GhostBatchNorm,
    WeightStandardization,
)
from workbench.training.loop import fit
from workbench.training.studies.comparison import interval


def ghost_batch_norm(name: str, progress: Progress) -> Record:
    """Small batch; naive large batch; sqrt rate with ghost batch norm;
    and as many updates as the small batch made.
    """
    small, large, lr, epochs = 32, 539, 0.05, 12
    plain, ghost = digits_net(nn.BatchNorm1d), digits_net(lambda width: GhostBatchNorm(width, small))
    scaled = lr * math.sqrt(large / small)
    plans = {
        "small batch": (plain, small, lr, epochs),
        "large batch": (plain, large, lr, epochs),
        "large, sqrt rate": (plain, large, scaled, epochs),
        "large, sqrt rate, ghosts": (ghost, large, scaled, epochs),
        "large, sqrt rate, ghosts, equal updates": (ghost, large, scaled, epochs * large / small),
    }
    found: dict[str, dict[str, Any]] = {}
    for label, (on, batch, rate, passes) in progress.track(plans.items(), "plans", len(plans)):

        def run(
            seed: int, on: Subject = on, batch: int = batch, rate: float = rate, passes: float = passes
        ) -> float:
            mine = fresh_norms(on, seed)
            fit(
                mine,
                epochs=passes,
                batch_size=batch,
                learning_rate=rate,
                optimizer="sgd",
                schedule="step",
                seed=seed,
                warmup=0.0,
                weight_decay=0.0,
                progress=progress.quiet(),
            )
            return 1 - mine.evaluate("test")["accuracy"]

        mean, low, high, values = over_seeds(run)
        found[label] = {"test_error": mean, "low": low, "high": high, "values": values}
    errors = [v["test_error"] for v in found.values()]
    return {
        "subject": "digits-net with batch norm",
        "plans": found,
        "holds": errors[1] > errors[0] and errors[-1] <= errors[0] + 0.005 and errors[2] <= errors[1],
        "note": "test error " + ", ".join(f"{k} {v['test_error']:.3f}" for k, v in found.items()),
    }


def fresh_norms(on: Subject, seed: int) -> Subject:
    """Fresh linear layers; normalisation layers start as they were built."""
    model = copy.deepcopy(on.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return on.with_model(model)


def weight_standardization(name: str, progress: Progress) -> Record:
    """Micro-batches of two: batch norm, group norm, group norm with standardised weights,
    batch-channel norm with them; batch norm at 32.
    """
    group = lambda width: nn.GroupNorm(8, width)  # noqa: E731
    plans: dict[str, tuple[Callable[[int], nn.Module], bool, int]] = {
        "batch norm, 32 at once": (nn.BatchNorm1d, False, 0),
        "batch norm": (nn.BatchNorm1d, False, 2),
        "group norm": (group, False, 2),
        "group norm, standardised": (group, True, 2),
        "batch-channel norm, standardised": (lambda width: BatchChannelNorm(width, 8), True, 2),
    }
    found = {}
    for label, (norm, standardised, micro) in plans.items():

        def fresh(on: Subject, seed: int, standardised: bool = standardised) -> Subject:
            mine = fresh_norms(on, seed)
            for index in (0, 3) if standardised else ():
                Layer(str(index), mine.model[index]).attach(WeightStandardization())  # type: ignore[index]
            return mine

        made = {
            "epochs": 3,
            "batch_size": 32,
            "micro_batch": micro,
            "optimizer": "sgd",
            "weight_decay": 0.0,
            "warmup": 0.1,
        }
        found[label] = tuned(digits_net(norm), (0.0125, 0.05, 0.2), made, progress, label, "accuracy", fresh)
        found[label]["test_error"] = 1 - found[label]["test"]
    errors = {k: v["test_error"] for k, v in found.items()}
    reference = 1 - found["batch norm, 32 at once"]["low"]
    return {
        "subject": "digits-net",
        "plans": told(found),
        "holds": bool(
            errors["group norm, standardised"] <= max(reference, errors["batch norm, 32 at once"])
            and errors["group norm, standardised"] <= errors["group norm"]
        ),
        "note": "test error at micro-batches of two: " + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()),
    }


def concurrent_adversary(name: str, progress: Progress) -> Record:
    """Half the digits in one batch: plain, with adversaries of stale weights, and with synchronous ones;
    test accuracy and sharpness.
    """
    from workbench.curvature import Sharpness

    on, found = digits_net(), {}
    for label, delay in (("plain", None), ("concurrent", 1), ("synchronous", 0)):

        def arguments(lr: float, seed: int, delay: int | None = delay) -> dict[str, Any]:
            loss = None if delay is None else ConcurrentAdversary(0.05, delay)
            return {
                "epochs": 40,
                "batch_size": 539,
                "optimizer": {"name": "lars", "trust": 0.01},
                "weight_decay": 1e-4,
                "warmup": 0.1,
                "loss": loss,
            }

        found[label] = tuned(on, (1.0, 2.0, 4.0, 8.0, 16.0), arguments, progress, label, "accuracy")
        tops = [
            Sharpness(split="train", examples=512, batch_size=128)
            .run(mine, progress=progress.quiet())
            .facts["top_eigenvalue"]
            for _, mine in found[label]["done"]
        ]
        found[label]["top_eigenvalue"] = interval(tops)
    plain, ours, both = (found[k] for k in ("plain", "concurrent", "synchronous"))
    return {
        "subject": "digits-net",
        "plans": told(found),
        "gradients_in_critical_path": {"plain": 1, "concurrent": 1, "synchronous": 2},
        "holds": bool(
            ours["test"] >= plain["test"]
            and ours["low"] <= both["high"]
            and ours["top_eigenvalue"][0] < plain["top_eigenvalue"][0]
        ),
        "note": "accuracy at batch 539 (top eigenvalue): "
        + ", ".join(f"{k} {v['test']:.3f} ({v['top_eigenvalue'][0]:.2f})" for k, v in found.items()),
    }
