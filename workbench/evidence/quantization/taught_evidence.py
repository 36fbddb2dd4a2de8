"""Measurements that test the claims about training through a rounding beside a teacher:
equal steps, rates chosen on validation, three seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from workbench.evidence.harness import SEEDS, interval
from workbench.evidence.quantization.evidence import opened
from workbench.evidence.quantization.trained_evidence import small_bytelm
from workbench.progress import Progress
from workbench.quantization.activations.attention import AttentionCall, watching
from workbench.quantization.trained.objective import map_distance
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.subjects import Subject
from workbench.training.loop import fit as fit_weights

SCRATCH: dict[str, Any] = {"steps": 400, "batch_size": 8, "test_examples": 128}
RATES = (1e-3, 3e-3, 1e-2)
FOUR: dict[str, Any] = {
    "steps": 100,
    "batch_size": 4,
    "test_examples": 64,
    "method": "lsq",
    "method.bits": 4,
    "activation_bits": 4,
    "rounded_attention": True,
    "distillation": 0.5,
    "temperature": 2.0,
}


@functools.cache
def teacher() -> Subject:
    """The byte language model of 0.1 M parameters, trained in full precision for three times as many steps as
    its binary students get.
    """
    on = small_bytelm().copy()
    fit_weights(
        on,
        steps=3 * SCRATCH["steps"],
        batch_size=SCRATCH["batch_size"],
        learning_rate=3e-3,
        weight_decay=0.0,
        seed=0,
    )
    return on


def tuned(
    on: Subject,
    arms: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
    rates: Sequence[float],
    name: str,
    progress: Progress,
    also: Callable[[Subject], dict[str, float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Each arm at the learning rate with the lowest validation loss of its first seed: {arm:
    {rate, validation, one list a fact}}.

    also : further facts of a trained subject.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, fields in arms.items():

        def run(rate: float, seed: int, fields: Mapping[str, Any] = fields) -> tuple[float, dict[str, Any]]:
            result = TrainQuantized(**(dict(common) | dict(fields)), learning_rate=rate, seed=seed).run(
                on, Progress(), cache=also is None
            )
            more = also(result.subject) if also is not None and result.subject is not None else {}
            return float(result.table["validation_loss"].dropna().iloc[-1]), dict(result.facts) | more

        first = {rate: run(rate, SEEDS[0]) for rate in progress.track(rates, f"{name}: rates of {arm}")}
        best = min(first, key=lambda rate: first[rate][0])
        facts = [first[best][1]] + [
            run(best, seed)[1] for seed in progress.track(SEEDS[1:], f"{name}: seeds of {arm}")
        ]
        found[arm] = {"rate": best, "validation": {f"{rate:g}": loss for rate, (loss, _) in first.items()}}
        found[arm] |= {
            key: [f[key] for f in facts]
            for key in ("loss", "accuracy", "bytes", "map_distance")
            if key in facts[0]
        }
    return found


def difference(
    found: Mapping[str, Mapping[str, Any]], one: str, other: str, fact: str = "loss"
) -> tuple[float, float, float]:
    """Mean and 95 % interval of one arm minus another, paired by seed."""
    return interval([a - b for a, b in zip(found[one][fact], found[other][fact], strict=True)])


def distilled_binary(name: str, progress: Progress) -> dict[str, Any]:
    """Binary students from random weights: the teacher's distribution alone against the text alone;
    beside them the teacher's weights as a start.
    """
    on = teacher()
    arms: dict[str, dict[str, Any]] = {
        "teacher's distribution": {"distillation": 1.0},
        "text": {},
        "teacher's distribution and weights": {"distillation": 1.0, "from_scratch": False},
    }
    common = SCRATCH | {"method": "fbi", "from_scratch": True}
    found = tuned(on, arms, common, RATES, name, progress)
    mean, low, high = difference(found, "teacher's distribution", "text")
    start = difference(found, "teacher's distribution and weights", "teacher's distribution")
    dense, weights = (
        on.evaluate("test", limit=SCRATCH["test_examples"])["loss"],
        sum(layer.original.numel() for layer in on.layers()),
    )
    note = (
        "binary bytelm of 0.1 M parameters from random weights, "
        f"distillation minus text {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats; "
        f"the teacher's weights as a start {start[0]:+.4f} [{start[1]:+.4f}, {start[2]:+.4f}]; "
        f"linears {2 * weights / found['text']['bytes'][0]:.1f} times smaller than in 16 bits"
    )
    return {
        "holds": high < 0,
        "note": note,
        "rows": found,
        "dense_loss": dense,
        "settings": common,
        "seeds": list(SEEDS),
    }


@torch.no_grad()
def maps_apart(on: Subject, dense: Subject) -> dict[str, float]:
    """How far a subject's attention maps on test examples are from those of the dense one."""
    found: list[list[AttentionCall]] = []
    batch = next(on.batches("test", 32))
    for subject in (on, dense):
        with watching(subject.model) as seen:
            subject.task.output(subject.model, batch)
        found.append([call for call in seen if isinstance(call, AttentionCall)])
    return {"map_distance": float(map_distance(*found))}


def guided_attention(name: str, progress: Progress) -> dict[str, Any]:
    """Four-bit weights, inputs and attention: distillation with and without the two attention terms;
    half of the tokens in 8 bits against 6 bits for all.
    """
    both = {"entropy": 0.5, "attention_match": 1.0}
    arms: dict[str, dict[str, Any]] = {
        "distillation": {},
        "entropy": {"entropy": 0.5},
        "maps": {"attention_match": 1.0},
        "both": both,
        "both, half of the tokens in 8 bits": both | {"wide_tokens": 0.5},
        "both, 6 bits": both | {"activation_bits": 6},
    }
    on = teacher()
    found = tuned(on, arms, FOUR, (3e-4, 1e-3), name, progress, functools.partial(maps_apart, dense=on))
    loss, maps = (
        difference(found, "both", "distillation"),
        difference(found, "both", "distillation", "map_distance"),
    )
    alone = {arm: difference(found, arm, "distillation") for arm in ("entropy", "maps")}
    tokens = difference(found, "both, half of the tokens in 8 bits", "both, 6 bits")
    note = (
        f"W4A4 bytelm of 0.1 M parameters, both terms minus distillation alone {loss[0]:+.4f} "
        f"[{loss[1]:+.4f}, {loss[2]:+.4f}] nats, "
        f"distance of maps {maps[0]:+.4f} [{maps[1]:+.4f}, {maps[2]:+.4f}]; "
        + "; ".join(
            f"{arm} alone {m:+.4f} [{low:+.4f}, {high:+.4f}]" for arm, (m, low, high) in alone.items()
        )
        + (
            f"; half of the tokens in 8 bits minus 6 bits for all {tokens[0]:+.4f} [{tokens[1]:+.4f}, "
            f"{tokens[2]:+.4f}]"
        )
    )
    return {
        "holds": loss[2] < 0 and maps[2] < 0,
        "note": note,
        "rows": found,
        "dense_loss": on.evaluate("test", limit=FOUR["test_examples"])["loss"],
        "settings": FOUR,
        "seeds": list(SEEDS),
    }


def residual_estimates(name: str, progress: Progress) -> dict[str, Any]:
    """The digits transformer with binary weights, inputs and attention:
    estimates of rank 0, 1 and 8, and attention left in full precision.
    """
    on = opened("digits-vit")
    arms: dict[str, dict[str, Any]] = {
        "none": {"method.rank": 0},
        "rank 1": {"method.rank": 1},
        "rank 8": {"method.rank": 8},
        "attention in full precision": {"method": "bibert"},
    }
    common: dict[str, Any] = {"method": "bipft", "steps": 300, "batch_size": 64, "test_examples": 512}
    found = tuned(on, arms, common, RATES, name, progress, functools.partial(maps_apart, dense=on))
    loss, maps = difference(found, "rank 1", "none"), difference(found, "rank 1", "none", "map_distance")
    more = difference(found, "rank 8", "rank 1")
    note = (
        f"binary digits-vit, rank 1 minus none {loss[0]:+.4f} [{loss[1]:+.4f}, {loss[2]:+.4f}] nats, "
        "distance of maps to the dense model's "
        f"{maps[0]:+.4f} [{maps[1]:+.4f}, {maps[2]:+.4f}]; "
        f"rank 8 minus rank 1 {more[0]:+.4f} [{more[1]:+.4f}, {more[2]:+.4f}] nats; "
        f"{found['rank 1']['bytes'][0] - found['none']['bytes'][0]:.0f} more bytes on "
        f"{found['none']['bytes'][0]}"
    )
    return {
        "holds": loss[2] < 0,
        "note": note,
        "rows": found,
        "dense_loss": on.evaluate("test", limit=512)["loss"],
        "settings": common,
        "seeds": list(SEEDS),
    }
