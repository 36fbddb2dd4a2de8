"""Measurements of what trains with masks or trains a part, and of recovery on a pretrained BERT.

Digits: a vision transformer trained on upright digits, one for each seed, goes on with the same digits lying
on their sides, a task it has not seen. Bytes: a Llama-style model of 57 k weights on Python's source, one for
each seed; its second corpus is the prose of Python's reference. Rates are those of the arms without masks,
the same for all but low-rank terms, which start at zero and take 3e-3; nothing was chosen on the test split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from workbench.evidence.pruning.training_evidence import (
    Arm,
    Claim,
    Known,
    compare_arms,
    digits,
    recovered_accuracy,
    small_language_model,
)
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.subjects import Subject

# One epoch of the training split is 320 such steps; what is asked of each pruning is the project's own goal.
RECOVERY: dict[str, Any] = {"recovery": {"name": "distil", "learning_rate": 2e-4, "batch_size": 16}}


def sparse(**fields: Any) -> Any:
    def make(seed: int, known: Known) -> Instrument:
        from workbench.pruning.sparse_training.train_sparse import TrainSparse

        return TrainSparse(seed=seed, **fields)

    return make


def pruned(like: str = "", **fields: Any) -> Any:
    """A `Prune`; `like` names the arm whose sparsity it has."""

    def make(seed: int, known: Known) -> Instrument:
        from workbench.pruning.prune import Prune

        same = {"sparsity": min(round(known[like]["sparsity"], 4), 0.99)} if like else {}
        return Prune(seed=seed, predict_examples=0, **(fields | same))

    return make


def subtuned(**fields: Any) -> Any:
    def make(seed: int, known: Known) -> Instrument:
        from workbench.pruning.studies.subtune import Subtune

        return Subtune(seed=seed, **fields)

    return make


def better(says: str, one: str, other: str, value: str = "loss", margin: float = 0.0) -> Claim:
    return Claim(says, {one: 1, other: -1}, value, margin)


def on_the_first_task(base: Subject, subjects: dict[str, Subject]) -> dict[str, dict[str, float]]:
    """Loss and error of every arm's model on the task it came from."""
    found = {}
    for label, on in subjects.items():
        measured = base.with_model(on.model).evaluate("test")
        found[label] = {"first_task_loss": measured["loss"], "first_task_error": 1 - measured["accuracy"]}
    return found


def measured_gains(base: Subject, subjects: dict[str, Subject]) -> dict[str, dict[str, float]]:
    """Measured speed-up of every arm over the subject it began with."""
    from workbench.pruning.allocation.latency import measured_speedup

    return {label: {"speedup": measured_speedup(base, on, 64)} for label, on in subjects.items()}


LYING: dict[str, Any] = {"steps": 100, "learning_rate": 1e-3}
LONG = {"steps": 300}


def gradual(steps: int) -> dict[str, Any]:
    """A cubic ramp inside so many steps of recovery."""
    recovery = {"name": "finetune", "steps": steps, "learning_rate": 1e-3, "batch_size": 32}
    return {"recovery": recovery, "sparsity_schedule": {"name": "cubic", "events": 5}}


GRADUAL = gradual(100)
BYTES: dict[str, Any] = {"steps": 150, "learning_rate": 3e-3, "batch_size": 16, "start": "random"}
MORE: dict[str, Any] = {"steps": 75, "learning_rate": 1e-3, "batch_size": 16}
APART: dict[str, Any] = {
    "steps": 200,
    "learning_rate": 1e-3,
    "start": "random",
    "stages": 5,
    "portion": "megabatches",
    "sparsity": 0.9,
}

SPARSE_THEN_DENSE: dict[str, Arm] = {
    "pretrained dense": [sparse(method="dense", **BYTES)],
    "pretrained at 75 %": [sparse(method="spdf", sparsity=0.75, **BYTES)],
    "dense throughout": [sparse(method="dense", **BYTES), "prose", sparse(method="dense", **MORE)],
    "75 %, then dense": [
        sparse(method="spdf", sparsity=0.75, **BYTES),
        "prose",
        sparse(method="dense", masks="lifted", **MORE),
    ],
    "75 % throughout": [
        sparse(method="spdf", sparsity=0.75, **BYTES),
        "prose",
        sparse(method="dense", masks="kept", **MORE),
    ],
}
DENSE_GAP = {"75 %, then dense": 1.0, "dense throughout": -1.0}


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    # The rate for 2:4: of 1e-4, 2e-4 and 5e-4 the one with the lowest loss on the validation split after 60
    # steps (0.700, 0.726, 0.767).
    "recovery-minilm": functools.partial(
        recovered_accuracy,
        targets={
            "2:4": (
                RECOVERY
                | {
                    "method": "sparsegpt",
                    "pattern": "2:4",
                    "recovery.steps": 480,
                    "recovery.learning_rate": 1e-4,
                },
                1.0,
                0.0,
            ),
            "half of heads and neurons": (
                RECOVERY
                | {
                    "method": "ziplm",
                    "pattern": "heads+neurons",
                    "sparsity": 0.5,
                    "sparsity_schedule": {"name": "cubic", "events": 3},
                    "recovery.steps": 480,
                },
                3.0,
                1.4,
            ),
            "oBERT at 80 %": (
                RECOVERY
                | {
                    "method": "obert",
                    "sparsity": 0.8,
                    "saliency.gradients": 64,
                    "compensation.gradients": 64,
                    "sparsity_schedule": {"name": "cubic", "events": 4},
                    "recovery.steps": 640,
                },
                1.0,
                0.0,
            ),
        },
    ),
    "block-movement": functools.partial(
        compare_arms,
        make=digits,
        extra=measured_gains,
        keep=("speedup", "removed_heads", "removed_neurons"),
        arms={
            "hybrid": [
                "lying",
                sparse(
                    method="block-movement",
                    pattern="hybrid 8x8",
                    objective="task",
                    masks={"name": "gates", "penalty": 20.0, "learning_rate": 0.1},
                    **LYING,
                ),
            ],
            "magnitude blocks": [
                "lying",
                pruned("hybrid", method="magnitude", pattern="block 8x8", **GRADUAL),
            ],
            "unstructured movement": ["lying", sparse(method="movement", sparsity=0.8, **LYING)],
        },
        claims=[
            better("hybrid < magnitude blocks", "hybrid", "magnitude blocks"),
            Claim("faster than dense", {"hybrid": -1}, "speedup", -1.0),
        ],
    ),
    "ast": functools.partial(
        compare_arms,
        make=small_language_model,
        keep=("moved_first", "moved_last"),
        arms={
            "one-shot": [sparse(method="dense", **BYTES), pruned(method="magnitude", pattern="2:4")],
            "fixed": [sparse(method="dense", **BYTES), sparse(method="static", pattern="2:4", **MORE)],
            "adaptive": [
                sparse(method="dense", **BYTES),
                sparse(method="ast", pattern="2:4", terms="none", objective="task", **MORE),
            ],
            "with distillation": [
                sparse(method="dense", **BYTES),
                sparse(method="ast", pattern="2:4", terms="none", **MORE),
            ],
            "with block sums": [sparse(method="dense", **BYTES), sparse(method="ast", pattern="2:4", **MORE)],
        },
        claims=[
            better("fixed < one-shot", "fixed", "one-shot"),
            better("adaptive < fixed", "adaptive", "fixed"),
            better("distillation helps", "with distillation", "adaptive"),
            better("block sums help", "with block sums", "with distillation"),
            Claim("masks come to rest", {"adaptive": 1}, "moved_last", 1e-3),
        ],
    ),
    "slope": functools.partial(
        compare_arms,
        make=small_language_model,
        arms={
            "dense": [sparse(method="dense", **BYTES)],
            "2:4": [sparse(method="spdf", pattern="2:4", **BYTES)],
            "double-pruned": [sparse(method="slope", pattern="2:4", terms="none", **BYTES)],
            "with adapters": [sparse(method="slope", pattern="2:4", **{"backward.lazy": 0.1}, **BYTES)],
        },
        claims=[
            Claim(
                "the second pruning costs less than the first", {"double-pruned": 1, "2:4": -2, "dense": 1}
            ),
            better("adapters help", "with adapters", "double-pruned"),
        ],
    ),
    "dsl": functools.partial(
        compare_arms,
        make=small_language_model,
        arms={
            "dense": [sparse(method="dense", **BYTES)],
            "static": [sparse(method="spdf", sparsity=0.9, **BYTES)],
            "moving": [sparse(method="dsl", sparsity=0.9, **BYTES)],
            "moving at random": [
                sparse(method="dsl", sparsity=0.9, **{"masks.regrow_by": "random"}, **BYTES)
            ],
        },
        claims=[
            better("moving < static", "moving", "static"),
            better("gradient < random", "moving", "moving at random"),
        ],
    ),
    "spdf": functools.partial(
        compare_arms,
        make=small_language_model,
        arms=SPARSE_THEN_DENSE,
        claims=[
            better("lifted < kept", "75 %, then dense", "75 % throughout"),
            Claim("the gap shrinks", DENSE_GAP | {"pretrained at 75 %": -1.0, "pretrained dense": 1.0}),
        ],
    ),
    "mediswift": functools.partial(
        compare_arms,
        make=small_language_model,
        arms={k: v for k, v in SPARSE_THEN_DENSE.items() if k != "75 % throughout"},
        claims=[
            Claim("half of the gap", DENSE_GAP | {"pretrained at 75 %": -0.5, "pretrained dense": 0.5}),
            Claim("half of the work", {"pretrained at 75 %": 1}, "matmul_share", 0.5),
        ],
    ),
    "app": functools.partial(
        compare_arms,
        make=digits,
        keep=("cumulative_error",),
        arms={
            "dense": [sparse(method="dense", **APART)],
            "at once": [sparse(method="app", sparsity_schedule="from-start", **APART)],
            "progressive": [sparse(method="app", **APART)],
        },
        claims=[
            better("progressive < at once, all errors", "progressive", "at once", "cumulative_error"),
            better("progressive < at once, at the end", "progressive", "at once"),
        ],
    ),
    "movement": functools.partial(
        compare_arms,
        make=digits,
        arms={
            "movement": ["lying", sparse(method="movement", sparsity=0.8, **LYING | LONG)],
            "magnitude": ["lying", pruned(method="magnitude", sparsity=0.8, **gradual(300))],
            "magnitude, all layers": [
                "lying",
                pruned(method="magnitude", allocation="global", sparsity=0.8, **gradual(300)),
            ],
        },
        claims=[
            better("movement < magnitude", "movement", "magnitude"),
            better("movement < magnitude, all layers", "movement", "magnitude, all layers"),
        ],
    ),
    "pst": functools.partial(
        compare_arms,
        make=digits,
        arms={
            "PST": [
                "lying",
                sparse(
                    method="pst",
                    sparsity=0.8,
                    steps=100,
                    learning_rate=3e-3,
                    **{"masks.rank": 4, "terms.rank": 4},
                ),
            ],
            "movement": ["lying", sparse(method="movement", sparsity=0.8, **LYING)],
            "magnitude": ["lying", pruned(method="magnitude", sparsity=0.8, **GRADUAL)],
        },
        claims=[
            better("within 1 point of movement", "PST", "movement", "error", 0.01),
            better("PST < magnitude", "PST", "magnitude", "error"),
        ],
    ),
    "dsee": functools.partial(
        compare_arms,
        make=digits,
        arms={
            "adapters": ["lying", sparse(method="lora", steps=100, learning_rate=3e-3)],
            "DSEE": ["lying", sparse(method="dsee", stages=2, steps=100, learning_rate=3e-3)],
            "random support": [
                "lying",
                sparse(method="dsee", stages=2, steps=100, learning_rate=3e-3, **{"terms.support": "random"}),
            ],
        },
        claims=[
            better("within 1 point of adapters", "DSEE", "adapters", "error", 0.01),
            better("decomposition < random", "DSEE", "random support"),
        ],
    ),
    "hft": functools.partial(
        compare_arms,
        make=digits,
        extra=on_the_first_task,
        keep=("first_task_loss", "first_task_error"),
        arms={
            "full": ["lying", sparse(method="dense", **LYING)],
            "half": ["lying", sparse(method="hft", **LYING)],
            "half, drawn four times": ["lying", sparse(method="hft", stages=4, **LYING)],
            "adapters": ["lying", sparse(method="lora", **LYING)],
        },
        claims=[
            better("half forgets less", "half", "full", "first_task_loss"),
            better("within 1 point on the second task", "half", "full", "error", 0.01),
        ],
    ),
    "subtuning": functools.partial(
        compare_arms,
        make=digits,
        arms={
            "chosen": ["lying-100", subtuned(steps=60, most=2)],
            "full": ["lying-100", sparse(method="dense", steps=60)],
            "last block": [
                "lying-100",
                sparse(method="dense", trainable={"name": "blocks", "blocks": "2"}, steps=60),
            ],
            "head": ["lying-100", sparse(method="dense", trainable="head", steps=60)],
        },
        claims=[
            better("chosen < full", "chosen", "full"),
            better("chosen < last block", "chosen", "last block"),
            better("chosen < head", "chosen", "head"),
        ],
    ),
}
