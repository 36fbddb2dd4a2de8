"""The measurements behind the cards of what trains through a rounding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS, below, interval
from workbench.evidence.quantization.evidence import CALIBRATION, opened
from workbench.progress import Progress
from workbench.quantization.quantize import Quantize
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.subjects import Subject
from workbench.training.loop import fit as fit_weights

TRAINED: dict[str, Any] = {"steps": 40, "batch_size": 4, "test_examples": 64}


RATES = (1e-4, 3e-4, 1e-3, 3e-3)


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
