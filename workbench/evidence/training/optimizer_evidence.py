"""The measurements behind the cards of optimizers."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record, digits_net, quiet, told, tuned
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Batch, Subject
from workbench.training.batch.batch_size import log_slope
from workbench.training.loop import Training, fit
from workbench.training.models.lipschitz import LipschitzTransformer, largest_slope
from workbench.training.models.self_tuning import (
    Hyperparameter,
    Setting,
    TunedDropout,
    self_tuning,
    squared_weights,
    tune,
)
from workbench.training.optimizer.mkor import rank_one_inverse
from workbench.training.optimizer.optimizers import OPTIMIZER
from workbench.training.studies.comparison import interval
from workbench.training.studies.critical_batch import steps_to_target
from workbench.training.studies.learning_rate_batch_size import LearningRateBatchSize
from workbench.training.studies.optimizer_comparison import OptimizerComparison
from workbench.training.sweep.objective import language_subject, reinitialised


def optimizer_result(progress: Progress) -> Result:
    """One study for every optimizer's card: a 24-wide byte language model, equal tuning, three seeds."""
    study = OptimizerComparison(
        examples=2048,
        batch_size=32,
        optimizers="adamw lamb lion muon soap sophia kron mars scion adafactor".split(),
        learning_rate_points=3,
        learning_rate_factor=2.0,
        seeds=3,
        evaluate_limit=128,
        workers=1,
    )
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
        "note": (
            f"test {mine.test:.4f} [{mine.test_low:.4f}, {mine.test_high:.4f}] at lr {mine.lr:.2g}, AdamW "
            f"{base.test:.4f} at {base.lr:.2g}; best {result.facts['best']}"
        ),
    }


def lamb(name: str, progress: Progress) -> Record:
    """What the largest batch costs: best validation loss over learning rates at equal epochs,
    LAMB against AdamW.
    """
    on, found = digits_net(), {}
    ranges = {"adamw": (5e-4, 3.2e-2), "lamb": (2e-3, 0.128)}
    for optimizer_name, (low, high) in ranges.items():
        study = LearningRateBatchSize(
            examples=21_560,
            learning_rate_low=low,
            learning_rate_high=high,
            learning_rate_points=7,
            batch_sizes=(32, 128, 512, 1078),
            seeds=3,
            optimizer=OPTIMIZER.chosen(optimizer_name),
            workers=1,
        )
        result = study.run(on, progress=progress)
        best = result.tables["optima"]
        near = result.table.groupby(["batch_size", "lr"], as_index=False)[["value"]].mean()
        wide = {
            int(b): int(
                (near[near.batch_size == b].value < 1.25 * near[near.batch_size == b].value.min()).sum()
            )
            for b in set(near.batch_size)
        }
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
        "note": (
            "validation loss from batch 32 to the full 1078 at equal epochs: "
            f"LAMB {worse['lamb']:+.3f}, AdamW {worse['adamw']:+.3f}"
        ),
    }


def galore(name: str, progress: Progress) -> Record:
    """GaLore at a quarter of the width against Adam: loss at equal tuning, and optimizer state in bytes."""
    from workbench.training.optimizer.optimizers import make_optimizer, state_bytes

    on, found = language_subject(48), {}
    for label, rates, options in (
        ("adamw", (4e-3, 8e-3, 1.6e-2), {}),
        ("galore", (8e-3, 1.6e-2, 3.2e-2, 6.4e-2), {"rank": 12, "refresh": 25}),
    ):

        def run(
            lr: float, seed: int, label: str = label, options: dict[str, Any] = options
        ) -> tuple[Training, Subject]:
            mine = reinitialised(on, seed)
            made = make_optimizer(label, lr, 0.01, **options)
            return fit(
                mine,
                steps=60,
                batch_size=16,
                learning_rate=lr,
                optimizer=made,
                seed=seed,
                warmup=0.1,
                evaluate_limit=128,
                progress=quiet(progress),
            ), mine

        best = min(progress.track(rates, f"tune {label}"), key=lambda lr: run(lr, 0)[0].validation)
        done = [run(best, seed) for seed in SEEDS]
        mean, low, high = interval([mine.evaluate("test", limit=128)["loss"] for _, mine in done])
        hidden = {id(p) for _, block in on.blocks() for p in block.parameters() if p.ndim == 2}
        found[label] = {
            "lr": best,
            "test": mean,
            "low": low,
            "high": high,
            "state_bytes": state_bytes(done[0][0].optimizer),
            "hidden_matrices": len(hidden),
        }
    saved = 1 - found["galore"]["state_bytes"] / found["adamw"]["state_bytes"]
    gap = found["galore"]["test"] / found["adamw"]["test"] - 1
    return {
        "subject": "bytelm-48x2",
        "optimizers": found,
        "state_saved": saved,
        "holds": gap < 0.05 and saved > 0.3,
        "note": (
            f"loss {gap:+.1%} against AdamW, optimizer state {-saved:.0%} (embeddings and head keep full "
            "moments)"
        ),
    }


def lipschitz(name: str, progress: Progress) -> Record:
    """Muon with the soft cap: the product of layer norms never exceeds the certificate,
    at which cost in loss.
    """
    on, cap = digits_net(), 2.0
    found: dict[str, dict[str, Any]] = {}
    certificate = cap**3  # three linear layers, ReLU is 1-Lipschitz

    def measure(seed: int, options: dict[str, Any], kind: str) -> tuple[float, float, float]:
        from workbench.training.optimizer.muon import Muon

        mine = reinitialised(on, seed)
        if kind == "muon":
            with torch.no_grad():
                for p in mine.model.parameters():
                    if p.ndim == 2:  # begin inside the cap
                        p.mul_(min(1.0, 0.9 * cap / float(torch.linalg.matrix_norm(p.detach(), 2))))

        def build(model: nn.Module) -> torch.optim.Optimizer:
            from workbench.training.optimizer.combined import Together

            matrices = [p for p in model.parameters() if p.ndim == 2]
            rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=2e-3, weight_decay=0.0)
            return (
                Together([Muon(matrices, lr=0.05, scale="none", **options), rest])
                if kind == "muon"
                else torch.optim.AdamW(model.parameters(), lr=4e-3)
            )

        fit(mine, steps=300, batch_size=32, optimizer=build, seed=seed, progress=quiet(progress))
        bound = math.prod(
            float(torch.linalg.matrix_norm(p.detach(), 2)) for p in mine.model.parameters() if p.ndim == 2
        )
        inputs = mine.split("test")["inputs"][:64]
        jacobians = torch.func.vmap(torch.func.jacrev(mine.model))(inputs).detach()
        return mine.evaluate("test")["accuracy"], bound, float(torch.linalg.matrix_norm(jacobians, 2).max())

    for label, kind, options in (
        ("AdamW", "adamw", {}),
        ("Muon", "muon", {}),
        ("Muon, soft cap", "muon", {"weight_map": "soft-cap", "cap": cap}),
    ):
        done = [measure(seed, options, kind) for seed in SEEDS]
        found[label] = {
            "test_accuracy": float(np.mean([d[0] for d in done])),
            "bound": [d[1] for d in done],
            "largest_slope": [d[2] for d in done],
        }
    capped = found["Muon, soft cap"]
    holds = (
        max(capped["bound"]) <= certificate * 1.0001
        and max(capped["largest_slope"]) <= certificate
        and (capped["test_accuracy"] > found["AdamW"]["test_accuracy"] - 0.02)
    )
    return {
        "subject": "digits-net",
        "certificate": certificate,
        "optimizers": found,
        "holds": bool(holds),
        "note": f"certificate {certificate:g}: measured slope at most {max(capped['largest_slope']):.2f}, "
        f"accuracy {capped['test_accuracy']:.3f}; "
        f"AdamW's bound {max(found['AdamW']['bound']):.0f}, accuracy {found['AdamW']['test_accuracy']:.3f}",
    }


def lipschitz_transformer(name: str, progress: Progress) -> Record:
    """Loss against certificate of a Lipschitz transformer on bytes:
    AdamW, AdamW with decay, Muon, Muon with the soft cap at three caps.
    """
    given = language_subject(24)

    def fresh(on: Subject, seed: int) -> Subject:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return on.with_model(LipschitzTransformer(int(given.model.config.vocab_size), 24))  # type: ignore[union-attr, arg-type]

    on = fresh(given, 0)
    muon = {
        "optimizer": {"name": "muon", "scale": "none", "adamw_ratio": 0.1},
        "weight_decay": 0.0,
    }
    ladder: tuple[float, ...] = (1.6e-2, 3.2e-2, 6.4e-2)
    plans: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
        "AdamW": ({"weight_decay": 0.0}, ladder),
        "AdamW, decay 1": ({"weight_decay": 1.0}, ladder),
        "Muon": (muon, (0.1, 0.3, 0.9)),
    }
    for cap in (1.0, 2.0, 4.0):
        options = {**muon["optimizer"], "weight_map": "soft-cap", "cap": cap}  # type: ignore[dict-item]
        capped_muon = muon | {"optimizer": options}
        plans[f"Muon, cap {cap:g}"] = (capped_muon, (0.1, 0.2, 0.4))
    found: dict[str, Record] = {}
    for label, (made, rates) in plans.items():
        found[label] = tuned(
            on,
            rates,
            {"steps": 100, "batch_size": 16, "warmup": 0.1, "evaluate_limit": 128} | made,
            progress,
            label,
            fresh=fresh,
        )
        ids = given.split("test")["input_ids"][:8]
        models = [mine.model for _, mine in found[label]["done"]]
        found[label] |= {
            "certificate": [m.certificate() for m in models],
            "largest_slope": [largest_slope(m, ids) for m in models],
            "spectral_norms": [
                [float(torch.linalg.matrix_norm(p.detach(), 2)) for p in m.blocks.parameters()]
                for m in models
            ],
        }
    kept = all(
        slope <= bound
        for v in found.values()
        for slope, bound in zip(v["largest_slope"], v["certificate"], strict=True)
    )
    capped = all(
        max(map(max, found[f"Muon, cap {cap:g}"]["spectral_norms"])) <= cap * 1.001 for cap in (1.0, 2.0, 4.0)
    )
    others = [found[k] for k in ("AdamW", "AdamW, decay 1")]
    # the frontier: whatever AdamW reached, some capped Muon reached at no larger a bound
    ours = [found[k] for k in found if k.startswith("Muon, cap")]
    ahead = all(
        any(o["test"] <= v["test"] and np.mean(o["certificate"]) <= np.mean(v["certificate"]) for o in ours)
        for v in others
    )
    return {
        "subject": "a Lipschitz transformer of width 24 and two layers on the bytes of bytelm",
        "plans": told(found),
        "holds": bool(kept and capped and ahead),
        "note": "test loss (certificate, largest slope found): "
        + ", ".join(
            f"{k} {v['test']:.3f} ({np.mean(v['certificate']):.3g}, {max(v['largest_slope']):.3g})"
            for k, v in found.items()
        )
        + (
            f"; best rate at the end of its ladder: {', '.join(ends)}"
            if (ends := [k for k, v in found.items() if v["at_end"]])
            else ""
        ),
    }


def one_bit(name: str, progress: Progress) -> Record:
    """Four simulated workers: Adam, 1-bit after a quarter of the steps, without error feedback,
    and 1-bit from the second step on.
    """
    on, steps, batch = language_subject(24), 96, 32
    plans: dict[str, dict[str, Any]] = {
        "Adam": {"freeze": 10**6},
        "1-bit after a quarter": {"freeze": steps // 4},
        "the same without error feedback": {"freeze": steps // 4, "feedback": False},
        "1-bit from step 2": {"freeze": 1},
    }
    found = {}
    for label, options in plans.items():
        made = {
            "steps": steps,
            "batch_size": batch,
            "micro_batch": batch // 4,
            "clip": None,
            "weight_decay": 0.0,
            "optimizer": {"name": "one-bit-adam", "workers": 4, "betas": (0.9, 0.95), **options},
            "warmup": 0.1,
            "evaluate_limit": 128,
        }
        found[label] = tuned(on, (2e-3, 4e-3, 8e-3, 1.6e-2), made, progress, label)
        found[label]["bytes_sent"] = found[label]["done"][0][0].optimizer.bytes_sent
    adam, ours = found["Adam"], found["1-bit after a quarter"]
    worse = [
        not found[k]["test"] <= ours["test"] for k in ("the same without error feedback", "1-bit from step 2")
    ]
    return {
        "subject": "bytelm-24x2",
        "plans": told(found),
        "holds": bool(ours["test"] <= adam["high"] and all(worse)),
        "note": "test loss "
        + ", ".join(f"{k} {v['test']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in found.items())
        + f"; {adam['bytes_sent'] / ours['bytes_sent']:.1f} times fewer bytes in all",
    }


def mkor(name: str, progress: Progress) -> Record:
    """Steps to a validation loss of 0.35, MKOR over SGD against SGD alone, each at its best rate;
    cost of an inverse against its width.
    """
    on, found = digits_net(), {}
    plain = {"name": "sgd", "momentum": 0.0}
    preconditioned = {"name": "mkor", "every": 1, "inner": plain}
    for label, optimizer in (("sgd", plain), ("mkor", preconditioned)):
        made: dict[str, Any] = {
            "batch_size": 64,
            "optimizer": optimizer,
            "progress": quiet(progress),
        }
        counts = {
            lr: float(
                np.mean(
                    [
                        steps_to_target(
                            reinitialised(on, seed), 0.35, 400, learning_rate=lr, seed=seed, **made
                        )[0]
                        for seed in SEEDS
                    ]
                )
            )
            for lr in progress.track([0.0125 * 2**i for i in range(7)], label, 7)
        }
        best = min(counts, key=lambda lr: counts[lr])
        found[label] = {
            "lr": best,
            "steps": counts[best],
            "at_end": best in (min(counts), max(counts)),
            "steps_by_rate": counts,
        }
    longer: dict[str, Record] = {}
    for label, optimizer in (
        ("sgd", plain),
        ("mkor", preconditioned),
        ("mkor-h", preconditioned | {"stall": 0.1}),
    ):
        done = []
        for seed in SEEDS:
            mine, began = reinitialised(on, seed), time.process_time()
            run = fit(
                mine,
                steps=300,
                batch_size=64,
                learning_rate=found[label.removesuffix("-h")]["lr"],
                optimizer=optimizer,
                schedule="constant",
                warmup=0.0,
                clip=None,
                weight_decay=0.0,
                seed=seed,
                progress=quiet(progress),
            )
            done.append(
                (
                    mine.evaluate("test")["loss"],
                    time.process_time() - began,
                    getattr(run.optimizer, "watched", {}).get("switched", 0),
                )
            )
        mean, low, high = interval([d[0] for d in done])
        longer[label] = {
            "test": mean,
            "low": low,
            "high": high,
            "seconds": [d[1] for d in done],
            "switched_after": [d[2] for d in done],
        }
    widths = (128, 256, 512, 1024)
    cost: dict[str, list[float]] = {"rank one": [], "inverse": []}
    for width in widths:
        matrix, vector = torch.eye(width), torch.randn(width)
        for label, call in (
            ("rank one", lambda m=matrix, v=vector: rank_one_inverse(m, v, 0.9)),
            ("inverse", lambda m=matrix: torch.linalg.inv(m + 0.1)),
        ):
            call()
            spent = []
            for _ in range(5):
                began = time.process_time()
                for _ in range(3):
                    call()
                spent.append((time.process_time() - began) / 3)
            cost[label].append(float(np.median(spent)))
    slopes = {label: log_slope(widths, seconds) for label, seconds in cost.items()}
    faster = found["mkor"]["steps"] < found["sgd"]["steps"]
    return {
        "subject": "digits-net",
        "optimizers": found,
        "after_300_steps": longer,
        "widths": widths,
        "seconds": cost,
        "cost_slopes": slopes,
        "holds": bool(faster),
        "note": f"steps to 0.35: MKOR {found['mkor']['steps']:.0f} at {found['mkor']['lr']:.3g}, SGD "
        f"{found['sgd']['steps']:.0f} at {found['sgd']['lr']:.3g}; cost of "
        f"an inverse ~ d^{slopes['rank one']['slope']:.2f} by rank one, "
        f"d^{slopes['inverse']['slope']:.2f} anew; test loss after 300 steps "
        + ", ".join(
            f"{k} {v['test']:.3f} ({np.mean(v['seconds']):.1f} s of processor time)"
            for k, v in longer.items()
        )
        + (
            f", MKOR-H switched after {min(longer['mkor-h']['switched_after'])} to "
            f"{max(longer['mkor-h']['switched_after'])} steps"
        ),
    }


def self_tuned(name: str, progress: Progress) -> Record:
    """L2 penalty and dropout learned in one run, against random search with as much processor time,
    on 150 digits.
    """
    on = digits_net()
    train = {k: v[:150] for k, v in on.split("train").items()}
    small = Subject(on.name, on.model, on.task, {**on.splits, "train": train})
    rounds, batch = 600, 50
    cross = lambda model, given: nn.functional.cross_entropy(model(given["inputs"]), given["labels"])  # noqa: E731

    def network(setting: Setting | None, seed: int, rate: float = 0.0) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drop = [TunedDropout(setting, "dropout") if setting else nn.Dropout(rate) for _ in range(2)]
            return nn.Sequential(
                nn.Linear(64, 64),
                nn.ReLU(),
                drop[0],
                nn.Linear(64, 64),
                nn.ReLU(),
                drop[1],
                nn.Linear(64, 10),
            )

    def learned(seed: int) -> tuple[float, float, float, dict[str, float]]:
        setting = Setting([Hyperparameter("l2", 1e-4), Hyperparameter("dropout", 0.1, "fraction")])
        model = self_tuning(network(setting, seed), setting)
        penalised = lambda m, b, v: cross(m, b) + 0.5 * v["l2"] * squared_weights(m)  # noqa: E731
        began = time.process_time()
        table = tune(
            model,
            setting,
            train,
            on.split("validation"),
            penalised,
            lambda m, b, v: cross(m, b),
            steps=rounds,
            batch_size=batch,
            lr=2e-3,
            setting_lr=1e-2,
            seed=seed,
            progress=quiet(progress),
        )
        spent = time.process_time() - began
        last = {k: float(table[k].iloc[-1]) for k in ("l2", "dropout")}
        return (
            on.with_model(model.eval()).evaluate("validation")["loss"],
            on.with_model(model).evaluate("test")["loss"],
            spent,
            last,
        )

    def searched(seed: int, seconds: float) -> tuple[float, float, int]:
        rng, best, tried, began = np.random.default_rng(seed), (math.inf, math.inf), 0, time.process_time()
        while time.process_time() - began < seconds:
            penalty, rate = (
                float(np.exp(rng.uniform(math.log(1e-5), math.log(1e-1)))),
                float(rng.uniform(0.0, 0.8)),
            )
            mine = small.with_model(network(None, seed, rate))

            def loss(subject: Subject, given: Batch, penalty: float = penalty) -> torch.Tensor:
                return subject.loss(given) + 0.5 * penalty * sum(
                    p.square().sum() for p in subject.model.parameters() if p.ndim == 2
                )

            run = fit(
                mine,
                steps=2 * rounds,
                batch_size=batch,
                learning_rate=2e-3,
                weight_decay=0.0,
                schedule="constant",
                warmup=0.0,
                clip=None,
                loss=loss,
                seed=seed,
                optimizer={"name": "adamw", "betas": (0.9, 0.999)},
                progress=quiet(progress),
            )
            tried += 1
            best = min(best, (run.validation, mine.evaluate("test")["loss"]))
        return *best, tried

    rows = []
    for seed in progress.track(SEEDS, "seeds", len(SEEDS)):
        validation, test, spent, last = learned(seed)
        other = searched(seed, spent)
        rows.append(
            {
                "validation": validation,
                "test": test,
                "seconds": spent,
                **last,
                "search_validation": other[0],
                "search_test": other[1],
                "tried": other[2],
            }
        )
    mine, theirs = interval([r["test"] for r in rows]), interval([r["search_test"] for r in rows])
    return {
        "subject": "digits-net on 150 examples",
        "seeds": rows,
        "self_tuning": mine,
        "random_search": theirs,
        "holds": bool(mine[0] < theirs[0]),
        "note": f"test loss {mine[0]:.3f} [{mine[1]:.3f}, {mine[2]:.3f}] against {theirs[0]:.3f} "
        f"[{theirs[1]:.3f}, {theirs[2]:.3f}] for the best of "
        f"{np.mean([r['tried'] for r in rows]):.1f} random settings in the same processor time",
    }
