"""The measurements behind the cards of schedules and budgets."""

from __future__ import annotations

import math
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record, digits_net, over_seeds, quiet, told, tuned
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.batch.batch_size import log_slope
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.schedule.schedules import ProfileLR, profile
from workbench.training.studies.comparison import interval
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
                progress=quiet(progress),
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


# ---- several corpora, one after the other ------------------------------------------------------------------
def corpus(base: Subject, text: bytes, windows: int = 1600, context: int = 64) -> Subject:
    """Another text for the same byte-level model: 80 % training, 10 % validation, 10 % test,
    in blocks of the text.
    """
    ids = torch.frombuffer(bytearray(text[: windows * context]), dtype=torch.uint8).long()
    ids = ids[: len(ids) // context * context].view(-1, context)
    ends = [round(len(ids) * share) for share in (0.8, 0.9, 1.0)]
    parts = dict(zip(("train", "validation", "test"), torch.tensor_split(ids, ends[:-1]), strict=True))
    splits = {
        k: {"input_ids": v, "attention_mask": torch.ones_like(v), "labels": v.clone()}
        for k, v in parts.items()
    }
    return Subject(
        base.name, base.model, base.task, splits, tokenizer=base.tokenizer, data_note=base.data_note
    )


def corpora() -> list[Subject]:
    """Python source, English documentation and tables of numbers, of the same size:
    a 24-wide byte model, untrained.
    """
    import sklearn.datasets

    base = language_subject(24)
    python = {
        k: {c: v[:n] for c, v in base.split(k).items()}
        for k, n in (("train", 1280), ("validation", 160), ("test", 160))
    }
    tables = b"".join(
        file.read_bytes() for file in sorted((Path(sklearn.datasets.__file__).parent / "data").glob("*.csv"))
    )
    english = "\n".join(pydoc_data.topics.topics.values()).encode()
    return [
        Subject(base.name, base.model, base.task, python, tokenizer=base.tokenizer),
        corpus(base, english),
        corpus(base, tables),
    ]


Multiple = Callable[[int], float]


def phase(
    on: Subject,
    optimizer: torch.optim.Optimizer,
    peak: float,
    multiple: Multiple,
    steps: int,
    seed: int,
    progress: Progress,
    **more: Any,
) -> Training:
    """Go on training with the optimizer as it stands: step t of the phase at `multiple(t)` of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = peak
        group.pop("initial_lr", None)
    return fit(
        on,
        steps=steps,
        batch_size=32,
        learning_rate=peak,
        optimizer=lambda model: optimizer,
        seed=seed,
        evaluate_limit=128,
        progress=quiet(progress),
        schedule=lambda made, total: torch.optim.lr_scheduler.LambdaLR(made, multiple),
        **more,
    )


def warm_cosine(t: int, steps: int, warmup: int, final: float = 0.1) -> float:
    if t < warmup:
        return (t + 1) / (warmup + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1)))


def mixed(on: Subject, earlier: list[Subject], share: float) -> Subject:
    """The training split with `share` of its windows replaced by earlier corpora's."""
    columns = {k: v.clone() for k, v in on.split("train").items()}
    count = round(share * len(columns["input_ids"]))
    for k, v in columns.items():
        for i in range(count if earlier else 0):
            v[i] = earlier[i % len(earlier)].split("train")[k][i]
    return Subject(on.name, on.model, on.task, {**on.splits, "train": columns}, tokenizer=on.tokenizer)


def infinite_schedule(name: str, progress: Progress) -> Record:
    """Three corpora in turn: a cosine for each, warmed up again, against one infinite schedule;
    with and without replay.
    """
    texts, steps, found = corpora(), 80, {}
    total = steps * len(texts)

    def run(kind: str, replay: float, peak: float, seed: int) -> tuple[float, float, float]:
        """(mean test loss over all corpora at the end, mean rise of the earlier corpora's loss at the shifts,
        mean validation loss).
        """
        infinite = profile("infinite", cooldown=0.25, constant=0.4, anneal=0.1, final=0.04)
        model = reinitialised(texts[0], seed).model
        optimizer, rises = make_optimizer("adamw", peak)(model), []
        for i, text in enumerate(texts):
            mine = mixed(text, texts[:i], replay).with_model(model)
            before = [t.with_model(model).evaluate("validation", limit=128)["loss"] for t in texts[:i]]
            if kind == "infinite":

                def multiple(t: int, i: int = i) -> float:
                    warm = (i * steps + t + 1) / 9
                    return min(warm, infinite((i * steps + t) / total))
            else:

                def multiple(t: int, i: int = i) -> float:
                    return warm_cosine(t, steps, 8)

            phase(mine, optimizer, peak, multiple, steps, seed, progress)
            after = [t.with_model(model).evaluate("validation", limit=128)["loss"] for t in texts[:i]]
            rises += [b - a for a, b in zip(before, after, strict=True)]
        test, validation = (
            float(np.mean([t.with_model(model).evaluate(split, limit=128)["loss"] for t in texts]))
            for split in ("test", "validation")
        )
        return test, float(np.mean(rises)), validation

    peaks: dict[str, float] = {}
    for kind, replay in progress.track(
        [(k, r) for r in (0.0, 0.05) for k in ("repeated cosine", "infinite")], "plans", 4
    ):
        if kind not in peaks:  # tuned without replay
            peaks[kind] = min((5e-3, 1e-2, 2e-2), key=lambda peak: run(kind, replay, peak, SEEDS[0])[2])
        best = peaks[kind]
        done = [run(kind, replay, best, seed) for seed in SEEDS]
        mean, low, high = interval([d[0] for d in done])
        found[f"{kind}, replay {replay:.0%}"] = {
            "peak": best,
            "test": mean,
            "low": low,
            "high": high,
            "forgetting": float(np.mean([d[1] for d in done])),
        }
    pairs = [(found[f"infinite, replay {r}"], found[f"repeated cosine, replay {r}"]) for r in ("0%", "5%")]
    return {
        "subject": "bytelm-24x2 on three corpora",
        "plans": found,
        "holds": all(a["test"] <= b["high"] and a["forgetting"] < b["forgetting"] for a, b in pairs),
        "note": "mean test loss over all corpora (forgetting): "
        + "; ".join(f"{k} {v['test']:.3f} ({v['forgetting']:+.2f})" for k, v in found.items()),
    }


def rewarm(name: str, progress: Progress) -> Record:
    """Python source, then English: peak rate and warm-up length of the second phase,
    a rate left at its minimum, and from scratch.
    """
    first, second, _ = corpora()
    steps, peak = 100, 1e-2
    plans: dict[str, tuple[float, float]] = {
        f"peak {m:g}, warm-up {w:.0%}": (m, w) for m in (0.5, 1.0, 2.0) for w in (0.0, 0.1)
    }
    rows: dict[str, list[list[float]]] = {}
    for seed in progress.track(SEEDS, "seeds", len(SEEDS)):
        started = reinitialised(first, seed)
        phase(
            started,
            make_optimizer("adamw", peak)(started.model),
            peak,
            lambda t: warm_cosine(t, steps, 10),
            steps,
            seed,
            progress,
        )
        for label, (size, warmup) in {
            **plans,
            "minimum kept": (0.1, -1.0),
            "from scratch": (1.0, 0.1),
        }.items():
            mine = (
                reinitialised(second, seed)
                if label == "from scratch"
                else second.with_model(started.copy().model)
            )

            def on_first(mine: Subject = mine) -> float:
                return first.with_model(mine.model).evaluate("validation", limit=128)["loss"]

            begin = mine.evaluate("validation", limit=128)["loss"]
            multiple: Multiple = (
                (lambda t: 1.0)
                if warmup < 0
                else (lambda t, w=warmup: warm_cosine(t, steps, round(w * steps)))  # type: ignore[misc]
            )
            run = phase(
                mine,
                make_optimizer("adamw", peak * size)(mine.model),
                peak * size,
                multiple,
                steps,
                seed,
                progress,
                evaluate_every=4,
            )
            curve = run.history.validation_loss.dropna().to_numpy(float)
            spike = float(curve[: len(curve) // 5].max() - begin)
            rows.setdefault(label, []).append([mine.evaluate("test", limit=128)["loss"], on_first(), spike])
    found = {}
    for label, values in rows.items():
        mean, low, high = interval([v[0] for v in values])
        found[label] = {
            "second": mean,
            "low": low,
            "high": high,
            "first": float(np.mean([v[1] for v in values])),
            "spike": float(np.mean([v[2] for v in values])),
        }
    by_peak = [
        float(np.mean([found[f"peak {m:g}, warm-up {w:.0%}"]["second"] for w in (0.0, 0.1)]))
        for m in (0.5, 1.0, 2.0)
    ]
    upstream = [
        float(np.mean([found[f"peak {m:g}, warm-up {w:.0%}"]["first"] for w in (0.0, 0.1)]))
        for m in (0.5, 1.0, 2.0)
    ]
    by_warmup = [
        float(np.mean([found[f"peak {m:g}, warm-up {w:.0%}"]["second"] for m in (0.5, 1.0, 2.0)]))
        for w in (0.0, 0.1)
    ]
    flat = max(by_warmup) - min(by_warmup) < max(by_peak) - min(by_peak)
    beats = min(by_peak) < found["from scratch"]["second"]
    larger = by_peak[2] < by_peak[0] and upstream[2] > upstream[0]
    spikes = max(v["spike"] for k, v in found.items() if k.startswith("peak")) > 0
    return {
        "subject": "bytelm-24x2, Python then English",
        "plans": found,
        "second_by_peak": by_peak,
        "first_by_peak": upstream,
        "second_by_warmup": by_warmup,
        "holds": bool(flat and beats and larger),
        "note": f"second corpus at half, once and twice the peak {', '.join(f'{v:.3f}' for v in by_peak)}, "
        f"first {', '.join(f'{v:.3f}' for v in upstream)}; "
        f"by warm-up length {', '.join(f'{v:.3f}' for v in by_warmup)}; from scratch "
        f"{found['from scratch']['second']:.3f}, minimum kept "
        f"{found['minimum kept']['second']:.3f}; the loss {'rises' if spikes else 'does not rise'} at first",
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
            progress=quiet(progress),
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
