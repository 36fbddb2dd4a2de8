"""The measurements behind the cards of batch sizes, normalisation and large batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record, digits_net, told, tuned
from workbench.progress import Progress
from workbench.scaling.hyperparameters import critical_batch
from workbench.training.batch.batch_size import (
    NormTest,
    flat_gradient,
    gradient_groups,
    log_slope,
    noise_scale,
    noise_scale_interval,
)
from workbench.training.loop import Training, fit
from workbench.training.optimizer.agvm import AGVM, module_groups
from workbench.training.studies.comparison import interval
from workbench.training.studies.critical_batch import steps_to_target
from workbench.training.studies.learning_rate_batch_size import LearningRateBatchSize, best_lr
from workbench.training.sweep.objective import language_subject, reinitialised


def adadagrad(name: str, progress: Progress) -> Record:
    """AdaGrad with the norm test against fixed small and large batches:
    test loss, updates and examples used.
    """
    on, budget = digits_net(), 30 * 1078
    found: dict[str, dict[str, Any]] = {}
    for label, batch, eta in progress.track(
        [("fixed 8", 8, None), ("fixed 512", 512, None), ("adaptive", 8, 0.3), ("adaptive, eta 0.6", 8, 0.6)],
        "plans",
    ):

        def run(seed: int, batch: int = batch, eta: float | None = eta) -> tuple[float, int, list[int]]:
            mine, rule = reinitialised(on, seed), NormTest(eta or 1.0, 512, 16, every=10)

            def spent(state: Training) -> None:
                state.stop = state.position >= budget

            state = fit(
                mine,
                steps=budget // batch,
                batch_size=batch,
                learning_rate=0.05,
                schedule="constant",
                warmup=0.0,
                clip=None,
                seed=seed,
                callbacks=[spent],
                optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
                before_step=[rule] if eta else [],
                progress=progress.quiet(),
            )
            return (
                1 - mine.evaluate("test")["accuracy"],
                state.step,
                rule.sizes[:: max(1, len(rule.sizes) // 20)],
            )

        done = [run(seed) for seed in SEEDS]
        mean, low, high = interval([d[0] for d in done])
        found[label] = {
            "test_error": mean,
            "low": low,
            "high": high,
            "updates": float(np.mean([d[1] for d in done])),
            "batch_sizes": done[0][2],
        }
    small, adaptive = found["fixed 8"], found["adaptive"]
    holds = (
        adaptive["updates"] < 0.7 * small["updates"] and adaptive["test_error"] <= small["test_error"] + 0.01
    )
    return {
        "subject": "digits-net",
        "plans": found,
        "examples": budget,
        "holds": holds,
        "note": f"adaptive: error {adaptive['test_error']:.3f} in {adaptive['updates']:.0f} updates; "
        f"fixed 8: {small['test_error']:.3f} in {small['updates']:.0f}; "
        f"fixed 512: {found['fixed 512']['test_error']:.3f}",
    }


def noise(name: str, progress: Progress) -> Record:
    """The noise scale along the run beside the critical batch of the steps-to-target hyperbola."""
    on, target = digits_net(), 0.35
    batches = (2, 4, 8, 16, 32, 64, 128)
    rates = [0.0125 * 2**i for i in range(7)]
    steps, used = [], []
    for batch in progress.track(batches, "batch sizes"):
        limit = max(300, 6000 // batch)
        made: dict[str, Any] = {
            "batch_size": batch,
            "optimizer": {"name": "sgd", "momentum": 0.0},
            "progress": progress.quiet(),
        }
        counts = {
            lr: float(
                np.mean(
                    [
                        steps_to_target(
                            reinitialised(on, seed), target, limit, learning_rate=lr, seed=seed, **made
                        )[0]
                        for seed in SEEDS
                    ]
                )
            )
            for lr in rates
        }
        best = min(counts, key=lambda lr: counts[lr])
        steps.append(counts[best])
        used.append(best)
    found = critical_batch(np.array(batches), np.array(steps))
    mine, scales = reinitialised(on, 0), []
    for _ in range(4):
        fit(
            mine,
            steps=12,
            batch_size=32,
            learning_rate=0.1,
            optimizer="sgd",
            schedule="constant",
            warmup=0.0,
            progress=progress.quiet(),
        )
        gram = gradient_groups(mine, groups=32, size=32)
        scales.append(
            (
                noise_scale(gram, 32).simple,
                *noise_scale_interval(gram, 32),
                mine.evaluate("validation")["loss"],
            )
        )
    slope = log_slope(batches, used)
    typical = float(np.median([s[0] for s in scales]))
    ratio = typical / found["critical"]
    return {
        "subject": "digits-net",
        "batch_sizes": list(batches),
        "steps": steps,
        "lr": used,
        "critical": found,
        "noise_scales": scales,
        "lr_slope": slope,
        "holds": 1 / 3 < ratio < 3 and found["r_squared"] > 0.9,
        "note": f"noise scale {typical:.1f} examples along the run, "
        f"critical batch {found['critical']:.1f} from steps to a loss of {target} "
        f"(hyperbola R2 {found['r_squared']:.3f}); best SGD rate ~ B^{slope['slope']:.2f} "
        f"[{slope['low']:.2f}, {slope['high']:.2f}]",
    }


def accumulation(name: str, progress: Progress) -> Record:
    """Batches of 8 to 128 windows by accumulating micro-batches of 8:
    steps to a loss at the best rate of each, and what fp16 would lose of the gradients.
    """
    on, target, micro = language_subject(24), 2.8, 8
    rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    rows: list[dict[str, Any]] = []
    for times in progress.track((1, 2, 4, 8, 16), "accumulation", 5):
        batch = times * micro
        made: dict[str, Any] = {
            "batch_size": batch,
            "micro_batch": micro,
            "evaluate_limit": 64,
            "progress": progress.quiet(),
        }
        limit = max(80, 3200 // batch)
        first = {
            lr: steps_to_target(
                reinitialised(on, SEEDS[0]), target, limit, learning_rate=lr, seed=SEEDS[0], **made
            )[0]
            for lr in rates
        }
        best = min(first, key=lambda lr: first[lr])
        values = [
            first[best],
            *(
                steps_to_target(
                    reinitialised(on, seed), target, limit, learning_rate=best, seed=seed, **made
                )[0]
                for seed in SEEDS[1:]
            ),
        ]
        mean, low, high = interval(values)
        rows.append(
            {
                "accumulated": times,
                "batch_size": batch,
                "lr": best,
                "at_end": best in (rates[0], rates[-1]),
                "steps": mean,
                "low": low,
                "high": high,
                "values": values,
                "tokens": mean * batch * on.task.items({k: v[:1] for k, v in on.split("train").items()}),
            }
        )
    critical = critical_batch(
        np.array([r["batch_size"] for r in rows]), np.array([r["steps"] for r in rows]), resamples=500
    )
    slope = log_slope([r["batch_size"] for r in rows], [r["lr"] for r in rows])
    parameters = list(on.model.parameters())
    columns = on.split("train")
    whole = flat_gradient(on, {k: v[:128] for k, v in columns.items()}, parameters)
    parts = torch.stack(
        [
            flat_gradient(on, {k: v[i : i + micro] for k, v in columns.items()}, parameters)
            for i in range(0, 128, micro)
        ]
    ).mean(0)
    apart = float((whole - parts).abs().max() / whole.abs().max())
    seen = whole[whole != 0]
    lost = {f"2^{power}": float(((seen * 2.0**power).half() == 0).double().mean()) for power in (0, 8, 16)}
    fewer = rows[0]["steps"] / rows[-1]["steps"]
    return {
        "subject": "bytelm-24x2",
        "target": target,
        "micro_batch": micro,
        "rows": rows,
        "critical": critical,
        "lr_slope": slope,
        "gradient_difference": apart,
        "fp16_gradients_lost": lost,
        "holds": bool(apart < 1e-5 and fewer > 1 and slope["low"] > 0),
        "note": f"steps to {target:g} nats fall {fewer:.1f} times from batch 8 to 128, tokens rise "
        f"{rows[-1]['tokens'] / rows[0]['tokens']:.1f} times; critical batch "
        f"{critical['critical']:.0f} windows [{critical['critical_low']:.0f}, "
        f"{critical['critical_high']:.0f}]; best rate ~ B^{slope['slope']:.2f} [{slope['low']:.2f}, "
        f"{slope['high']:.2f}]; accumulated gradients equal whole ones to {apart:.0e}; "
        f"fp16 would flush {100 * lost['2^0']:.2f} % of gradients to zero, "
        f"{100 * lost['2^16']:.2f} % at a scale of 2^16",
    }


def step_law_surface(name: str, progress: Progress) -> Record:
    """Laws fitted to the project's own surfaces and the published constants,
    judged by the loss their advice would have cost.
    """
    from workbench.scaling.hyperparameters import best_settings, excess_loss, step_law
    from workbench.training.sweep.objective import saved_table

    runs = saved_table("training_lr_batch")
    cells = best_settings(runs, "bowl", 0.05)
    rows = []
    for params, tokens in sorted(set(zip(runs.params, runs.tokens, strict=True))):
        cell = runs[(runs.params == params) & (runs.tokens == tokens)]
        slices = cell.rename(columns={"learning_rate": "lr", "loss": "value"})
        best = min(
            ((best_lr(slices[slices.batch_size == b]), b) for b in sorted(set(slices.batch_size))),
            key=lambda found: found[0][1],
        )
        rows.append(
            {"params": params, "tokens": tokens, "lr": best[0][0], "batch_size": best[1], "loss": best[0][1]}
        )
    published = excess_loss(runs, step_law)
    at = {(r["params"], r["tokens"]): r for r in rows}
    sizes: Sequence[float] = sorted({r["params"] for r in rows})
    falls = all(
        at[sizes[0], t]["lr"] >= at[sizes[-1], t]["lr"] * 0.999
        for t in {r["tokens"] for r in rows}
        if (sizes[0], t) in at and (sizes[-1], t) in at
    )
    smallest, largest = runs.batch_size.min(), runs.batch_size.max()
    inside = all(smallest < row["batch_size"] < largest for row in rows)
    return {
        "subject": "bytelm family",
        "cells": cells.to_dict("records"),
        "optima": rows,
        "published_excess": published.to_dict("records"),
        "holds": bool(falls and inside),
        "note": f"best rate {'falls' if falls else 'does not fall'} with size; the loss "
        f"{'has' if inside else 'has no'} minimum over batch sizes inside the grid"
        f"{'' if inside else ' (the smallest batch is best at this budget)'}; "
        "published constants, three decades outside their range, "
        f"would cost {100 * published.excess.mean():.1f} % of loss on average",
    }


def module_rates(name: str, progress: Progress) -> Record:
    """The three layers of a network at batch 32 and 539: gradient noise by layer,
    and the loss with aligned rates; the first is the reference.
    """
    on, order = digits_net(), ["0", "2", "4"]
    found, noise = {}, {}
    for label, batch, aligned in (
        ("batch 32", 32, False),
        ("batch 539", 539, False),
        ("batch 539, aligned", 539, True),
    ):
        rules: list[AGVM] = []

        def arguments(
            lr: float, seed: int, batch: int = batch, aligned: bool = aligned, rules: list[AGVM] = rules
        ) -> dict[str, Any]:
            rules.append(
                AGVM(every=2, momentum=0.9 if aligned else 1.0)
            )  # an average that never moves only measures
            return {
                "epochs": 12,
                "batch_size": batch,
                "warmup": 0.1,
                "before_step": [rules[-1]],
                "clip": None,
                "optimizer": lambda model: torch.optim.SGD(module_groups(model, order), lr=lr, momentum=0.9),
            }

        found[label] = tuned(on, (0.025, 0.05, 0.1, 0.2, 0.4), arguments, progress, label)
        noise[label] = {
            module: float(np.median([phi[module] for rule in rules for _, phi, _ in rule.history]))
            for module in order
        }
    spread = {k: max(v.values()) / max(min(v.values()), 1e-9) for k, v in noise.items()}
    large, ours = found["batch 539"], found["batch 539, aligned"]
    return {
        "subject": "digits-net",
        "plans": told(found),
        "noise": noise,
        "holds": bool(spread["batch 539"] > spread["batch 32"] and ours["test"] < large["test"]),
        "note": (
            f"largest over smallest Phi of a module {spread['batch 32']:.2f} at batch 32, "
            f"{spread['batch 539']:.2f} at 539; test loss "
        )
        + ", ".join(f"{k} {v['test']:.4f} [{v['low']:.4f}, {v['high']:.4f}]" for k, v in found.items()),
    }


def adam_slope(name: str, progress: Progress) -> Record:
    """Best learning rate of AdamW and of SGD against batch size at equal examples:
    exponents with intervals.
    """
    on, found = digits_net(), {}
    for optimizer, low, high in (("adamw", 2e-3, 0.256), ("sgd", 2e-2, 2.56)):
        study = LearningRateBatchSize(
            examples=3 * 1078,
            learning_rate_low=low,
            learning_rate_high=high,
            learning_rate_points=6,
            batch_sizes=(8, 16, 32, 64, 128),
            seeds=3,
            optimizer=optimizer,
            weight_decay=0.0,
            workers=1,
        )
        result = study.run(on, progress=progress)
        facts = {k: result.facts.get(f"lr_batch_{k}", math.nan) for k in ("slope", "slope_low", "slope_high")}
        found[optimizer] = facts | {"optima": result.tables["optima"].to_dict("records")}
    adam, sgd = found["adamw"], found["sgd"]
    inside = bool(adam["slope_low"] <= 0.5 <= adam["slope_high"])
    says = {k: f"{v['slope']:.2f} [{v['slope_low']:.2f}, {v['slope_high']:.2f}]" for k, v in found.items()}
    return {
        "subject": "digits-net",
        "optimizers": found,
        "holds": inside,
        "note": f"best AdamW rate ~ B^{says['adamw']}, SGD B^{says['sgd']}"
        + ("" if inside else " (the square root lies outside)")
        + ("" if sgd["slope"] > adam["slope"] else "; SGD's does not rise faster than Adam's"),
    }
