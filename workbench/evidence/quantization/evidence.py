"""Measurements that test the claims of the quantization methods' cards.

Comparisons share everything but the method: subject, layers, bits, granularity, calibration examples, test
examples. The three seeds draw three calibration sets from the training split (and seed the roundings);
intervals are Student's t over the seeds' paired differences. Nothing is tuned on the test split;
learned roundings get the steps written in the record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import workbench
from workbench.evidence.harness import SEEDS, below, interval, together
from workbench.evidence.quantization.leaderboard import redrawn
from workbench.progress import Progress
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import fit
from workbench.quantization.quantize import Quantize
from workbench.subjects import Subject

CALIBRATION, TEST = 64, 256
ROUNDED_INPUTS = (
    64  # test examples where inputs are rounded as well, which takes several times a forward pass
)


@functools.cache
def opened(name: str) -> Subject:
    return workbench.subject(name)


@functools.cache
def drawn(name: str, seed: int) -> Subject:
    """The subject with a calibration split drawn anew from its training split."""
    return redrawn(opened(name), seed, CALIBRATION)


def loss_of(fields: Mapping[str, Any], subject: str, seed: int, test_examples: int = TEST) -> float:
    """Test loss after quantizing with one calibration draw;
    the result cache shares comparators between cards.
    """
    common = {
        "calibration_examples": CALIBRATION,
        "predict_examples": 0,
        "test_examples": test_examples,
        "format": "int3",
        "seed": seed,
    }
    return float(Quantize(**(common | dict(fields))).run(drawn(subject, seed), Progress()).facts["loss"])


@functools.cache
def dense_loss(subject: str, test_examples: int = TEST) -> float:
    return opened(subject).evaluate("test", limit=test_examples)["loss"]


def against(
    method: Mapping[str, Any],
    comparator: Mapping[str, Any],
    subjects: tuple[str, ...] = ("minilm-docstrings", "bytelm"),
    test_examples: int = TEST,
) -> Callable[[str, Progress], dict[str, Any]]:
    """A measurement: test loss of one setting minus another's on the same draws;
    holds when its 95 % interval lies below 0 on every subject.
    """

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows, held, notes = [], [], []
        for subject in subjects:
            losses: dict[str, list[float]] = {"method": [], "comparator": []}
            for seed in progress.track(SEEDS, f"{name} on {subject}"):
                for key, fields in (("method", method), ("comparator", comparator)):
                    losses[key].append(loss_of(fields, subject, seed, test_examples))
            mean, low, high = interval(
                [a - b for a, b in zip(losses["method"], losses["comparator"], strict=True)]
            )
            dense = dense_loss(subject, test_examples)
            rows.append(
                {
                    "subject": subject,
                    "dense_loss": dense,
                    **losses,
                    "difference": mean,
                    "low": low,
                    "high": high,
                }
            )
            held.append(below(low, high))
            notes.append(f"{subject} {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats")
        return {
            "holds": together(held),
            "note": "; ".join(notes),
            "rows": rows,
            "settings": dict(method),
            "against": dict(comparator),
            "test_examples": test_examples,
            "calibration_examples": CALIBRATION,
            "seeds": list(SEEDS),
        }

    return measure


ALLOCATED: dict[str, Any] = dict(
    budget=3.0,
    widths=[2, 3, 4, 8],
    group_size=4096,
    calibration_examples=64,
    predict_examples=128,
    draws=1,
    test_examples=1024,
)


def allocations(
    sensitivity: Literal[gauss - newton, trace, eigenvalue, variance],
    subjects: tuple[str, ...] = ("bytelm", "minilm-docstrings"),
    seeds: tuple[int, ...] = SEEDS,
) -> Callable[[str, Progress], dict[str, Any]]:
    """Average of 3 bits, GPTQ with a zero point and a scale a row:
    the allocation against uniform, random and reversed at the same size.
    """

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for subject in subjects:
            for seed in progress.track(seeds, f"{name} on {subject}"):
                instrument = Allocate(**ALLOCATED, sensitivity=sensitivity, seed=seed)
                facts = instrument.run(
                    redrawn(opened(subject), seed, ALLOCATED["predict_examples"]), Progress()
                ).facts
                rows.append(
                    {"subject": subject, "seed": seed}
                    | {
                        k: facts[k]
                        for k in ("dense_loss", "loss", "uniform_loss", "random_loss", "reversed_loss")
                    }
                )
        notes, held = [], []
        for subject in subjects:
            mine = [r for r in rows if r["subject"] == subject]
            for rival in ("uniform", "random", "reversed"):
                mean, low, high = interval([r["loss"] - r[f"{rival}_loss"] for r in mine])
                held.append(below(low, high))
                notes.append(f"{subject} minus {rival} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        return {
            "holds": together(held),
            "note": "; ".join(notes),
            "rows": rows,
            "settings": ALLOCATED | {"sensitivity": sensitivity},
            "seeds": list(seeds),
        }

    return measure


def interactions(name: str, progress: Progress) -> dict[str, Any]:
    """Average of 3 bits on the bytelm: the allocation that knows what pairs of layers cost against
    the additive one of the same size.
    """
    rows = []
    settings: dict[str, Any] = ALLOCATED | {"sensitivity.interactions": True, "draws": 0}
    for seed in progress.track(SEEDS, name):
        facts = (
            Allocate(**settings, seed=seed)
            .run(redrawn(opened("bytelm"), seed, ALLOCATED["predict_examples"]), Progress())
            .facts
        )
        rows.append({"seed": seed, "joint": facts["loss"], "additive": facts["additive_loss"]})
    mean, low, high = interval([r["joint"] - r["additive"] for r in rows])
    return {
        "holds": below(low, high),
        "note": (
            f"bytelm at 3 bits on average, minus the additive allocation {mean:+.4f} [{low:+.4f}, "
            f"{high:+.4f}] nats"
        ),
        "rows": rows,
        "settings": settings,
        "seeds": list(SEEDS),
    }


def number_formats(name: str, progress: Progress) -> dict[str, Any]:
    """Weight noise of 8-bit formats over the bytelm's matrices, one scale a tensor,
    with the input noise of the heavy-tailed activations.
    """
    from workbench.quantization.activations.activations import ActivationQuant

    on = opened("bytelm")
    inputs: dict[str, torch.Tensor] = {}
    layers = on.layers()
    from workbench.quantization.activations.sequential import collecting

    with torch.no_grad(), collecting(on, layers) as (_, seen):
        on.task.output(on.model, next(on.batches("calibration", 4)))
    for (key, _), found in seen.items():
        inputs[key] = torch.cat(found).float()
    rows: list[dict[str, Any]] = []
    for layer in progress.track(layers, name):
        weight, x = layer.weight.detach().float(), inputs[layer.name]
        for format in ("int8", "e4m3fn", "e5m2", "e3m4"):
            low, high = x.min(), x.max()
            rounded = ActivationQuant(low, high, format=format, granularity="tensor").round(x)
            rows.append(
                {
                    "layer": layer.name,
                    "format": format,
                    "weight_error": float(
                        (fit(weight, named(format), "tensor").round(weight) - weight).square().sum()
                        / weight.square().sum()
                    ),
                    "input_error": float((rounded - x).square().sum() / x.square().sum()),
                }
            )
    means = {
        f: {
            k: float(np.mean([r[k] for r in rows if r["format"] == f]))
            for k in ("weight_error", "input_error")
        }
        for f in ("int8", "e4m3fn", "e5m2", "e3m4")
    }
    outlying = [key for key, x in inputs.items() if x.abs().max() > 60 * x.std()]
    holds = (
        means["e4m3fn"]["weight_error"] < means["e5m2"]["weight_error"]
        and means["e4m3fn"]["input_error"] < means["e5m2"]["input_error"]
    )
    note = ", ".join(
        f"{f}: weights {m['weight_error']:.2e}, inputs {m['input_error']:.2e}" for f, m in means.items()
    )
    return {
        "holds": bool(holds),
        "note": note + f"; {len(outlying)} layers with inputs beyond 60 standard deviations",
        "means": means,
        "rows": rows,
    }


def rotations(name: str, progress: Progress) -> dict[str, Any]:
    """Four-bit weights and activations of the bytelm after folded rotations, against none."""
    rows: list[dict[str, Any]] = []
    settings = Quantize(
        format="int4",
        granularity="channel",
        activations={"name": "token", "format": "uint4"},
        calibration_examples=16,
        predict_examples=0,
        test_examples=TEST,
    )
    on = opened("bytelm")
    plain = float(settings.run(on, Progress()).facts["loss"])
    for seed in progress.track(SEEDS, name):
        for kind in ("hadamard", "orthogonal"):
            rows.append(
                {
                    "seed": seed,
                    "kind": kind,
                    "loss": float(settings.run(rotate(on, kind, seed), Progress()).facts["loss"]),
                    "plain": plain,
                }
            )
    mean, low, high = interval([r["loss"] - plain for r in rows if r["kind"] == "hadamard"])
    return {
        "holds": below(low, high),
        "note": f"bytelm W4A4, folded Hadamard minus none {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats",
        "rows": rows,
    }


@functools.cache
def small_bytelm() -> Subject:
    """A Llama of two layers and 64 features with random weights, on the bytelm's data: trained in seconds."""
    on = opened("bytelm")
    config: Any = copy.deepcopy(on.model.config)
    (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    ) = 64, 160, 2, 2, 2
    torch.manual_seed(0)
    return on.with_model(type(on.model)(config))


def switch_over(name: str, progress: Progress) -> dict[str, Any]:
    """Test loss of a small byte language model with ternary blocks, trained from scratch,
    against the share of steps in full precision first.
    """
    rows: list[dict[str, Any]] = []
    shares = (0.0, 0.2, 0.4, 0.6, 0.8)
    settings: dict[str, Any] = dict(
        method="ternary", steps=120, batch_size=8, learning_rate=3e-3, from_scratch=True, test_examples=64
    )
    for share in progress.track(shares, name):
        for seed in SEEDS:
            result = TrainQuantized(**settings, switch_at=share, seed=seed).run(small_bytelm(), Progress())
            losses = result.table["train_loss"].to_numpy()
            switch = int(result.facts["switch_step"])
            spike = (
                float(losses[switch : switch + 3].mean() - losses[max(switch - 3, 0) : switch].mean())
                if switch
                else 0.0
            )
            rows.append(
                {"switch_at": share, "seed": seed, "loss": float(result.facts["loss"]), "spike": spike}
            )
    means = {share: float(np.mean([r["loss"] for r in rows if r["switch_at"] == share])) for share in shares}
    best = min(means, key=lambda share: means[share])
    at = {share: [r["loss"] for r in rows if r["switch_at"] == share] for share in shares}
    mean, low, high = (
        interval([a - b for a, b in zip(at[best], at[0.0], strict=True)]) if best else (0.0, 0.0, 0.0)
    )
    note = (
        f"ternary bytelm of 0.1 M parameters, best switch at {best:g} of the steps; "
        f"minus switching at once {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats"
    )
    return {
        "holds": 0 < best < 0.8 and high < 0,
        "note": note,
        "means": means,
        "rows": rows,
        "settings": settings,
        "seeds": list(SEEDS),
    }


@functools.cache
def continued(rate: float, seed: int) -> Subject:
    """The bytelm after further steps in full precision: what is rounded afterwards in `trained`."""
    on = opened("bytelm").copy()
    fit_weights(
        on,
        steps=TRAINED["steps"],
        batch_size=TRAINED["batch_size"],
        learning_rate=rate,
        weight_decay=0.0,
        schedule="linear",
        warmup=0.0,
        seed=seed,
    )
    return on


def trained(method: str, bits: int) -> Callable[[str, Progress], dict[str, Any]]:
    """Training through the rounding against as many steps in full precision and then the clipping of least
    squared error at the same width.

    Both sides train with AdamW and a linearly decaying rate;
    each takes the rate with the lower validation loss of its first seed.
    """
    format = {"format": f"int{bits}" if method == "lsq" else method}
    settings: dict[str, Any] = TRAINED | {"method": method}
    if method == "lsq":
        settings |= {"method.bits": bits}

    def aware(rate: float, seed: int) -> tuple[float, float]:
        result = TrainQuantized(**settings, learning_rate=rate, seed=seed).run(opened("bytelm"), Progress())
        return float(result.table["validation_loss"].dropna().iloc[-1]), float(result.facts["loss"])

    def late(rate: float, seed: int) -> tuple[float, float]:
        rounding = Quantize(
            **format,
            granularity="channel",
            range="mse",
            calibration_examples=CALIBRATION,
            predict_examples=0,
            test_examples=TRAINED["test_examples"],
            seed=seed,
        )
        result = rounding.run(continued(rate, seed), Progress())
        return result.subject.evaluate("validation", limit=TRAINED["test_examples"])["loss"], float(
            result.facts["loss"]
        )

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        losses: dict[str, list[float]] = {}
        tuning: dict[str, dict[str, float]] = {}
        for label, side in (("aware", aware), ("late", late)):
            first = {
                rate: side(rate, SEEDS[0])
                for rate in progress.track(RATES, f"{name}: learning rates, {label}")
            }
            best = min(first, key=lambda rate: first[rate][0])
            tuning[label] = {"chosen": best} | {
                f"{rate:g}": validation for rate, (validation, _) in first.items()
            }
            losses[label] = [first[best][1]] + [
                side(best, seed)[1] for seed in progress.track(SEEDS[1:], f"{name}: seeds, {label}")
            ]
        mean, low, high = interval([a - b for a, b in zip(losses["aware"], losses["late"], strict=True)])
        return {
            "holds": below(low, high),
            "note": f"bytelm, aware minus rounded at the end {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats",
            "rows": losses,
            "validation_loss": tuning,
            "settings": settings,
            "against": format | {"granularity": "channel", "range": "mse"},
            "seeds": list(SEEDS),
        }

    return measure


def compared(
    method: Mapping[str, Any], comparator: Mapping[str, Any]
) -> Callable[[str, Progress], dict[str, Any]]:
    """Training of the digits transformer through one rounding minus another, same steps, batches and seeds;
    lower is better.
    """
    shared: dict[str, Any] = dict(steps=150, batch_size=64, learning_rate=1e-3, test_examples=512)

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows = []
        for seed in progress.track(SEEDS, name):
            found = [
                TrainQuantized(**(shared | dict(fields)), seed=seed)
                .run(opened("digits-vit"), Progress())
                .facts
                for fields in (method, comparator)
            ]
            rows.append(
                {"seed": seed}
                | {
                    f"{side}_{key}": float(facts[key])
                    for side, facts in zip(("method", "comparator"), found, strict=True)
                    for key in ("loss", "accuracy", "average_width")
                }
            )
        mean, low, high = interval([r["method_loss"] - r["comparator_loss"] for r in rows])
        width = float(np.mean([r["method_average_width"] for r in rows]))
        note = (
            f"digits-vit, minus the comparator {mean:+.4f} [{low:+.4f}, "
            f"{high:+.4f}] nats at {width:.2f} bits on average against {dict(comparator)}"
        )
        return {
            "holds": below(low, high),
            "note": note,
            "rows": rows,
            "settings": shared | dict(method),
            "against": shared | dict(comparator),
            "seeds": list(SEEDS),
        }

    return measure


def merged(name: str, progress: Progress) -> dict[str, Any]:
    """L4Q against adapters beside a rounded weight that are merged and rounded again:
    both end as 2-bit integers and scales.
    """
    rows, on = [], opened("digits-vit")
    rounding: dict[str, Any] = dict(
        format="int2", granularity="channel", range="mse", predict_examples=0, test_examples=512
    )
    training: dict[str, Any] = dict(steps=150, batch_size=64, learning_rate=1e-3, test_examples=512)
    for seed in progress.track(SEEDS, name):
        inside = float(
            TrainQuantized(method={"name": "l4q", "bits": 2, "rank": 8}, seed=seed, **training)
            .run(on, Progress())
            .facts["loss"]
        )
        beginning = Quantize(**rounding, adapter={"name": "qlora", "rank": 8}, seed=seed)
        start = beginning.run(on, Progress()).subject
        tuned = TrainQuantized(method="adapters", seed=seed, **training).run(start, Progress())
        beside = float(Quantize(**rounding, seed=seed).run(tuned.subject, Progress()).facts["loss"])
        rows.append(
            {"seed": seed, "l4q": inside, "merged": beside, "before_merging": float(tuned.facts["loss"])}
        )
    mean, low, high = interval([r["l4q"] - r["merged"] for r in rows])
    return {
        "holds": below(low, high),
        "note": (
            f"digits-vit, 2 bits, minus QLoRA merged and rounded {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats"
        ),
        "rows": rows,
        "settings": training,
        "seeds": list(SEEDS),
    }


def above_majority(name: str, progress: Progress) -> dict[str, Any]:
    """Accuracy of the digits transformer with binary weights and inputs in its blocks,
    above always naming the commonest class.
    """
    rows, on = [], opened("digits-vit")
    labels = on.split("test")["labels"]
    majority = float(labels.bincount().max() / len(labels))
    settings: dict[str, Any] = dict(
        method="bibert", steps=300, batch_size=64, learning_rate=2e-3, test_examples=512
    )
    for seed in progress.track(SEEDS, name):
        rows.append(
            {
                "seed": seed,
                "accuracy": float(
                    TrainQuantized(**settings, seed=seed).run(on, Progress()).facts["accuracy"]
                ),
            }
        )
    mean, low, high = interval([r["accuracy"] - majority for r in rows])
    return {
        "holds": low > 0,
        "note": f"digits-vit, accuracy above the commonest class {mean:+.3f} [{low:+.3f}, {high:+.3f}]",
        "rows": rows,
        "majority": majority,
        "settings": settings,
        "seeds": list(SEEDS),
    }


def learned_rotations(name: str, progress: Progress) -> dict[str, Any]:
    """Four-bit weights and activations of the bytelm after a learned rotation of the stream,
    against the Hadamard rotation it started from.
    """
    rows, on = [], opened("bytelm")
    settings = Quantize(
        format="int4",
        granularity="channel",
        activations={"name": "token", "format": "uint4"},
        calibration_examples=16,
        predict_examples=0,
        test_examples=ROUNDED_INPUTS,
    )
    learning: dict[str, Any] = {
        "kind": {"name": "learned", "steps": 40, "activation_bits": 4, "heads": False},
        "calibration_examples": 32,
    }
    for seed in progress.track(SEEDS, name):
        losses = [
            float(
                settings.run(Rotate(**fields, seed=seed).run(on, Progress()).subject, Progress()).facts[
                    "loss"
                ]
            )
            for fields in (learning, {"kind": "hadamard", "calibration_examples": 16})
        ]
        rows.append({"seed": seed, "learned": losses[0], "hadamard": losses[1]})
    mean, low, high = interval([r["learned"] - r["hadamard"] for r in rows])
    return {
        "holds": below(low, high),
        "note": (
            f"bytelm W4A4, {ROUNDED_INPUTS} test examples, learned minus Hadamard {mean:+.4f} [{low:+.4f}, "
            f"{high:+.4f}] nats"
        ),
        "rows": rows,
        "settings": learning,
        "test_examples": ROUNDED_INPUTS,
        "seeds": list(SEEDS),
    }
