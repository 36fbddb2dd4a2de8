"""The measurements behind the cards of optimizers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record, digits_net, told, tuned
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Subject
from workbench.training.batch.batch_size import log_slope
from workbench.training.loop import Training, fit
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
                progress=progress.quiet(),
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
            "progress": progress.quiet(),
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
                progress=progress.quiet(),
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
