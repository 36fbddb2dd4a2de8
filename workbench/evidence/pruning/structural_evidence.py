"""How the structural methods are measured, where one comparison of prunings is not enough:
domains, stages, fresh starts, targets.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS, compare, judged, summary, together, words
from workbench.progress import Progress
from workbench.pruning.prune import Prune
from workbench.pruning.saliency.expert_routing import ExpertPatterns, routing
from workbench.subjects import Subject
from workbench.subjects.structure.dimensions import shrink

Arms = dict[str, dict[str, Any]]


def verdict(
    subject: str, arms: dict[str, Any], claims: Sequence[dict[str, Any]], note: str
) -> dict[str, Any]:
    """An evidence record: it holds when every claim does."""
    left = words((c["claim"], c["holds"]) for c in claims)
    return {
        "subject": subject,
        "arms": arms,
        "claims": list(claims),
        "holds": together(c["holds"] for c in claims),
        "note": "; ".join(part for part in (note, left) if part),
    }


def lower(arms: Mapping[str, Sequence[float]], better: str, worse: str) -> dict[str, Any]:
    """The claim that one arm's values are smaller than another's on average, paired by seed;
    a single run is compared with each of the other's.
    """
    difference = np.subtract(arms[better], arms[worse])
    return {"claim": f"{better} < {worse}"} | judged(difference.tolist())


def language_model(
    name: str,
    progress: Progress,
    source: str,
    arms: Arms,
    claims: Sequence[tuple[str, str]],
    windows: int = 64,
) -> dict[str, Any]:
    """Prunings of one byte model on a part of its test windows:
    three seeds for what is drawn or trained, one run for what is determined.
    """
    on = with_windows(source, windows, progress)
    losses: dict[str, list[float]] = {}
    for label, fields in arms.items():
        seeds = SEEDS if label.startswith("random") or "recovery" in fields else (0,)
        every: list[dict[str, Any]] = [{"predict_examples": 0, "seed": seed} | fields for seed in seeds]
        losses[label] = [Prune(**each).run(on, progress).facts["loss"] for each in every]
    dense = on.evaluate("test")["loss"]
    note = f"loss on {windows} test windows: dense {dense:.3f}, " + ", ".join(
        f"{label} {np.mean(v):.3f}" for label, v in losses.items()
    )
    found = {
        label: {"fields": arms[label], "loss": summary(v), "dense_loss": summary([dense])}
        for label, v in losses.items()
    }
    return verdict(source, found, [lower(losses, a, b) for a, b in claims], note)


def gap_closed(arms: Arms, pruned: str, healed: str) -> dict[str, Any]:
    """The claim that training wins back more than half of what a pruning has cost, in mean losses."""
    cost, left = (
        arms[label]["loss"]["mean"] - arms[label]["dense_loss"]["mean"] for label in (pruned, healed)
    )
    return {
        "claim": f"{healed} closes most of the gap",
        "share": 1 - left / cost,
        "holds": bool(left < cost / 2),
    }


def on_several(
    name: str, progress: Progress, parts: dict[str, dict[str, Any]], closes: tuple[str, str]
) -> dict[str, Any]:
    """The same kind of comparison on several subjects, and the share of the gap to dense that the second arm
    of `closes` wins back from the first; holds when everything holds on all."""
    found = {
        label: (language_model if "source" in fields else compare)(name, progress, **fields)
        for label, fields in parts.items()
    }
    gaps = {label: gap_closed(part["arms"], *closes) for label, part in found.items()}
    left = words((f"{gap['claim']} ({label})", gap["holds"]) for label, gap in gaps.items())
    note = "; ".join(
        f"{label}: {part['note']}, {gaps[label]['share']:.0%} of the gap closed"
        for label, part in found.items()
    )
    return {
        "subject": ", ".join(found),
        "parts": found,
        "gaps": gaps,
        "holds": together(part["holds"] for part in (*gaps.values(), *found.values())),
        "note": "; ".join(part for part in (note, left) if part),
    }


def tuned(on: Subject, fields: dict[str, Any], rates: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Test facts of one pruning with the learning rate that is best on the validation split."""
    shared: dict[str, Any] = {"predict_examples": 0} | fields
    best = min(
        rates,
        key=lambda rate: at_rate(shared | {"test_split": "validation"}, rate).run(on, progress).facts["loss"],
    )
    return at_rate(shared, best).run(on, progress).facts | {"lr": best}


def at_rate(fields: dict[str, Any], rate: float) -> Prune:
    return Prune(**fields, **{"recovery.learning_rate": rate})


def rates_compared(
    name: str,
    progress: Progress,
    arms: Arms,
    claims: Sequence[tuple[str, str]],
    rates: Sequence[float] = (2e-3, 6e-3),
) -> dict[str, Any]:
    """Arms with a learning rate each, chosen on validation among the same few,
    on three networks of `digits-vit`.
    """
    import workbench

    found: dict[str, list[dict[str, Any]]] = {label: [] for label in arms}
    for seed in SEEDS:
        on = workbench.subject("digits-vit", seed=seed, progress=progress)
        for label, fields in arms.items():
            found[label].append(tuned(on, fields | {"seed": seed}, rates, progress))
    losses = {label: [f["loss"] for f in facts] for label, facts in found.items()}
    records = {
        label: {
            "fields": arms[label],
            "loss": summary(losses[label]),
            "accuracy": summary([f["accuracy"] for f in facts]),
            "lr": [f["lr"] for f in facts],
            "trained_share": [f.get("trained_share") for f in facts],
        }
        for label, facts in found.items()
    }
    note = "test loss: " + ", ".join(f"{label} {np.mean(v):.3f}" for label, v in losses.items())
    return verdict("digits-vit", records, [lower(losses, a, b) for a, b in claims], note)


def minitron(name: str, progress: Progress, sparsity: float = 0.5, steps: int = 60) -> dict[str, Any]:
    """Half the channels: pruned and distilled, pruned and fine-tuned,
    and the small configuration from random weights; equal steps.
    """
    import workbench
    from workbench.pruning.engine.dimensions import ShrunkRecovery

    rates = (2e-3, 6e-3)
    arms: dict[str, list[float]] = {
        "distilled": [],
        "fine-tuned": [],
        "from random weights": [],
        "activation, no training": [],
        "random, no training": [],
    }
    shared: dict[str, Any] = {
        "method": "minitron",
        "pattern": "channels",
        "sparsity": sparsity,
        "predict_examples": 0,
    }
    for seed in SEEDS:
        on = workbench.subject("digits-vit", seed=seed, progress=progress)
        for label, recovery in (("distilled", "distil"), ("fine-tuned", "finetune")):
            arms[label].append(
                tuned(
                    on,
                    shared | {"recovery": recovery, "recovery.steps": steps, "seed": seed},
                    rates,
                    progress,
                )["loss"]
            )
        plain = Prune(**shared).run(on, progress)
        arms["activation, no training"].append(plain.facts["loss"])
        arms["random, no training"].append(
            Prune(**(shared | {"saliency": "random", "seed": seed})).run(on, progress).facts["loss"]
        )
        assert plain.subject is not None
        config = plain.subject.model.config
        found = {}
        for rate in rates:
            torch.manual_seed(seed)
            fresh = on.with_model(type(on.model)(copy.deepcopy(config)))
            run = ShrunkRecovery(
                fresh, fresh.layers(), "finetune", steps, rate, 16, seed=seed, progress=progress
            )
            run.advance(steps)
            run.finish()
            found[rate] = fresh
        best = min(rates, key=lambda rate: found[rate].evaluate("validation")["loss"])
        arms["from random weights"].append(found[best].evaluate("test")["loss"])
    claims = [
        lower(arms, "distilled", "fine-tuned"),
        lower(arms, "fine-tuned", "from random weights"),
        lower(arms, "activation, no training", "random, no training"),
    ]
    note = "test loss: " + ", ".join(f"{label} {np.mean(v):.3f}" for label, v in arms.items())
    return verdict("digits-vit", {label: {"loss": summary(v)} for label, v in arms.items()}, claims, note)


def with_windows(source: str, windows: int, progress: Progress) -> Subject:
    """A built-in byte model with the first `windows` of its validation and test windows:
    minutes instead of a quarter of an hour.
    """
    import workbench

    on = workbench.subject(source, progress=progress)
    splits = {
        name: {k: v[:windows] for k, v in columns.items()} if name in ("validation", "test") else columns
        for name, columns in on.splits.items()
    }
    return Subject(
        on.name,
        on.model,
        on.task,
        splits,
        tokenizer=on.tokenizer,
        data_note=f"{on.data_note}; {windows} windows",
    )


def heapr(name: str, progress: Progress, examples: int = 32, windows: int = 64) -> dict[str, Any]:
    """bytemoe without 25 % and 50 % of its experts' neurons, by several scores, beside as many whole experts;
    and the score against the loss.
    """
    from workbench.pruning.axes import SALIENCY
    from workbench.pruning.calibration import Calibration
    from workbench.subjects.structure.units import discover

    on = with_windows("bytemoe", windows, progress)
    arms: dict[str, list[float]] = {}
    shared: dict[str, Any] = {"predict_examples": 0, "calibration_examples": examples}
    for share in (0.25, 0.5):
        for label, fields in (
            ("heapr", {"method": "heapr", "saliency.gradients": examples}),
            ("magnitude", {"method": "magnitude", "allocation": "global"}),
            ("random", {"method": "random"}),
            ("whole experts by usage", {"method": "premoe", "saliency": "usage", "pattern": "experts"}),
        ):
            wanted: dict[str, Any] = {"pattern": "neurons", "sparsity": share} | fields
            seeds = SEEDS if label == "random" else (0,)
            arms[f"{label} {share:.0%}"] = [
                Prune(**(shared | wanted | {"seed": seed})).run(on, progress).facts["loss"] for seed in seeds
            ]
    claims = [
        lower(arms, f"heapr {share:.0%}", f"{other} {share:.0%}")
        for share in (0.25, 0.5)
        for other in ("magnitude", "random", "whole experts by usage")
    ]
    groups = discover(on.model, ("neurons",))
    score = SALIENCY.chosen({"name": "heapr", "gradients": examples})
    scores = score(Calibration(on, on.layers(), progress=progress), groups)
    dense = on.evaluate("calibration", limit=examples)["loss"]
    predicted, measured = [], []
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3):
        for group in groups:
            copied = on.copy()
            kept = torch.rand(group.experts, group.units, generator=generator) >= share
            next(g for g in discover(copied.model, ("neurons",)) if g.name == group.name).mask(kept)
            predicted.append(float(scores[group.name][~kept].sum()))
            measured.append(copied.evaluate("calibration", limit=examples)["loss"] - dense)
    correlation = float(np.corrcoef(predicted, measured)[0, 1])
    claims.append(
        {
            "claim": "summed scores follow the measured loss (correlation above 0.8)",
            "correlation": correlation,
            "holds": correlation > 0.8,
        }
    )
    note = f"loss on {windows} test windows: dense {on.evaluate('test')['loss']:.3f}, " + ", ".join(
        f"{label} {np.mean(v):.3f}" for label, v in arms.items()
    )
    return verdict(
        "bytemoe",
        {label: {"loss": summary(v)} for label, v in arms.items()}
        | {"predicted": predicted, "measured": measured},
        claims,
        f"{note}; correlation of predicted and measured {correlation:.2f}",
    )


def domains(split: str, windows: int, length: int = 256) -> dict[str, dict[str, torch.Tensor]]:
    """Three kinds of text of the byte models' corpus: help topics, asynchronous and network code,
    graphical applications.
    """
    from workbench.subjects.builtin import corpora

    folders = {
        "help topics": ("pydoc_data/topics/",),
        "network code": ("asyncio/", "http/", "urllib/", "email/", "concurrent/"),
        "applications": ("idlelib/", "tkinter/", "turtledemo/"),
    }
    documents = [d for d in corpora.standard_library() if (d.split == "train") == (split == "train")]
    found = {}
    for domain, prefixes in folders.items():
        ids = corpora.byte_windows([d for d in documents if d.name.startswith(prefixes)], length, windows)
        found[domain] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return found


def premoe(name: str, progress: Progress, windows: int = 32, queries: int = 12) -> dict[str, Any]:
    """bytemoe with half of its experts, chosen for each of three domains;
    loss on held-out text, and which pattern a query of one window finds.
    """
    import workbench

    on = workbench.subject("bytemoe", progress=progress)
    seen, held = domains("train", windows), domains("test", windows)
    scores = {}
    for domain, columns in seen.items():
        scores[domain] = routing(
            Subject(domain, on.model, on.task, {"calibration": columns}), examples=windows, progress=progress
        )
    patterns = ExpertPatterns({domain: r.tcess for domain, r in scores.items()})
    usage = ExpertPatterns({domain: r.usage for domain, r in scores.items()})
    left = scores["help topics"].tcess.shape[1] // 2

    def loss(kept: torch.Tensor, domain: str) -> float:
        return Subject(domain, shrink(on.model, "experts", kept), on.task, {"test": held[domain]}).evaluate(
            "test"
        )["loss"]

    matrix = {a: {b: loss(patterns.kept(a, left), b) for b in held} for a in held}
    generator = torch.Generator().manual_seed(0)
    shape = scores["help topics"].tcess.shape
    draws = [patterns_of(torch.rand(shape, generator=generator), left) for _ in SEEDS]
    arms = {
        "tcess": [matrix[d][d] for d in held],
        "usage": [loss(usage.kept(d, left), d) for d in held],
        "random": [float(np.mean([loss(kept, d) for kept in draws])) for d in held],
        "other domains' patterns": [float(np.mean([matrix[a][d] for a in held if a != d])) for d in held],
    }
    dense = {d: Subject(d, on.model, on.task, {"test": held[d]}).evaluate("test")["loss"] for d in held}
    right = total = 0
    for domain, columns in held.items():
        for i in range(queries):
            query = {k: v[i : i + 1] for k, v in columns.items()}
            right += (
                patterns.nearest(
                    routing(Subject(domain, on.model, on.task, {"calibration": query}), examples=1).tcess
                )
                == domain
            )
            total += 1
    claims = [lower(arms, "tcess", other) for other in ("usage", "random", "other domains' patterns")]
    claims.append(
        {
            "claim": "a query finds its domain's pattern more often than 90 %",
            "share": right / total,
            "holds": right / total > 0.9,
        }
    )
    note = (
        f"held-out loss, mean of {len(held)} domains: dense {np.mean(list(dense.values())):.3f}, "
        + ", ".join(f"{label} {np.mean(v):.3f}" for label, v in arms.items())
        + f"; queries that find their domain {right / total:.0%}"
    )
    return verdict(
        "bytemoe",
        {label: {"loss": dict(zip(held, v, strict=True))} for label, v in arms.items()}
        | {"dense": dense, "matrix": matrix},
        claims,
        note,
    )


def patterns_of(scores: torch.Tensor, left: int) -> torch.Tensor:
    return ExpertPatterns({"drawn": scores}).kept("drawn", left)


def speed_targets(
    name: str,
    progress: Progress,
    speedups: Sequence[float] = (1.5, 2.0, 3.0),
    within: float = 0.1,
    source: str = "minilm-docstrings",
) -> dict[str, Any]:
    """ZipLM, FLAP and magnitude pruned to measured speed-ups on this device:
    reached within a tenth, and the accuracy at each.
    """
    import workbench

    on = workbench.subject(source, progress=progress)
    arms: dict[str, Any] = {}
    claims = []
    for speedup in speedups:
        for method in ("ziplm", "flap", "magnitude"):
            facts = (
                Prune(
                    method=method,
                    pattern="heads+neurons",
                    allocation={"name": "latency", "speedup": speedup},
                    predict_examples=0,
                )
                .run(on, progress, cache=False)
                .facts
            )
            keys = ("speedup", "accuracy", "loss", "sparsity", "dense_accuracy")
            arms[f"{method} {speedup:g}x"] = {k: facts[k] for k in keys if k in facts}
        reached = arms[f"ziplm {speedup:g}x"]
        claims.append(
            {
                "claim": f"{speedup:g}x within {within:.0%}",
                "measured": reached["speedup"],
                "holds": bool(abs(reached["speedup"] / speedup - 1) <= within),
            }
        )
        for other in ("flap", "magnitude"):
            rival = arms[f"{other} {speedup:g}x"]
            claims.append(
                {
                    "claim": f"ziplm more accurate than {other} at {speedup:g}x",
                    "difference": reached["accuracy"] - rival["accuracy"],
                    "holds": bool(reached["accuracy"] > rival["accuracy"]),
                }
            )
    note = "test accuracy at the measured speed-up: " + ", ".join(
        f"{label} {a['accuracy']:.3f} ({a['speedup']:.2f}x)" for label, a in arms.items()
    )
    return verdict(source, arms, claims, note)
