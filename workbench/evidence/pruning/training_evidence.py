"""How training with masks is measured: chains of runs on one subject for every seed,
compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.evidence.harness import SEEDS, judged, summary, together, words
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.subjects import Subject

Known = dict[str, dict[str, Any]]  # arm -> facts of the arms before, for the same seed
Arm = Sequence[
    Callable[[int, Known], Instrument] | str
]  # instruments to make, one after the other; a word names a change of data


def digits(seed: int) -> Subject:
    import workbench

    return workbench.subject("digits-vit", seed=seed)


def lying_digits(on: Subject, labels: int = 0) -> Subject:
    """The same model before another task: the digits lying on their sides (transposed),
    `labels` of them at most to train on (0: all).
    """
    splits = {
        name: {k: v.mT.contiguous() if k == "pixel_values" else v for k, v in columns.items()}
        for name, columns in on.splits.items()
    }
    if labels:
        splits["train"] = {k: v[:labels] for k, v in splits["train"].items()}
    return Subject(f"{on.name}, lying", on.model, on.task, splits, data_note="each digit transposed")


def small_language_model(seed: int) -> Subject:
    """A Llama-style byte model of 57 k weights, untrained, on windows of 64 bytes of Python's own source."""
    from workbench.training.sweep.objective import language_subject, reinitialised

    on = language_subject(48, 2, 64)
    on.splits = on.splits | {
        "validation": {k: v[:256] for k, v in on.split("validation").items()},
        "test": {k: v[:512] for k, v in on.split("test").items()},
    }
    return reinitialised(on, seed)


def reference_prose(on: Subject) -> Subject:
    """The same model before a second corpus: the text of Python's language reference (English prose),
    in windows of the same length.
    """
    from pydoc_data.topics import topics

    width = on.split("train")["input_ids"].shape[1]
    data = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.long)
    windows = data[: len(data) // width * width].reshape(-1, width)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    columns = on.split("train")

    def split(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {"input_ids": windows[rows]}
        made |= {
            k: windows[rows].clone() if k == "labels" else torch.ones_like(windows[rows])
            for k in columns
            if k != "input_ids"
        }
        return made

    splits = {
        "train": split(order[:4096]),
        "calibration": split(order[:128]),
        "validation": split(order[4096:4352]),
        "test": split(order[4352:4864]),
    }
    return Subject(
        f"{on.name}, prose",
        on.model,
        on.task,
        splits,
        tokenizer=on.tokenizer,
        data_note="Python's language reference",
    )


CHANGES: dict[str, Callable[[Subject], Subject]] = {
    "prose": reference_prose,
    "lying": lying_digits,
    "lying-100": lambda on: lying_digits(on, 100),
}


@dataclass(frozen=True)
class Claim:
    """The weighted sum of arms' values is below `margin`, with its 95 % interval over the seeds; {better: 1,
    worse: -1} says better < worse.
    """

    says: str
    weights: dict[str, float]
    value: str = "loss"
    margin: float = 0.0

    def judged(self, facts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        sums = sum(
            w * np.array([f[self.value] for f in facts[label]], float) for label, w in self.weights.items()
        )
        assert isinstance(sums, np.ndarray)
        return {
            "claim": self.says,
            "weights": self.weights,
            "value": self.value,
            "margin": self.margin,
        } | judged(sums.tolist(), self.margin)


def run_arm(
    on: Subject, arm: Arm, seed: int, known: Known, done: dict[str, Subject]
) -> tuple[dict[str, Any], Subject]:
    """The last run's facts and subject; what arms begin with alike is computed once (`done`)."""
    facts: dict[str, Any] = {}
    path = ""
    for step in arm:
        instrument = None if isinstance(step, str) else step(seed, known)
        path += f" > {step if instrument is None else instrument!r}"
        if instrument is None:
            on = CHANGES[str(step)](on)
            continue
        if path not in done:
            result = instrument.run(on, Progress(), cache=False)
            assert result.subject is not None
            facts, done[path] = result.facts, result.subject
            for name, table in result.tables.items():
                if name == "masks" and len(table):
                    facts |= {
                        "moved_first": float(table.moved.iloc[1 : 1 + len(table) // 4].mean()),
                        "moved_last": float(table.moved.iloc[-len(table) // 5 :].mean()),
                    }
        on = done[path].with_model(done[path].model)
    return facts | {"error": 1 - facts["accuracy"]} if "accuracy" in facts else facts, on


def compare_arms(
    name: str,
    progress: Progress,
    *,
    make: Callable[[int], Subject],
    arms: dict[str, Arm],
    claims: Sequence[Claim],
    keep: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    extra: Callable[[Subject, dict[str, Subject]], dict[str, dict[str, float]]] | None = None,
) -> dict[str, Any]:
    """Run all arms for every seed and judge the claims, paired by seed.
    `keep` are further facts to store; `extra` measures more of each arm from the seed's first subject
    and the arms' last ones.
    """
    facts: dict[str, list[dict[str, Any]]] = {label: [] for label in arms}
    about = ""
    for seed in progress.track(seeds, name):
        base, done, known, subjects = make(seed), {}, {}, {}  # type: ignore[var-annotated]
        about = base.name
        for label, arm in arms.items():
            known[label], subjects[label] = run_arm(base, arm, seed, known, done)
        for label, found in (extra(base, subjects) if extra else {}).items():
            known[label] |= found
        for label in arms:
            facts[label].append(known[label])
    wanted = dict.fromkeys(
        (
            "loss",
            "accuracy",
            "sparsity",
            "trained_parameters",
            "side_parameters",
            "matmul_share",
            *keep,
            *(c.value for c in claims),
        )
    )
    measured = {
        label: {
            k: summary([float(f[k]) for f in found])
            for k in wanted
            if all(isinstance(f.get(k), (int, float)) for f in found)
        }
        for label, found in facts.items()
    }
    judged = [claim.judged(facts) for claim in claims]
    left = words((c["claim"], c["holds"]) for c in judged)
    means = ", ".join(f"{label} {m['loss']['mean']:.3f}" for label, m in measured.items() if "loss" in m)
    return {
        "subject": about,
        "arms": measured,
        "claims": judged,
        "holds": together(c["holds"] for c in judged),
        "seeds": list(seeds),
        "note": "; ".join(part for part in (f"test loss: {means}", left) if part),
    }


def recovered_accuracy(
    name: str,
    progress: Progress,
    *,
    targets: dict[str, tuple[dict[str, Any], float, float]],
    subject: str = "minilm-docstrings",
) -> dict[str, Any]:
    """Prunings with recovery against the dense model's accuracy.
    targets: label -> (fields of `Prune`, points allowed, speed-up asked, 0 for none).

    One seed: a run takes minutes. The standard error of an accuracy on the test split is stored beside it.
    """
    import workbench
    from workbench.pruning.allocation.latency import measured_speedup
    from workbench.pruning.prune import Prune

    on = workbench.subject(subject, progress=progress)
    arms, met = {}, {}
    for label, (fields, points, speedup) in targets.items():
        result = Prune(**({"predict_examples": 0} | fields)).run(on, progress)
        facts, made = result.facts, result.subject
        assert made is not None
        lost = 100 * (facts["dense_accuracy"] - facts["accuracy"])
        arms[label] = {
            "fields": fields,
            "accuracy": facts["accuracy"],
            "dense_accuracy": facts["dense_accuracy"],
            "loss": facts["loss"],
            "sparsity": facts["sparsity"],
            "points_lost": lost,
            "points_allowed": points,
            "points_missed": max(0.0, lost - points),
            "seconds": result.provenance["seconds"],
        }
        met[label] = lost <= points
        if speedup:
            arms[label] |= {"speedup": measured_speedup(on, made), "speedup_asked": speedup}
            met[label] &= arms[label]["speedup"] >= speedup
    count = on.size("test")
    share = next(iter(arms.values()))["dense_accuracy"]
    words = [
        f"{label} loses {a['points_lost']:.1f} points of {a['points_allowed']:g} allowed"
        + (f" at {a['speedup']:.2f}x" if "speedup" in a else "")
        + ("" if met[label] else " (missed)")
        for label, a in arms.items()
    ]
    return {
        "subject": subject,
        "arms": arms,
        "seeds": [0],
        "standard_error_points": 100 * (share * (1 - share) / count) ** 0.5,
        "holds": all(met.values()),
        "note": f"dense {100 * share:.1f} %; " + "; ".join(words),
    }
