"""Measurements across widths: one training for several of them, training against rounding afterwards,
widths by the logarithm of variance.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from workbench.evidence.harness import SEEDS, interval
from workbench.evidence.quantization.evidence import CALIBRATION, opened
from workbench.progress import Progress
from workbench.quantization.allocation.integer_program import allocate
from workbench.quantization.quantize import Quantize
from workbench.quantization.trained.double_rounding import at_width
from workbench.quantization.trained.train_quantized import TrainQuantized
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.loop import fit as fit_weights

SWITCHED: dict[str, Any] = {"steps": 200, "batch_size": 64, "test_examples": 512}
WIDTHS, STUDIED = (8, 6, 4, 2), (8, 4, 3, 2)
RATES = (3e-4, 1e-3, 3e-3)


def validation(result: Result, width: int, truncate: bool = False) -> float:
    assert result.subject is not None
    return at_width(result.subject, width, truncate).evaluate("validation", limit=SWITCHED["test_examples"])[
        "loss"
    ]


@functools.cache
def switched(rate: float, seed: int, **fields: Any) -> Result:
    """One training of the digits transformer; lists as tuples, so that a call is remembered."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return TrainQuantized(**(SWITCHED | given), learning_rate=rate, seed=seed).run(
        opened("digits-vit"), Progress(), cache=False
    )


def chosen(train: Callable[[float, int], Result], widths: tuple[int, ...], truncate: bool = False) -> float:
    """The rate with the least validation loss, averaged over the widths read, of the first seed."""
    return min(
        RATES,
        key=lambda rate: float(
            np.mean([validation(train(rate, SEEDS[0]), width, truncate) for width in widths])
        ),
    )


def one_for_all(name: str, progress: Progress) -> dict[str, Any]:
    """Accuracy and loss of the digits transformer at 8, 6, 4 and 2 bits: one joint training of 200 steps,
    four LSQ trainings of 50 steps each (as many in all) or of 200 each (four times as many), and a training
    for 8 bits alone whose integers are rounded or truncated.
    """
    joint = functools.partial(switched, method="double-rounding")
    alone = functools.partial(switched, **{"method": "double-rounding", "method.widths": (8,)})
    sides: dict[str, Callable[[int], tuple[Callable[[float, int], Result], bool]]] = {
        "joint": lambda _: (lambda rate, seed: joint(rate, seed), False),
        "separate": lambda width: (
            lambda rate, seed: switched(rate, seed, **{"method": "lsq", "method.bits": width}, steps=50),
            False,
        ),
        "separate, four times the steps": lambda width: (
            lambda rate, seed: switched(rate, seed, **{"method": "lsq", "method.bits": width}),
            False,
        ),
        "8 bits rounded": lambda _: (lambda rate, seed: alone(rate, seed), False),
        "8 bits truncated": lambda _: (lambda rate, seed: alone(rate, seed), True),
    }
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for label, side in progress.track(list(sides.items()), name):
        for width in WIDTHS:
            train, truncate = side(width)
            separate = label.startswith("separate")
            key = f"{label} {width}" if separate else label
            rates.setdefault(key, chosen(train, (width,) if separate else WIDTHS, truncate))
            for seed in SEEDS:
                result = train(rates[key], seed)
                assert result.subject is not None
                rows.append(
                    {"side": label, "bits": width, "seed": seed, "bytes": result.facts["bytes"]}
                    | at_width(result.subject, width, truncate).evaluate(
                        "test", limit=SWITCHED["test_examples"]
                    )
                )

    def values(label: str, width: int, key: str) -> list[float]:
        return [r[key] for r in rows if r["side"] == label and r["bits"] == width]

    def gap(first: str, second: str, width: int, key: str) -> tuple[float, float, float]:
        return interval(
            [a - b for a, b in zip(values(first, width, key), values(second, width, key), strict=True)]
        )

    accuracy = {width: gap("joint", "separate", width, "accuracy") for width in WIDTHS}
    cut = gap("joint", "8 bits truncated", min(WIDTHS), "loss")
    stored = {
        label: sum(values(label, width, "bytes")[0] for width in WIDTHS)
        if label.startswith("separate")
        else values(label, 8, "bytes")[0]
        for label in sides
    }
    losses = {
        label: {width: float(np.mean(values(label, width, "loss"))) for width in WIDTHS} for label in sides
    }
    note = "digits-vit, accuracy minus separate trainings of as many steps in all " + ", ".join(
        f"{w} bits {m:+.3f} [{a:+.3f}, {b:+.3f}]" for w, (m, a, b) in accuracy.items()
    )
    note += (
        f"; loss at 2 bits minus truncation {cut[0]:+.3f} [{cut[1]:+.3f}, {cut[2]:+.3f}] nats; stored bytes "
        f"{stored['joint']:.0f} against {stored['separate']:.0f}"
    )
    holds = all(accuracy[width][0] >= -0.01 for width in (8, 6, 4)) and cut[2] < 0
    return {
        "holds": bool(holds),
        "note": note,
        "rows": rows,
        "mean_losses": losses,
        "stored_bytes": stored,
        "rates": rates,
        "settings": SWITCHED,
        "seeds": list(SEEDS),
    }


def drawn_by_trace(name: str, progress: Progress) -> dict[str, Any]:
    """The digits transformer read at mixed widths of 4 bits on average (exact program over trace / size
    x squared error): trained with each layer's width drawn by its Hessian trace, against all layers taking
    turns, as many steps.
    """
    rows, points = [], []
    trainings = {
        side: functools.partial(switched, **{"method": "double-rounding", "method.switching": side})
        for side in ("in turn", "by trace")
    }
    rates = {side: chosen(train, WIDTHS) for side, train in trainings.items()}
    for seed in progress.track(SEEDS, name):
        runs = {side: train(rates[side], seed) for side, train in trainings.items()}
        switching = runs["by trace"].tables["switching"]
        points.append(switching.assign(seed=seed))
        row: dict[str, Any] = {"seed": seed}
        for side, run in runs.items():
            assert run.subject is not None
            layers, cost, size = run.subject.layers("blocks"), [], []
            read = {width: at_width(run.subject, width).layers("blocks") for width in WIDTHS}
            for index, (layer, trace) in enumerate(zip(layers, switching["trace"], strict=True)):
                errors = [
                    float((read[width][index].weight - layer.weight).detach().square().sum())
                    for width in WIDTHS
                ]
                cost.append([max(float(trace), 0.0) / layer.weight.numel() * error for error in errors])
                size.append([layer.weight.numel() * width for width in WIDTHS])
            found = allocate(cost, size, 4.0 * sum(layer.weight.numel() for layer in layers))
            widths = {layer.name: WIDTHS[choice] for layer, choice in zip(layers, found.choice, strict=True)}
            row |= {
                f"{side}, mixed": at_width(run.subject, widths).evaluate(
                    "test", limit=SWITCHED["test_examples"]
                )["loss"],
                f"{side}, 4 bits": at_width(run.subject, 4).evaluate("test", limit=SWITCHED["test_examples"])[
                    "loss"
                ],
            }
        rows.append(row)
    gaps = {
        other: interval([row["by trace, mixed"] - row[other] for row in rows])
        for other in ("in turn, mixed", "by trace, 4 bits", "in turn, 4 bits")
    }
    note = "digits-vit, 4 bits on average, drawn by trace and mixed minus " + "; ".join(
        f"{k} {m:+.4f} [{a:+.4f}, {b:+.4f}]" for k, (m, a, b) in gaps.items()
    )
    drawn_widths = [record for table in points for record in table.to_dict("records")]
    return {
        "holds": bool(gaps["in turn, mixed"][0] < 0),
        "note": note + " nats",
        "rows": rows,
        "switching": drawn_widths,
        "rates": rates,
        "settings": SWITCHED,
        "seeds": list(SEEDS),
    }


def before_or_after(name: str, progress: Progress) -> dict[str, Any]:
    """Test loss and bytes of the digits transformer at 8, 4, 3 and 2 bits: trained through the rounding
    (LSQ), and rounded with the clipping of least squared error after as many steps in full precision. Each
    side takes the rate with the least validation loss of the first seed, at each width."""
    on, held = opened("digits-vit"), SWITCHED["test_examples"]

    @functools.cache
    def continued(rate: float, seed: int) -> Subject:
        more = on.copy()
        fit_weights(
            more,
            steps=SWITCHED["steps"],
            batch_size=SWITCHED["batch_size"],
            learning_rate=rate,
            weight_decay=0.0,
            schedule="linear",
            warmup=0.0,
            seed=seed,
        )
        return more

    def aware(width: int, rate: float, seed: int) -> Result:
        return switched(rate, seed, **{"method": "lsq", "method.bits": width})

    def late(width: int, rate: float, seed: int) -> Result:
        rounding = Quantize(
            format=f"int{width}",
            granularity="channel",
            range="mse",
            calibration_examples=CALIBRATION,
            predict_examples=0,
            test_examples=held,
            seed=seed,
        )
        return rounding.run(continued(rate, seed), Progress(), cache=False)

    rows: list[dict[str, Any]] = []
    tuned: dict[str, float] = {}
    for width in progress.track(STUDIED, name):
        for label, side in (("trained", aware), ("rounded", late)):
            best = tuned[f"{label} {width}"] = chosen(functools.partial(side, width), (width,))
            for seed in SEEDS:
                facts = side(width, best, seed).facts
                rows.append(
                    {
                        "bits": width,
                        "side": label,
                        "seed": seed,
                        "loss": float(facts["loss"]),
                        "accuracy": float(facts["accuracy"]),
                        "bytes": float(facts["bytes"]),
                    }
                )
    gaps = {}
    for width in STUDIED:
        trained, rounded = (
            [r["loss"] for r in rows if r["bits"] == width and r["side"] == label]
            for label in ("trained", "rounded")
        )
        gaps[width] = interval([a - b for a, b in zip(trained, rounded, strict=True)])
    opening = [gaps[width][0] for width in STUDIED]
    holds = abs(opening[0]) < 0.02 and gaps[4][2] < 0 and all(b < a for a, b in itertools.pairwise(opening))
    note = (
        "digits-vit, trained minus rounded afterwards "
        + ", ".join(f"{w} bits {m:+.4f} [{a:+.4f}, {b:+.4f}]" for w, (m, a, b) in gaps.items())
        + " nats"
    )
    return {
        "holds": bool(holds),
        "note": note,
        "rows": rows,
        "rates": tuned,
        "settings": SWITCHED,
        "seeds": list(SEEDS),
        "not_measured": (
            "latency: this bench rounds values and multiplies in full precision, so all widths take one time"
        ),
    }
