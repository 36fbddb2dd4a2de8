"""The measurements behind the training cards: small, with three seeds, tuned on validation, reported on test, never on the tuning split."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.instruments import Progress, Result
from workbench.scaling.hyperparameters import critical_batch
from workbench.subjects import Subject, subject
from workbench.subjects.tasks import ModuleTask
from workbench.training.batch import NormTest, gradient_groups, log_slope, noise_scale, noise_scale_interval
from workbench.training.comparisons import OptimizerComparison, ScheduleStudy, interval
from workbench.training.loop import Training, fit
from workbench.training.normalisation import GhostBatchNorm
from workbench.training.objective import language_subject, reinitialised
from workbench.training.schedules import ProfileLR
from workbench.training.surface import LearningRateBatchSize, best_lr
from workbench.training.train_study import OptimizerName

SEEDS = (0, 1, 2)
Record = dict[str, Any]


def digits_net(norm: Callable[[int], nn.Module] | None = None, hidden: int = 64) -> Subject:
    """scikit-learn's digits with a network of two hidden layers, by default without normalisation; untrained."""
    data = subject("digits-softmax")
    layers: list[nn.Module] = []
    for width_in in (64, hidden):
        layers += [nn.Linear(width_in, hidden), *([norm(hidden)] if norm else []), nn.ReLU()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Linear(hidden, 10))
    return Subject("digits-net", model, ModuleTask(), {k: data.split(k) for k in ("train", "validation", "test")}, data_note=data.data_note)


def quiet(progress: Progress) -> Progress:
    inner = Progress()
    inner.stop = progress.stop
    return inner


def over_seeds(make: Callable[[int], float]) -> tuple[float, float, float, list[float]]:
    values = [make(seed) for seed in SEEDS]
    return (*interval(values), values)


# ---- schedules ----------------------------------------------------------------------------------------------------
def schedule_result(progress: Progress) -> Result:
    """One study for every schedule's card: digits net, SGD, budgets of 5, 25 and 100 % of 20 passes."""
    study = ScheduleStudy(
        examples=21_560,
        batch_size=32,
        schedules="cosine,linear,rex,uba,step,one-cycle,plateau,delayed-linear,constant",
        budgets=(0.05, 0.25, 1.0),
        phi=0.5,
        optimizer="sgd",
        lr_points=3,
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
    rows = [{"budget": b, "test": table.test[name, b], "low": table.test_low[name, b], "high": table.test_high[name, b], "cosine": table.test["cosine", b],
             "lr": table.lr[name, b]} for b in sorted(set(result.table.budget))]  # fmt: skip
    better = sum(row["test"] <= row["cosine"] for row in rows)
    others = sorted(ranks, key=lambda k: ranks[k])
    return {
        "subject": "digits-net",
        "mean_ranks": ranks,
        "budgets": rows,
        "holds": ranks[name] <= ranks["cosine"] and ranks[name] <= ranks["linear"],
        "note": f"mean rank {ranks[name]:.2f} of 9 (best {others[0]} {ranks[others[0]]:.2f}, cosine {ranks['cosine']:.2f}); below cosine at {better} of 3 budgets",
    }


def budgeted_decay(name: str, progress: Progress) -> Record:
    """Decayed to zero at the budget, constant, and a schedule too long for the budget, each with its own tuned rate."""
    on, steps, found = digits_net(), 200, {}
    half = lambda p: 1 - p / 2  # noqa: E731 - the decay of a run twice as long, cut at the budget
    plans: dict[str, Any] = {"decayed": "linear", "constant": "constant", "too long": lambda optimizer, total: ProfileLR(optimizer, half, total)}
    for label, plan in progress.track(plans.items(), "plans", 3):

        def run(lr: float, seed: int, plan: Any = plan) -> tuple[Training, Subject]:
            mine = reinitialised(on, seed)
            done = fit(mine, steps=steps, batch_size=32, lr=lr, optimizer="sgd", schedule=plan, warmup=0.0, seed=seed, weight_decay=0.0,
                       progress=quiet(progress))  # fmt: skip
            return done, mine

        best = min((0.01 * 2**i for i in range(7)), key=lambda lr: run(lr, 0)[0].validation)
        mean, low, high, values = over_seeds(lambda seed, best=best, run=run: run(best, seed)[1].evaluate("test")["loss"])  # type: ignore[misc]
        found[label] = {"lr": best, "test": mean, "low": low, "high": high, "values": values}
    gain = found["constant"]["test"] - found["decayed"]["test"]
    holds = found["decayed"]["test"] == min(v["test"] for v in found.values())
    return {"subject": "digits-net", "plans": found, "holds": holds, "note": f"decay to the budget is {gain:+.4f} nats better than a constant rate"}


# ---- optimizers ---------------------------------------------------------------------------------------------------
def optimizer_result(progress: Progress) -> Result:
    """One study for every optimizer's card: a 24-wide byte language model, equal tuning, three seeds."""
    study = OptimizerComparison(examples=1536, batch_size=32, optimizers="adamw,lamb,lion,muon,soap,adafactor", lr_points=3, lr_factor=2.0, seeds=3, evaluate_limit=128, workers=1)
    return study.run(language_subject(24), progress=progress)


def optimizer(name: str, progress: Progress) -> Record:
    result = optimizer_result(progress)
    table = result.table.set_index("name")
    mine, base = table.loc[name], table.loc["adamw"]
    keep = ["lr", "test", "test_low", "test_high", "seconds_per_run", "state_bytes", "tuning_runs", "at_end"]
    return {
        "subject": "bytelm-24x2",
        "leaderboard": result.table[["name", *keep]].to_dict("records"),
        "rank_flips": result.facts["rank_flips"],
        "lr_spread": result.facts["lr_spread"],
        "holds": bool(mine.test < base.test),
        "note": f"test {mine.test:.4f} [{mine.test_low:.4f}, {mine.test_high:.4f}] at lr {mine.lr:.2g}, AdamW {base.test:.4f} at {base.lr:.2g}; best {result.facts['best']}",
    }


def lamb(name: str, progress: Progress) -> Record:
    """What the largest batch costs: best validation loss over learning rates at equal epochs, LAMB against AdamW."""
    on, found = digits_net(), {}
    ranges: dict[OptimizerName, tuple[float, float]] = {"adamw": (5e-4, 3.2e-2), "lamb": (2e-3, 0.128)}
    for optimizer_name, (low, high) in ranges.items():
        study = LearningRateBatchSize(examples=21_560, lr_low=low, lr_high=high, lr_points=7, batch_sizes=(32, 128, 512, 1078), seeds=3, optimizer=optimizer_name, workers=1)  # type: ignore[arg-type]
        result = study.run(on, progress=progress)
        best = (result.tables or {})["optima"]
        near = result.table.groupby(["batch_size", "lr"], as_index=False)[["value"]].mean()
        wide = {int(b): int((near[near.batch_size == b].value < 1.25 * near[near.batch_size == b].value.min()).sum()) for b in set(near.batch_size)}
        found[optimizer_name] = {
            "loss": dict(zip(map(int, best.batch_size), best.value, strict=True)),
            "lr": dict(zip(map(int, best.batch_size), best.lr, strict=True)),
            "rates_within_25_percent": wide,
        }
    worse = {k: v["loss"][1078] - v["loss"][32] for k, v in found.items()}
    return {
        "subject": "digits-net",
        "optimizers": found,
        "degradation": worse,
        "holds": worse["lamb"] < worse["adamw"],
        "note": f"validation loss from batch 32 to the full 1078 at equal epochs: LAMB {worse['lamb']:+.3f}, AdamW {worse['adamw']:+.3f}",
    }


def galore(name: str, progress: Progress) -> Record:
    """GaLore at a quarter of the width against Adam: loss at equal tuning, and optimizer state in bytes."""
    from workbench.training.optimizers import make_optimizer, state_bytes

    on, found = language_subject(48), {}
    for label, rates, options in (("adamw", (4e-3, 8e-3, 1.6e-2), {}), ("galore", (8e-3, 1.6e-2, 3.2e-2, 6.4e-2), {"rank": 12, "refresh": 25})):

        def run(lr: float, seed: int, label: str = label, options: dict[str, Any] = options) -> tuple[Training, Subject]:
            mine = reinitialised(on, seed)
            made = make_optimizer(label, lr, 0.01, **options)
            return fit(mine, steps=60, batch_size=16, lr=lr, optimizer=made, seed=seed, warmup=0.1, evaluate_limit=128, progress=quiet(progress)), mine

        best = min(progress.track(rates, f"tune {label}"), key=lambda lr: run(lr, 0)[0].validation)
        done = [run(best, seed) for seed in SEEDS]
        mean, low, high = interval([mine.evaluate("test", limit=128)["loss"] for _, mine in done])
        hidden = {id(p) for _, block in on.blocks() for p in block.parameters() if p.ndim == 2}
        found[label] = {"lr": best, "test": mean, "low": low, "high": high, "state_bytes": state_bytes(done[0][0].optimizer), "hidden_matrices": len(hidden)}
    saved = 1 - found["galore"]["state_bytes"] / found["adamw"]["state_bytes"]
    gap = found["galore"]["test"] / found["adamw"]["test"] - 1
    return {
        "subject": "bytelm-48x2",
        "optimizers": found,
        "state_saved": saved,
        "holds": gap < 0.05 and saved > 0.3,
        "note": f"loss {gap:+.1%} against AdamW, optimizer state {-saved:.0%} (embeddings and head keep full moments)",
    }


# ---- batch size ---------------------------------------------------------------------------------------------------
def ghost_batch_norm(name: str, progress: Progress) -> Record:
    """Small batch; naive large batch; sqrt rate with ghost batch norm; and as many updates as the small batch made."""
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
    found = {}
    for label, (on, batch, rate, passes) in progress.track(plans.items(), "plans", len(plans)):

        def run(seed: int, on: Subject = on, batch: int = batch, rate: float = rate, passes: float = passes) -> float:
            mine = fresh_norms(on, seed)
            fit(
                mine,
                epochs=passes,
                batch_size=batch,
                lr=rate,
                optimizer="sgd",
                schedule="step",
                seed=seed,
                warmup=0.0,
                weight_decay=0.0,
                progress=quiet(progress),
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


def adadagrad(name: str, progress: Progress) -> Record:
    """AdaGrad with the norm test against fixed small and large batches: test loss, updates and examples used."""
    on, budget, found = digits_net(), 30 * 1078, {}
    for label, batch, eta in progress.track([("fixed 8", 8, None), ("fixed 512", 512, None), ("adaptive", 8, 0.3), ("adaptive, eta 0.6", 8, 0.6)], "plans"):

        def run(seed: int, batch: int = batch, eta: float | None = eta) -> tuple[float, int, list[int]]:
            mine, rule = reinitialised(on, seed), NormTest(eta or 1.0, 512, 16, every=10)

            def spent(state: Training) -> None:
                state.stop = state.position >= budget

            state = fit(
                mine,
                steps=budget // batch,
                batch_size=batch,
                lr=0.05,
                schedule="constant",
                warmup=0.0,
                clip=None,
                seed=seed,
                callbacks=[spent],
                optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
                before_step=[rule] if eta else [],
                progress=quiet(progress),
            )
            return 1 - mine.evaluate("test")["accuracy"], state.step, rule.sizes[:: max(1, len(rule.sizes) // 20)]

        done = [run(seed) for seed in SEEDS]
        mean, low, high = interval([d[0] for d in done])
        found[label] = {"test_error": mean, "low": low, "high": high, "updates": float(np.mean([d[1] for d in done])), "batch_sizes": done[0][2]}
    small, adaptive = found["fixed 8"], found["adaptive"]
    holds = adaptive["updates"] < 0.7 * small["updates"] and adaptive["test_error"] <= small["test_error"] + 0.01
    return {
        "subject": "digits-net",
        "plans": found,
        "examples": budget,
        "holds": holds,
        "note": f"adaptive: error {adaptive['test_error']:.3f} in {adaptive['updates']:.0f} updates; "
        f"fixed 8: {small['test_error']:.3f} in {small['updates']:.0f}; "
        f"fixed 512: {found['fixed 512']['test_error']:.3f}",
    }


def steps_to_target(on: Subject, batch: int, lr: float, target: float, limit: int, seed: int, progress: Progress) -> float:
    """Steps of SGD at a constant rate until the validation loss is at most `target`, interpolated; infinite after `limit`."""
    mine, every, seen = reinitialised(on, seed), max(1, limit // 200), [(0, math.inf)]

    def look(run: Training) -> None:
        if run.step % every == 0:
            seen.append((run.step, run.rows[-1]["validation_loss"]))
            run.stop = seen[-1][1] <= target

    fit(
        mine,
        steps=limit,
        batch_size=batch,
        lr=lr,
        optimizer="sgd",
        optimizer_options={"momentum": 0.0},
        schedule="constant",
        warmup=0.0,
        clip=None,
        weight_decay=0.0,
        evaluate_every=every,
        callbacks=[look],
        seed=seed,
        progress=quiet(progress),
    )
    if seen[-1][1] > target:
        return math.inf
    (s0, l0), (s1, l1) = seen[-2], seen[-1]
    return s1 if not math.isfinite(l0) else s0 + (s1 - s0) * (l0 - target) / (l0 - l1)


def noise(name: str, progress: Progress) -> Record:
    """The noise scale along the run beside the critical batch of the steps-to-target hyperbola."""
    on, target = digits_net(), 0.35
    batches = (2, 4, 8, 16, 32, 64, 128)
    rates = [0.0125 * 2**i for i in range(7)]
    steps, used = [], []
    for batch in progress.track(batches, "batch sizes"):
        limit = max(300, 6000 // batch)
        counts = {lr: float(np.mean([steps_to_target(on, batch, lr, target, limit, seed, progress) for seed in SEEDS])) for lr in rates}
        best = min(counts, key=lambda lr: counts[lr])
        steps.append(counts[best])
        used.append(best)
    found = critical_batch(np.array(batches), np.array(steps))
    mine, scales = reinitialised(on, 0), []
    for _ in range(4):
        fit(mine, steps=12, batch_size=32, lr=0.1, optimizer="sgd", schedule="constant", warmup=0.0, progress=quiet(progress))
        gram = gradient_groups(mine, groups=32, size=32)
        scales.append((noise_scale(gram, 32).simple, *noise_scale_interval(gram, 32), mine.evaluate("validation")["loss"]))
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
        "note": f"noise scale {typical:.1f} examples along the run, critical batch {found['critical']:.1f} from steps to a loss of {target} "
        f"(hyperbola R2 {found['r_squared']:.3f}); best SGD rate ~ B^{slope['slope']:.2f} [{slope['low']:.2f}, {slope['high']:.2f}]",
    }


def lipschitz(name: str, progress: Progress) -> Record:
    """Muon with the soft cap: the product of layer norms never exceeds the certificate, at which cost in loss."""
    on, cap = digits_net(), 2.0
    found: dict[str, dict[str, Any]] = {}
    certificate = cap**3  # three linear layers, ReLU is 1-Lipschitz

    def measure(seed: int, options: dict[str, Any], kind: str) -> tuple[float, float, float]:
        from workbench.training.muon import Muon

        mine = reinitialised(on, seed)
        if kind == "muon":
            with torch.no_grad():
                for p in mine.model.parameters():
                    if p.ndim == 2:  # begin inside the cap
                        p.mul_(min(1.0, 0.9 * cap / float(torch.linalg.matrix_norm(p.detach(), 2))))

        def build(model: nn.Module) -> torch.optim.Optimizer:
            from workbench.training.optimizers import Together

            matrices = [p for p in model.parameters() if p.ndim == 2]
            rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=2e-3, weight_decay=0.0)
            return Together([Muon(matrices, lr=0.05, scale="none", **options), rest]) if kind == "muon" else torch.optim.AdamW(model.parameters(), lr=4e-3)

        fit(mine, steps=300, batch_size=32, optimizer=build, seed=seed, progress=quiet(progress))
        bound = math.prod(float(torch.linalg.matrix_norm(p.detach(), 2)) for p in mine.model.parameters() if p.ndim == 2)
        inputs = mine.split("test")["inputs"][:64]
        jacobians = torch.func.vmap(torch.func.jacrev(mine.model))(inputs).detach()
        return mine.evaluate("test")["accuracy"], bound, float(torch.linalg.matrix_norm(jacobians, 2).max())

    for label, kind, options in (("AdamW", "adamw", {}), ("Muon", "muon", {}), ("Muon, soft cap", "muon", {"weight_map": "soft-cap", "cap": cap})):
        done = [measure(seed, options, kind) for seed in SEEDS]
        found[label] = {"test_accuracy": float(np.mean([d[0] for d in done])), "bound": [d[1] for d in done], "largest_slope": [d[2] for d in done]}
    capped = found["Muon, soft cap"]
    holds = max(capped["bound"]) <= certificate * 1.0001 and max(capped["largest_slope"]) <= certificate and (capped["test_accuracy"] > found["AdamW"]["test_accuracy"] - 0.02)
    return {
        "subject": "digits-net",
        "certificate": certificate,
        "optimizers": found,
        "holds": bool(holds),
        "note": f"certificate {certificate:g}: measured slope at most {max(capped['largest_slope']):.2f}, accuracy {capped['test_accuracy']:.3f}; "
        f"AdamW's bound {max(found['AdamW']['bound']):.0f}, accuracy {found['AdamW']['test_accuracy']:.3f}",
    }


def step_law_surface(name: str, progress: Progress) -> Record:
    """Laws fitted to the project's own surfaces and the published constants, judged by the loss their advice would have cost."""
    from workbench.scaling.hyperparameters import best_settings, excess_loss, step_law
    from workbench.training.objective import saved_table

    runs = saved_table("training_lr_batch")
    cells = best_settings(runs, "bowl", 0.05)
    rows = []
    for params, tokens in sorted(set(zip(runs.params, runs.tokens, strict=True))):
        cell = runs[(runs.params == params) & (runs.tokens == tokens)]
        slices = cell.rename(columns={"learning_rate": "lr", "loss": "value"})
        best = min(((best_lr(slices[slices.batch_size == b]), b) for b in sorted(set(slices.batch_size))), key=lambda found: found[0][1])
        rows.append({"params": params, "tokens": tokens, "lr": best[0][0], "batch_size": best[1], "loss": best[0][1]})
    published = excess_loss(runs, step_law)
    at = {(r["params"], r["tokens"]): r for r in rows}
    sizes: Sequence[float] = sorted({r["params"] for r in rows})
    falls = all(at[sizes[0], t]["lr"] >= at[sizes[-1], t]["lr"] * 0.999 for t in {r["tokens"] for r in rows} if (sizes[0], t) in at and (sizes[-1], t) in at)
    smallest, largest = runs.batch_size.min(), runs.batch_size.max()
    inside = all(smallest < row["batch_size"] < largest for row in rows)
    return {
        "subject": "bytelm family",
        "cells": cells.to_dict("records"),
        "optima": rows,
        "published_excess": published.to_dict("records"),
        "holds": bool(falls and inside),
        "note": f"best rate {'falls' if falls else 'does not fall'} with size; the loss {'has' if inside else 'has no'} minimum over batch sizes inside the grid"
        f"{'' if inside else ' (the smallest batch is best at this budget)'}; published constants, three decades outside their range, "
        f"would cost {100 * published.excess.mean():.1f} % of loss on average",
    }
