"""How training with masks is measured: chains of runs on one subject for every seed, compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from workbench.instruments import Instrument, Progress
from workbench.subjects import Subject

SEEDS = (0, 1, 2)
Arm = Sequence[Callable[[int], Instrument] | str]  # instruments to make for a seed, one after the other; a word names a change of data


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of the 95 % t interval and the values."""
    from workbench.pruning.cards import summary as summarised

    return summarised(values)


def digits(seed: int) -> Subject:
    import workbench

    return workbench.subject("digits-vit", seed=seed)


def lying_digits(on: Subject, labels: int = 0) -> Subject:
    """The same model before another task: the digits lying on their sides (transposed), `labels` of them at most to train on (0: all)."""
    splits = {name: {k: v.mT.contiguous() if k == "pixel_values" else v for k, v in columns.items()} for name, columns in on.splits.items()}
    if labels:
        splits["train"] = {k: v[:labels] for k, v in splits["train"].items()}
    return Subject(f"{on.name}, lying", on.model, on.task, splits, data_note="each digit transposed")


def small_language_model(seed: int) -> Subject:
    """A Llama-style byte model of 57 k weights, untrained, on windows of 64 bytes of Python's own source."""
    from workbench.training.objective import language_subject, reinitialised

    on = language_subject(48, 2, 64)
    on.splits = on.splits | {"validation": {k: v[:256] for k, v in on.split("validation").items()}, "test": {k: v[:512] for k, v in on.split("test").items()}}
    return reinitialised(on, seed)


def reference_prose(on: Subject) -> Subject:
    """The same model before a second corpus: the text of Python's language reference (English prose), in windows of the same length."""
    from pydoc_data.topics import topics

    width = on.split("train")["input_ids"].shape[1]
    data = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.long)
    windows = data[: len(data) // width * width].reshape(-1, width)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    columns = on.split("train")

    def split(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {"input_ids": windows[rows]}
        made |= {k: windows[rows].clone() if k == "labels" else torch.ones_like(windows[rows]) for k in columns if k != "input_ids"}
        return made

    splits = {"train": split(order[:4096]), "calibration": split(order[:128]), "validation": split(order[4096:4352]), "test": split(order[4352:4864])}
    return Subject(f"{on.name}, prose", on.model, on.task, splits, tokenizer=on.tokenizer, data_note="Python's language reference")


CHANGES: dict[str, Callable[[Subject], Subject]] = {"prose": reference_prose, "lying": lying_digits, "lying-100": lambda on: lying_digits(on, 100)}


def run_arm(on: Subject, arm: Arm, seed: int, done: dict[str, Subject], progress: Progress) -> tuple[dict[str, Any], Subject]:
    """The last run's facts and subject; what arms begin with alike is computed once (`done`)."""
    facts: dict[str, Any] = {}
    path = ""
    for step in arm:
        instrument = None if isinstance(step, str) else step(seed)
        path += f" > {step if instrument is None else instrument!r}"
        if path in done:
            on = done[path]
            continue
        if instrument is None:
            on = CHANGES[str(step)](on)
        else:
            result = instrument.run(on, progress, cache=False)
            facts, found = result.facts, result.subject
            assert found is not None
            on = found
        done[path] = on
    return facts, on


def compare_arms(name: str, progress: Progress, *, make: Callable[[int], Subject], arms: dict[str, Arm], claims: Sequence[tuple[str, str]], value: str = "loss",
                 keep: Sequence[str] = (), seeds: Sequence[int] = SEEDS, extra: Callable[[dict[str, Subject], dict[str, dict[str, Any]]], dict[str, Any]] | None = None,
                 ) -> dict[str, Any]:  # fmt: skip
    """Run all arms for every seed. A claim (better, worse) holds when the paired difference of `value` is below zero in the mean; whether it is
    so for every seed stands beside it. `keep` are further facts to store; `extra` measures something of a seed's subjects and facts."""
    facts: dict[str, list[dict[str, Any]]] = {label: [] for label in arms}
    more: list[dict[str, Any]] = []
    for seed in progress.track(seeds, name):
        base, done = make(seed), {}  # type: ignore[var-annotated]
        subjects: dict[str, Subject] = {}
        for label, arm in arms.items():
            found, subjects[label] = run_arm(base, arm, seed, done, Progress())
            facts[label].append(found)
        more.append(extra(subjects, {label: facts[label][-1] for label in arms}) if extra else {})
        for label in arms:
            facts[label][-1] = facts[label][-1] | {k.removeprefix(f"{label}: "): v for k, v in more[-1].items() if k.startswith(f"{label}: ")}
    stored = dict.fromkeys((value, "loss", "accuracy", "sparsity", "trained_parameters", "side_parameters", "matmul_share", *keep))
    measured = {label: {k: summary([float(f[k]) for f in found]) for k in stored if all(k in f for f in found)} for label, found in facts.items()}
    checked = []
    for better, worse in claims:
        difference = np.subtract(measured[better][value]["values"], measured[worse][value]["values"])
        checked.append({"better": better, "worse": worse, "difference": summary(difference.tolist()), "holds": bool(difference.mean() < 0),
                        "in_every_seed": bool((difference < 0).all())})  # fmt: skip
    failed = [f"{c['better']} < {c['worse']}" for c in checked if not c["holds"]]
    means = ", ".join(f"{label} {m[value]['mean']:.3f}" for label, m in measured.items())
    return {"subject": make(seeds[0]).name, "arms": measured, "claims": checked, "holds": not failed, "seeds": list(seeds),
            "note": f"test {value.replace('_', ' ')}: {means}" + (f"; failed: {'; '.join(failed)}" if failed else "")}  # fmt: skip


def recovered_accuracy(name: str, progress: Progress, *, targets: dict[str, tuple[dict[str, Any], float, float]], subject: str = "minilm-docstrings",
                       ) -> dict[str, Any]:  # fmt: skip
    """Prunings with recovery against the dense model's accuracy. targets: label -> (fields of `Prune`, points allowed, speed-up asked, 0 for none).

    One seed: a run takes minutes. The standard error of an accuracy on the test split is stored beside it.
    """
    import workbench
    from workbench.pruning.prune import Prune
    from workbench.pruning.speed import measured_speedup

    on = workbench.subject(subject, progress=progress)
    arms, met = {}, {}
    for label, (fields, points, speedup) in targets.items():
        result = Prune(**({"predict_examples": 0} | fields)).run(on, progress)
        facts, made = result.facts, result.subject
        assert made is not None and result.provenance is not None
        lost = 100 * (facts["dense_accuracy"] - facts["accuracy"])
        arms[label] = {"fields": fields, "accuracy": facts["accuracy"], "dense_accuracy": facts["dense_accuracy"], "loss": facts["loss"], "sparsity": facts["sparsity"],
                       "points_lost": lost, "points_allowed": points, "points_missed": max(0.0, lost - points), "seconds": result.provenance["seconds"]}  # fmt: skip
        met[label] = lost <= points
        if speedup:
            arms[label] |= {"speedup": measured_speedup(on, made), "speedup_asked": speedup}
            met[label] &= arms[label]["speedup"] >= speedup
    count = on.size("test")
    share = next(iter(arms.values()))["dense_accuracy"]
    words = [f"{label} loses {a['points_lost']:.1f} points of {a['points_allowed']:g} allowed" + (f" at {a['speedup']:.2f}x" if "speedup" in a else "")
             + ("" if met[label] else " (missed)") for label, a in arms.items()]  # fmt: skip
    return {"subject": subject, "arms": arms, "seeds": [0], "standard_error_points": 100 * (share * (1 - share) / count) ** 0.5, "holds": all(met.values()),
            "note": f"dense {100 * share:.1f} %; " + "; ".join(words)}  # fmt: skip
