"""Claims about language models, measured on a real one: Kullback-Leibler divergence to the dense model,
window by window on the same texts, so that two ways to compress it are compared pair by pair.

Every arm is computed once for all records and kept under the user's cache; a record that was interrupted goes
on with those that are left.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from workbench.errors import BadInput
from workbench.evidence.harness import below, interval, together, words
from workbench.instruments import SubjectInstrument
from workbench.measures.language import TokenPairs
from workbench.measures.reference import reference_of
from workbench.names import find, in_words
from workbench.progress import Progress
from workbench.storage import cache_folder, replacing
from workbench.subjects import Subject

SUBJECT = "smollm2"
CALIBRATION, WINDOWS = 32, 32
DAMAGE = 0.02  # nats a token: the rival has to lose this much before a claim of losing less can be seen

Step = tuple[str, dict[str, Any]]  # instrument, fields
Arm = tuple[Step, ...]  # each step works on what the one before made


@functools.cache
def language_model() -> Subject:
    """The real language model with as many windows as an arm of a few minutes can afford."""
    import workbench

    on = workbench.subject(SUBJECT)
    sizes = {"calibration": CALIBRATION, "validation": 2, "test": WINDOWS}
    splits = {name: {k: v[:size] for k, v in on.split(name).items()} for name, size in sizes.items()}
    splits["train"] = on.split("train")
    return Subject(
        on.name, on.model, on.task, splits, tokenizer=on.tokenizer, data_note=on.data_note, origin=on.origin
    )


def instrument_of(step: Step) -> SubjectInstrument:
    """The instrument of a step with the calibration windows of all arms and no measurement of its own."""
    name, fields = step
    usual: dict[str, Any] = {"calibration_examples": CALIBRATION}
    if name not in ("rotate", "equalize"):
        usual |= {"predict_examples": 0}
        usual |= {"test_examples": 0} if name == "quantize" else {"test_split": "validation"}
    made = find(name)(**(usual | fields))
    assert isinstance(made, SubjectInstrument)
    return made


def divergences(arm: Arm, progress: Progress) -> dict[str, list[float]]:
    """Of each test window of the compressed model: `kl` (nats a token), `loss`, `dense_loss`."""
    on, steps = language_model(), [instrument_of(step) for step in arm]
    key = "-".join(step.key(on) for step in steps)
    file = cache_folder() / "evidence" / f"{key}-{WINDOWS}.json"
    if file.exists():
        found: dict[str, list[float]] = json.loads(file.read_text())
        return found
    made: Subject | None = on
    for step in steps:
        made = None if made is None else step.run(made, progress, cache=False).subject
    reference = reference_of(on, "test", WINDOWS, progress)
    if reference is None or made is None or progress.stopped:
        raise BadInput("method: the measurement was stopped; run it again, finished arms are kept")
    comparison = reference.against(made, progress)
    if comparison is None or progress.stopped:
        raise BadInput("method: the measurement was stopped; run it again, finished arms are kept")
    pairs = comparison.pairs
    assert isinstance(pairs, TokenPairs)
    windows = [pairs.window == window for window in np.unique(pairs.window)]
    found = {
        "kl": [float(pairs.divergence[mine].mean()) for mine in windows],
        "loss": [float(-pairs.changed_log_p[mine].mean()) for mine in windows],
        "dense_loss": [float(-pairs.dense_log_p[mine].mean()) for mine in windows],
    }
    with replacing(file, private=True) as draft:
        draft.write_text(json.dumps(found))
    return found


def ordered(
    arms: Mapping[str, Arm], claims: Sequence[tuple[str, str]]
) -> Callable[[str, Progress], dict[str, Any]]:
    """A measurement: each claim (better, worse) by the 95 % t interval of the windows' paired differences of
    KL. Its gate: the worse arm has lost `DAMAGE` nats a token at least.
    """

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        found = {label: divergences(arm, progress) for label, arm in arms.items()}
        judged: list[dict[str, Any]] = []
        for better, worse in claims:
            gaps = {
                what: interval(np.subtract(found[better][what], found[worse][what]).tolist())
                for what in ("kl", "loss")
            }
            passed = float(np.mean(found[worse]["kl"])) >= DAMAGE
            judged.append(
                {
                    "claim": f"{better} < {worse}",
                    "gate": {"kl of the worse arm": float(np.mean(found[worse]["kl"])), "passed": passed},
                    "kl": dict(zip(("mean", "low", "high"), gaps["kl"], strict=True)),
                    "loss": dict(zip(("mean", "low", "high"), gaps["loss"], strict=True)),
                    "holds": below(*gaps["kl"][1:]) if passed else None,
                }
            )
        means = ", ".join(f"{label} {np.mean(values['kl']):.3f}" for label, values in found.items())
        left = words((claim["claim"], claim["holds"]) for claim in judged)
        return {
            "subject": SUBJECT,
            "arms": {
                label: {"recipe": in_words(arms[label])}
                | {what: interval(values) for what, values in found[label].items()}
                for label in arms
            },
            "claims": judged,
            "holds": together(claim["holds"] for claim in judged),
            "windows": WINDOWS,
            "calibration_windows": CALIBRATION,
            "note": "; ".join(part for part in (f"KL, nats a token: {means}", left) if part),
        }

    return measure


def quantized(format: str, granularity: str = "channel", **more: Any) -> Arm:
    return (("quantize", {"format": format, "granularity": granularity} | more),)


def pruned(method: str, **more: Any) -> Arm:
    return (("prune", {"method": method} | more),)


CHANNEL = {f"nearest, {bits} bits": quantized(f"int{bits}") for bits in (4, 3)}
GROUPS = {"nearest, 3 bits, groups": quantized("int3", "group")}


def scaled(kind: str, arm: Arm, **more: Any) -> Arm:
    """What an arm does, after scales were folded into the model."""
    return (("equalize", {"kind": kind} | more), *arm)


ZERO_POINT = {f"nearest, uint{bits}": quantized(f"uint{bits}", "group") for bits in (4, 3)}
CLIPPED = {f"clipped, uint{bits}": quantized(f"uint{bits}", "group", range="mse") for bits in (4, 3)}
AWQ = {
    f"AWQ, uint{bits}": scaled(
        "awq", CLIPPED[f"clipped, uint{bits}"], **{"kind.format": f"uint{bits}", "kind.group_size": 64}
    )
    for bits in (4, 3)
}
STATIC = quantized("int8", "tensor", activations="tensor")
ROUNDED = {"rounding": "gptq", "activations": "token", "activations.format": "int4"}
#: QuaRot turns what the writers of the stream read while the model runs, and folds everything else.
ONLINE = {"transform": "hadamard", "transform.only": "*.o_proj,*.down_proj"}


def rotated(kind: str, **more: Any) -> Arm:
    """Four-bit weights (GPTQ) and activations of the rotated model."""
    return (("rotate", {"kind": kind} | more), *quantized("int4", **(ROUNDED | ONLINE)))


FOUR_BITS = {
    "W4A4, GPTQ": quantized("int4", **ROUNDED),
    "QuaRot": rotated("hadamard"),
}
PRUNED = {label: pruned(label) for label in ("magnitude", "wanda", "sparsegpt")}
PAIRED = {f"{label}, 2:4": pruned(label, pattern="2:4") for label in PRUNED}

QUANTIZATION: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "gptq": ordered(
        CHANNEL
        | GROUPS
        | {f"GPTQ, {bits} bits": quantized(f"int{bits}", rounding="gptq") for bits in (4, 3)}
        | {"GPTQ, 3 bits, groups": quantized("int3", "group", rounding="gptq")},
        [
            ("GPTQ, 4 bits", "nearest, 4 bits"),
            ("GPTQ, 3 bits", "nearest, 3 bits"),
            ("GPTQ, 3 bits, groups", "nearest, 3 bits, groups"),
        ],
    ),
    "awq": ordered(
        ZERO_POINT | CLIPPED | AWQ,
        [(f"AWQ, uint{bits}", f"{rival}, uint{bits}") for bits in (4, 3) for rival in ("nearest", "clipped")],
    ),
    "hqq": ordered(
        ZERO_POINT
        | {f"HQQ, uint{bits}": quantized(f"uint{bits}", "group", rounding="hqq") for bits in (4, 3)},
        [("HQQ, uint4", "nearest, uint4"), ("HQQ, uint3", "nearest, uint3")],
    ),
    "smoothquant": ordered(
        {
            "W8A8, a scale a tensor": STATIC,
            "smoothed, alpha 0.5": scaled("smoothquant", STATIC),
            "smoothed, alpha 0.85": scaled("smoothquant", STATIC, **{"kind.alpha": 0.85}),
        },
        [(f"smoothed, alpha {alpha}", "W8A8, a scale a tensor") for alpha in ("0.5", "0.85")],
    ),
    "quarot": ordered(FOUR_BITS, [("QuaRot", "W4A4, GPTQ")]),
}

PRUNING: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "wanda": ordered({label: PRUNED[label] for label in ("wanda", "magnitude")}, [("wanda", "magnitude")]),
    "sparsegpt": ordered(PRUNED, [("sparsegpt", "magnitude"), ("sparsegpt", "wanda")]),
    "sparsegpt-2:4": ordered(
        PAIRED, [("sparsegpt, 2:4", "magnitude, 2:4"), ("sparsegpt, 2:4", "wanda, 2:4")]
    ),
}
