"""The measurements behind the cards of schedules and budgets."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from workbench.evidence.training.evidence import Record, digits_net, over_seeds, told, tuned
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.batch.batch_size import log_slope
from workbench.training.loop import Training, fit
from workbench.training.schedule.schedules import ProfileLR
from workbench.training.studies.schedule_study import ScheduleStudy
from workbench.training.sweep.objective import language_subject, reinitialised


def schedule_result(progress: Progress) -> Result:
    """One study for every schedule's card: digits net, SGD, budgets of 5, 25 and 100 % of 20 passes."""
    study = ScheduleStudy(
        examples=21_560,
        batch_size=32,
        schedules="cosine linear rex uba step one-cycle plateau delayed-linear constant".split(),
        budgets=(0.05, 0.25, 1.0),
        optimizer="sgd",
        learning_rate_points=3,
        seeds=3,
        warmup=0.0,
        weight_decay=0.0,
        workers=1,
    )
    return study.run(digits_net(), progress=progress)


def schedule(name: str, progress: Progress) -> Record:
    """Average rank over budgets of one schedule among nine, and its test loss beside cosine's."""
    result = schedule_result(progress)
    ranks = {k.removeprefix("mean_rank_"): v for k, v in result.facts.items() if k.startswith("mean_rank_")}
    table = result.table.set_index(["name", "budget"])
    rows = [
        {
            "budget": b,
            "test": table.test[name, b],
            "low": table.test_low[name, b],
            "high": table.test_high[name, b],
            "cosine": table.test["cosine", b],
            "lr": table.lr[name, b],
        }
        for b in sorted(set(result.table.budget))
    ]
    better = sum(row["test"] <= row["cosine"] for row in rows)
    others = sorted(ranks, key=lambda k: ranks[k])
    return {
        "subject": "digits-net",
        "mean_ranks": ranks,
        "budgets": rows,
        "holds": ranks[name] <= ranks["cosine"] and ranks[name] <= ranks["linear"],
        "note": (
            f"mean rank {ranks[name]:.2f} of 9 (best {others[0]} {ranks[others[0]]:.2f}, cosine "
            f"{ranks['cosine']:.2f}); below cosine at {better} of 3 budgets"
        ),
    }


def budgeted_decay(name: str, progress: Progress) -> Record:
    """Decayed to zero at the budget, constant, and a schedule too long for the budget,
    each with its own tuned rate.
    """
    on, steps, found = digits_net(), 200, {}
    half = lambda p: 1 - p / 2  # noqa: E731 - the decay of a run twice as long, cut at the budget
    plans: dict[str, Any] = {
        "decayed": "linear",
        "constant": "constant",
        "too long": lambda optimizer, total: ProfileLR(optimizer, half, total),
    }
    for label, plan in progress.track(plans.items(), "plans", 3):

        def run(lr: float, seed: int, plan: Any = plan) -> tuple[Training, Subject]:
            mine = reinitialised(on, seed)
            done = fit(
                mine,
                steps=steps,
                batch_size=32,
                learning_rate=lr,
                optimizer="sgd",
                schedule=plan,
                warmup=0.0,
                seed=seed,
                weight_decay=0.0,
                progress=progress.quiet(),
            )
            return done, mine

        best = min((0.01 * 2**i for i in range(7)), key=lambda lr: run(lr, 0)[0].validation)
        mean, low, high, values = over_seeds(
            lambda seed, best=best, run=run: run(best, seed)[1].evaluate("test")["loss"]  # type: ignore[misc]
        )
        found[label] = {"lr": best, "test": mean, "low": low, "high": high, "values": values}
    gain = found["constant"]["test"] - found["decayed"]["test"]
    holds = found["decayed"]["test"] == min(v["test"] for v in found.values())
    return {
        "subject": "digits-net",
        "plans": found,
        "holds": holds,
        "note": f"decay to the budget is {gain:+.4f} nats better than a constant rate",
    }


def power(name: str, progress: Progress) -> Record:
    """WSD's best rate over batch sizes and budgets fits eta / batch = a T^b;
    then one power schedule against WSD tuned in every cell.
    """
    on = language_subject(24)
    tokens, cells = 63, [(batch, steps) for batch in (8, 32) for steps in (16, 32, 64)]
    common: dict[str, Any] = {"weight_decay": 0.0, "warmup": 0.1, "evaluate_limit": 128}
    rates = [5e-3 * 2**i for i in range(5)]
    wsd = {
        cell: tuned(
            on,
            rates,
            common | {"batch_size": cell[0], "steps": cell[1], "schedule": "wsd"},
            progress,
            f"WSD {cell}",
        )
        for cell in cells
    }
    law = log_slope(
        [batch * steps * tokens for batch, steps in cells],
        [wsd[batch, steps]["lr"] / batch for batch, steps in cells],
    )
    a, b = math.exp(law["intercept"]), law["slope"]
    typical = float(np.median([wsd[cell]["lr"] for cell in cells]))
    rows = []
    for batch, steps in cells:
        own: dict[str, Any] = {"batch_size": batch, "steps": steps, **common}
        options = {"batch": batch, "tokens": float(batch * tokens), "a": a, "b": b}
        one = tuned(on, [4e-2], own | {"schedule": {"name": "power", **options}}, progress, "power")
        same = tuned(on, [typical], own | {"schedule": "constant"}, progress, "constant")
        best = wsd[batch, steps]
        rows.append(
            {
                "batch_size": batch,
                "steps": steps,
                "wsd": best["test"],
                "wsd_lr": best["lr"],
                "power": one["test"],
                "power_gap": one["test"] / best["test"] - 1,
                "constant_gap": same["test"] / best["test"] - 1,
            }
        )
    worst, mean = max(r["power_gap"] for r in rows), float(np.mean([r["power_gap"] for r in rows]))
    constant = float(np.mean([r["constant_gap"] for r in rows]))
    return {
        "subject": "bytelm-24x2",
        "law": {"a": a} | law,
        "cells": rows,
        "constant_lr": typical,
        "holds": law["high"] < 0 and worst < 0.01,
        "note": f"b = {b:.2f} [{law['low']:.2f}, {law['high']:.2f}]; "
        f"one power schedule costs {mean:+.1%} on average and {worst:+.1%} at worst over WSD "
        f"tuned in each of six cells, one constant rate {constant:+.1%}",
    }


def reference_time(name: str, progress: Progress) -> Record:
    """Lion and Sophia against AdamW at three budgets of reference time, each decayed within it;
    and against AdamW not decayed.
    """
    on, names = language_subject(24), ("adamw", "lion", "sophia")
    steps_of, seconds = {}, {}
    for label in names:  # the reference machine is this one, its clock processor time
        spent: list[float] = []

        def clock(run: Training, spent: list[float] = spent) -> None:
            spent.append(time.process_time())

        fit(
            reinitialised(on, 0),
            steps=40,
            batch_size=32,
            optimizer=label,
            learning_rate=1e-3,
            evaluate_limit=1,
            callbacks=[clock],
            progress=progress.quiet(),
        )
        seconds[label] = float(
            np.diff(spent[:-1]).mean()
        )  # the mean: Sophia's Hessian comes every tenth step
    budgets = {f"{n} AdamW steps": n * seconds["adamw"] for n in (16, 32, 64)}
    rates = {
        "adamw": [4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "lion": [1e-3, 2e-3, 4e-3, 8e-3],
        "sophia": [1e-3, 2e-3, 4e-3, 8e-3],
    }
    found: dict[str, dict[str, Record]] = {}
    for budget, available in budgets.items():
        plans = {label: (label, "cosine") for label in names} | {"adamw, not decayed": ("adamw", "constant")}
        for plan, (label, schedule) in plans.items():
            steps_of[label] = max(1, int(available / seconds[label]))
            made = {
                "steps": steps_of[label],
                "batch_size": 32,
                "optimizer": label,
                "schedule": schedule,
                "warmup": 0.1,
                "evaluate_limit": 128,
            }
            found.setdefault(budget, {})[plan] = tuned(on, rates[label], made, progress, f"{plan} {budget}")
    gains = {b: {k: v["adamw"]["test"] - v[k]["test"] for k in ("lion", "sophia")} for b, v in found.items()}
    against_constant = {
        b: {k: v["adamw, not decayed"]["test"] - v[k]["test"] for k in ("lion", "sophia")}
        for b, v in found.items()
    }
    made_up = all(against_constant[b][k] > gains[b][k] for b in gains for k in gains[b])
    vanished = all(v[k]["high"] > v["adamw"]["low"] for v in found.values() for k in ("lion", "sophia"))
    shown = "; ".join(
        f"{b}: " + ", ".join(f"{k} {gains[b][k]:+.3f} ({against_constant[b][k]:+.3f})" for k in gains[b])
        for b in gains
    )
    return {
        "subject": "bytelm-24x2",
        "seconds_per_step": seconds,
        "budgets": {b: told(v) for b, v in found.items()},
        "holds": bool(made_up and vanished),
        "note": (
            f"nats gained over AdamW decayed within the budget (in brackets over AdamW not decayed): {shown}"
        ),
    }
