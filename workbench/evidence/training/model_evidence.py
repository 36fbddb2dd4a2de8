"""The measurements behind the cards of Lipschitz models and of networks that tune themselves."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record, digits_net, told, tuned
from workbench.progress import Progress
from workbench.subjects import Batch, Subject
from workbench.training.loop import fit
from workbench.training.models.lipschitz import LipschitzTransformer, largest_slope
from workbench.training.models.self_tuning import (
    Hyperparameter,
    Setting,
    TunedDropout,
    self_tuning,
    squared_weights,
    tune,
)
from workbench.training.studies.comparison import interval
from workbench.training.sweep.objective import language_subject, reinitialised


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

        fit(mine, steps=300, batch_size=32, optimizer=build, seed=seed, progress=progress.quiet())
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
            progress=progress.quiet(),
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
                progress=progress.quiet(),
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
