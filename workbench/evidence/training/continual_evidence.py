"""The measurements behind the cards of training that goes on, on more data or on other data."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS
from workbench.evidence.training.evidence import Record
from workbench.progress import Progress
from workbench.subjects import Subject
from workbench.training.loop import Training, fit
from workbench.training.optimizer.optimizers import make_optimizer
from workbench.training.schedule.schedules import profile
from workbench.training.studies.comparison import interval
from workbench.training.sweep.objective import language_subject, reinitialised


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
        progress=progress.quiet(),
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
