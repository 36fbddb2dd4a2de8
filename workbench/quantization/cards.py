"""Catalog cards of the quantization methods, each with the measurement that tests its claim here.

Comparisons share everything but the method: subject, layers, bits, granularity, calibration examples, test examples. The
three seeds draw three calibration sets from the training split (and seed the roundings); intervals are Student's t over the
seeds' paired differences. Nothing is tuned on the test split; learned roundings get the steps written in the record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student

import workbench
from workbench.instruments import Method, Progress
from workbench.quantization.allocate import Allocate
from workbench.quantization.aware import TrainQuantized
from workbench.quantization.formats import named
from workbench.quantization.grid import fit
from workbench.quantization.quantize import Quantize
from workbench.quantization.rotation import rotate
from workbench.subjects import Subject

SEEDS = (0, 1, 2)
CALIBRATION, TEST = 64, 256
FAMILY = "quantization"


@functools.cache
def opened(name: str) -> Subject:
    return workbench.subject(name)


@functools.cache
def drawn(name: str, seed: int) -> Subject:
    """The subject with a calibration split drawn anew from its training split."""
    on = opened(name)
    pick = torch.randperm(on.size("train"), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    splits = on.splits | {"calibration": {k: v[pick] for k, v in on.split("train").items()}}
    return Subject(on.name, on.model, on.task, splits, tokenizer=on.tokenizer, data_note=on.data_note, labels=on.labels, origin=on.origin)


def loss_of(fields: Mapping[str, Any], subject: str, seed: int) -> float:
    """Test loss after quantizing with one calibration draw; the result cache shares comparators between cards."""
    common = {"examples": CALIBRATION, "predict_examples": 0, "test_examples": TEST, "bits": 3, "seed": seed}
    return float(Quantize(**(common | dict(fields))).run(drawn(subject, seed), Progress()).facts["loss"])


@functools.cache
def dense_loss(subject: str) -> float:
    return opened(subject).evaluate("test", limit=TEST)["loss"]


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds."""
    values = np.array(differences)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def against(method: Mapping[str, Any], comparator: Mapping[str, Any],
            subjects: tuple[str, ...] = ("minilm-docstrings", "bytelm")) -> Callable[[str, Progress], dict[str, Any]]:  # fmt: skip
    """A measurement: test loss of one setting minus another's on the same draws; holds when it is lower on every subject."""

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows, holds, notes = [], True, []
        for subject in subjects:
            losses: dict[str, list[float]] = {"method": [], "comparator": []}
            for seed in progress.track(SEEDS, f"{name} on {subject}"):
                for key, fields in (("method", method), ("comparator", comparator)):
                    losses[key].append(loss_of(fields, subject, seed))
            mean, low, high = interval([a - b for a, b in zip(losses["method"], losses["comparator"], strict=True)])
            dense = dense_loss(subject)
            rows.append({"subject": subject, "dense_loss": dense, **losses, "difference": mean, "low": low, "high": high})
            holds &= mean < 0
            notes.append(f"{subject} {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats")
        return {"holds": bool(holds), "note": "; ".join(notes), "rows": rows, "settings": dict(method), "against": dict(comparator),
                "test_examples": TEST, "calibration_examples": CALIBRATION, "seeds": list(SEEDS)}  # fmt: skip

    return measure


def allocations(sensitivity: Literal["curvature", "trace"]) -> Callable[[str, Progress], dict[str, Any]]:
    """Average of 3 bits from widths 2, 3, 4 and 8: the allocation against uniform, random and reversed at the same size."""

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows = []
        for subject in ("bytelm", "minilm-docstrings"):
            for seed in progress.track(SEEDS, f"{name} on {subject}"):
                instrument = Allocate(budget=3.0, sensitivity=sensitivity, examples=16, predict_examples=8, probes=4, draws=1, test_examples=TEST, seed=seed)
                facts = instrument.run(drawn(subject, seed), Progress()).facts
                rows.append({"subject": subject, "seed": seed} | {k: facts[k] for k in ("loss", "uniform_loss", "random_loss", "reversed_loss")})
        notes, holds = [], True
        for subject in ("bytelm", "minilm-docstrings"):
            mine = [r for r in rows if r["subject"] == subject]
            for rival in ("uniform", "random", "reversed"):
                mean, low, high = interval([r["loss"] - r[f"{rival}_loss"] for r in mine])
                holds &= mean < 0
                notes.append(f"{subject} minus {rival} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        return {"holds": bool(holds), "note": "; ".join(notes), "rows": rows, "budget": 3.0, "widths": [2, 3, 4, 8]}

    return measure


def number_formats(name: str, progress: Progress) -> dict[str, Any]:
    """Weight noise of 8-bit formats over the bytelm's matrices, one scale a tensor, with the input noise of the heavy-tailed activations."""
    from workbench.quantization.activations import ActivationQuant

    on = opened("bytelm")
    inputs: dict[str, torch.Tensor] = {}
    layers = on.layers()
    from workbench.quantization.prefix import collecting

    with torch.no_grad(), collecting(on, layers) as (_, seen):
        on.task.output(on.model, next(on.batches("calibration", 4)))
    for (key, _), found in seen.items():
        inputs[key] = torch.cat(found).float()
    rows: list[dict[str, Any]] = []
    for layer in progress.track(layers, name):
        weight, x = layer.weight.detach().float(), inputs[layer.name]
        for format in ("int8", "e4m3fn", "e5m2", "e3m4"):
            low, high = x.min(), x.max()
            rounded = ActivationQuant(low, high, format=format, granularity="tensor").round(x)
            rows.append({"layer": layer.name, "format": format,
                         "weight_error": float((fit(weight, named(format), "tensor").round(weight) - weight).square().sum() / weight.square().sum()),
                         "input_error": float((rounded - x).square().sum() / x.square().sum())})  # fmt: skip
    means = {f: {k: float(np.mean([r[k] for r in rows if r["format"] == f])) for k in ("weight_error", "input_error")}
             for f in ("int8", "e4m3fn", "e5m2", "e3m4")}  # fmt: skip
    outlying = [key for key, x in inputs.items() if x.abs().max() > 60 * x.std()]
    holds = means["e4m3fn"]["weight_error"] < means["e5m2"]["weight_error"] and means["e4m3fn"]["input_error"] < means["e5m2"]["input_error"]
    note = ", ".join(f"{f}: weights {m['weight_error']:.2e}, inputs {m['input_error']:.2e}" for f, m in means.items())
    return {"holds": bool(holds), "note": note + f"; {len(outlying)} layers with inputs beyond 60 standard deviations", "means": means, "rows": rows}


def rotations(name: str, progress: Progress) -> dict[str, Any]:
    """Four-bit weights and activations of the bytelm after folded rotations, against none."""
    rows = []
    settings = Quantize(bits=4, granularity="channel", activations="token", activation_bits=4, examples=16, predict_examples=0, test_examples=TEST)
    on = opened("bytelm")
    plain = float(settings.run(on, Progress()).facts["loss"])
    for seed in progress.track(SEEDS, name):
        for kind in ("hadamard", "orthogonal"):
            rows.append({"seed": seed, "kind": kind, "loss": float(settings.run(rotate(on, kind, seed), Progress()).facts["loss"]), "plain": plain})
    mean, low, high = interval([r["loss"] - plain for r in rows if r["kind"] == "hadamard"])
    return {"holds": mean < 0, "note": f"bytelm W4A4, folded Hadamard minus none {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats", "rows": rows}


def switch_over(name: str, progress: Progress) -> dict[str, Any]:
    """Loss of a ternary digits transformer trained from scratch against the share of steps in full precision first."""
    rows = []
    for share in progress.track((0.0, 0.2, 0.4, 0.6, 0.8), name):
        for seed in SEEDS:
            instrument = TrainQuantized(method="ternary", layers="*",
         steps=150, batch_size=64, learning_rate=2e-3, from_scratch=True, switch_at=share,
                                        seed=seed, test_examples=512)  # fmt: skip
            rows.append({"switch_at": share, "seed": seed, "loss": float(instrument.run(opened("digits-vit"), Progress()).facts["loss"])})
    means = {share: float(np.mean([r["loss"] for r in rows if r["switch_at"] == share])) for share in (0.0, 0.2, 0.4, 0.6, 0.8)}
    best = min(means, key=lambda share: means[share])
    mean, low, high = interval([r["loss"] - z["loss"] for r, z in zip([r for r in rows if r["switch_at"] == best], [r for r in rows if r["switch_at"] == 0.0],
                                                                       strict=True)]) if best else (0.0, 0.0, 0.0)  # fmt: skip
    return {"holds": 0 < best < 0.8, "note": f"best switch at {best:g} of the steps; minus switching at once {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats",
            "means": means, "rows": rows}  # fmt: skip


def trained(method: str, bits: int) -> Callable[[str, Progress], dict[str, Any]]:
    """Training through the rounding against rounding afterwards, after the same number of further steps in full precision."""

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        rows = []
        for seed in progress.track(SEEDS, name):
            on = opened("bytelm")
            shared: dict[str, Any] = dict(method=method, bits=bits, steps=40, batch_size=4, learning_rate=3e-4, test_examples=64, seed=seed)
            aware = float(TrainQuantized(**shared).run(on, Progress()).facts["loss"])
            late = float(TrainQuantized(**shared, switch_at=0.975).run(on, Progress()).facts["loss"])  # rounding for the last step alone
            rows.append({"seed": seed, "aware": aware, "late": late})
        mean, low, high = interval([r["aware"] - r["late"] for r in rows])
        return {"holds": mean < 0, "note": f"bytelm, aware minus rounded at the end {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats", "rows": rows, "steps": 40}

    return measure


NEAREST: dict[str, Any] = {"rounding": "nearest"}
FEW = {"steps": 60}
COARSE = {"granularity": "channel", "range": "mse"}


def card(name: str, title: str, source: str, formula: str, needs: str, claim: str, measure: Callable[..., dict[str, Any]],
         row: int | None = None) -> Method:  # fmt: skip
    return Method(name=name, family=FAMILY, title=title, source=source, formula=formula, needs=needs, claim=claim, row=row, measure=measure)


CARDS = [
    card("gptq", "GPTQ: column-wise rounding with compensation", "Frantar, Ashkboos, Hoefler, Alistarh 2023",
         r"w_{j>i} \leftarrow w_{j>i} - (w_i - q_i)\,U_{ij}/U_{ii},\ U^\top U = (XX^\top)^{-1}", "calibration inputs",
         "lower loss than nearest rounding at 3 bits",
         against({"rounding": "gptq"}, NEAREST)),
    card("adaround", "Up or Down? Adaptive Rounding", "Nagel et al. 2020", r"W_q = s\,\mathrm{clip}(\lfloor W/s\rfloor + h(V))",
         "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"rounding": "adaround"} | FEW, NEAREST), 216),
    card("flexround", "FlexRound: element-wise division", "Lee et al. 2023", r"W_q = s_1\,\mathrm{round}(W / (s_1 \odot S_2 \odot s_3))",
         "calibration inputs, gradients", "lower loss than nearest rounding at 3 bits", against({"rounding": "flexround"} | FEW, NEAREST), 244),
    card("signround", "SignRound: offsets by signed gradient descent", "Cheng et al. 2023", r"W_q = s\,\mathrm{clip}(\mathrm{round}(W/s + z + V))",
         "calibration inputs, gradients", "lower loss than nearest rounding at 3 bits", against({"rounding": "signround"} | FEW, NEAREST), 295),
    card("adaquant", "AdaQuant: weights and step free", "Hubara et al. 2021", r"\min_{s,V}\|WX - Q_s(W+V)X\|^2", "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"rounding": "adaquant"} | FEW, NEAREST, ("bytelm",)), 309),
    card("hqq", "Half-quadratic quantization", "Badri and Shaji 2023", r"\min_z \|W - s(Q(W) - z)\|_p^p,\ p = 0.7", "nothing",
         "lower loss than nearest rounding with a zero point at 3 bits", against({"rounding": "hqq", "symmetric": False}, {"symmetric": False})),
    card("awq", "AWQ: activation-aware scaling", "Lin et al. 2023", r"s = \mathrm{rms}(x)^\alpha,\ Q(W s) s^{-1}", "calibration inputs",
         "lower loss than nearest rounding at 3 bits", against({"transform": "awq"}, NEAREST)),
    card("teq", "TEQ: trainable equivalent transformation", "Cheng et al. 2023", r"Y = Q(W\,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1}X",
         "calibration inputs, gradients",
         "lower loss than nearest rounding at 3 bits", against({"transform": "teq"} | FEW, NEAREST, ("bytelm",)), 387),
    card("smoothquant", "SmoothQuant", "Xiao et al. 2023", r"s_j = \max|x_j|^\alpha / \max|w_j|^{1-\alpha}", "calibration inputs",
         "lower loss than none with 8-bit weights by channel and 6-bit activations by tensor",
         against({"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6, "transform": "smooth"},
                 {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6})),
    card("quarot", "QuaRot: folded Hadamard rotation of the residual stream", "Ashkboos et al. 2024", r"W R^\top, R W", "nothing",
         "lower loss than none with 4-bit weights and activations", rotations),
    card("outliertune", "OutlierTune: static channel-wise activation scales", "Wang et al. 2024", r"s_k = (\max_k - \min_k)/(2^b - 1)",
         "calibration inputs",
         "lower loss than one activation scale a tensor at 6 bits",
         against({"bits": 8, "granularity": "channel", "activations": "channel", "activation_bits": 6},
                 {"bits": 8, "granularity": "channel", "activations": "tensor", "activation_bits": 6}), 327),
    card("clipping-search", "Clipping by least squared error", "the scale search of PACT- and OMSE-style quantizers",
         r"\min_s \|W - Q_s(W)\|_F^2", "calibration inputs",
         "lower loss than the largest magnitude at 3 bits", against({"range": "mse"}, NEAREST)),
    card("asymmetric-calibration", "Calibration on the quantized prefix", "Nagel et al. 2020, section 3.4", r"\min_Q \|W X - Q \hat X\|^2",
         "calibration inputs",
         "GPTQ against the dense output on quantized inputs has lower loss than GPTQ on dense inputs at 2 bits",
         against({"rounding": "gptq", "bits": 2, "range": "mse", "sequential": True}, {"rounding": "gptq", "bits": 2, "range": "mse"}, ("bytelm",))),
    card("hawq-v2", "HAWQ-V2: trace-weighted allocation", "Dong et al. 2020",
         r"\Omega = \sum_l \frac{\mathrm{Tr}(H_l)}{n_l}\|Q(W_l) - W_l\|^2", "Hessian-vector products",
         "at an average of 3 bits lower loss than uniform, random and reversed allocations", allocations("trace"), 348),
    card("curvature-allocation", "Integer program over exact second-order costs", "Yao et al. 2021 (HAWQ-V3), with d.Hd in place of the trace",
         r"\min_c \sum_l \tfrac12 \delta_l^\top H_l \delta_l", "Hessian-vector products",
         "at an average of 3 bits lower loss than uniform, random and reversed allocations",
         allocations("curvature"), 266),
    card("fp8", "FP8 formats E4M3 and E5M2", "Micikevicius et al. 2022", r"(-1)^s 2^{e-b} 1.m", "nothing",
         "E4M3 has less noise than E5M2 on weights and activations",
         number_formats, 308),
    card("nf4", "NF4: the quantiles of a normal", "Dettmers et al. 2023", r"q_i = \Phi^{-1}(p_i)/\max", "nothing",
         "lower loss than symmetric int4 in groups of 64",
         against({"format": "nf4"}, {"bits": 4}), 74),
    card("minifloats", "Low-precision minifloats", "Aggarwal et al. 2024", "ExMy without special codes", "nothing",
         "E2M1 has lower loss than symmetric int4 in groups of 64", against({"format": "e2m1"}, {"bits": 4}), 284),
    card("lsq", "LSQ: learned step size", "Esser et al. 2020", r"s\,\mathrm{round}(\mathrm{clip}(w/s))", "training",
         "lower loss than rounding after as many steps",
         trained("lsq", 2)),
    card("trilm", "TriLM: ternary training", "Kaushal et al. 2024",
         r"\gamma\,\mathrm{round}(\mathrm{clip}(W/\gamma)),\ \gamma = \mathrm{mean}|W|", "training",
         "lower loss than rounding to ternary after as many steps", trained("ternary", 2), 197),
    card("continual-qat", "When to switch from full precision to ternary", "Nielsen et al. 2025", r"W + \lambda_t (Q(W) - W)", "training",
         "an interior switch point is best", switch_over, 192),
]  # fmt: skip
