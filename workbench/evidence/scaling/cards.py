"""Catalog cards of the scaling methods, and the measurements behind them that this project can make
itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.catalog import Method
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import LAWS, law
from workbench.scaling.runs import OWN_SWEEP, Runs


def measure_held_out(name: str, progress: Progress) -> dict[str, Any]:
    """Fit the law to the project's small runs (lowest loss per size and token count)
    and predict the held-out larger one.
    """
    runs = Runs.open(OWN_SWEEP).table
    held = runs[runs.role == "held out"]
    if not len(held):
        raise BadInput(
            "scaling-sweep: the table holds no held-out run; finish data/runs/scaling_sweep.py first"
        )
    small = runs[runs.role != "held out"]
    small = small.loc[small.groupby(["params", "tokens"]).loss.idxmin()]
    found = fit(law(name), small)
    predicted = found.predict(held)
    error = np.abs(predicted / held.loss.to_numpy() - 1)
    baseline = fit(law("power-compute"), small)
    baseline_error = np.abs(baseline.predict(held) / held.loss.to_numpy() - 1)
    seeds = runs[
        (runs.params == runs[runs.role == "seed"].params.iloc[0])
        & (runs.tokens == runs[runs.role == "seed"].tokens.iloc[0])
    ]
    seeds = seeds[seeds.learning_rate == runs[runs.role == "seed"].learning_rate.iloc[0]]
    multiple = float(held.flops.max() / small.flops.max())
    return {
        "holds": bool(error.max() < 0.02),
        "held_out_error": float(error.max()),
        "power_in_compute_error": float(baseline_error.max()),
        "predicted": predicted.tolist(),
        "observed": held.loss.tolist(),
        "compute_multiple": multiple,
        "fitted_runs": len(small),
        "fit_rmse": found.rmse,
        "seed_spread": float(seeds.loss.std() / seeds.loss.mean()),
        "parameters": found.params,
        "certificate": found.certificate.text,
        "note": f"held-out run at {multiple:.2g} x the compute predicted within {100 * error.max():.1f} % (a "
        "power law in compute alone: "
        f"{100 * baseline_error.max():.1f} %; the same run with another seed differs by "
        f"{100 * seeds.loss.std() / seeds.loss.mean():.1f} %)",
    }


def measure_diffusion(name: str, progress: Progress) -> dict[str, Any]:
    """Distance of the weights from their start against steps:
    a + b ln t or a t^b? Three seeds, four batch sizes, digits.
    """
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    rows = []
    for seed in range(3):
        for batch in progress.track((16, 64, 256, 1024), f"diffusion, seed {seed}"):
            torch.manual_seed(seed)
            model = torch.nn.Sequential(
                torch.nn.Linear(64, 128), torch.nn.BatchNorm1d(128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
            )
            start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (batch / 64) ** 0.5)
            at = sorted({int(s) for s in np.geomspace(1, 1000, 24)})
            distance = []
            for step in range(1, at[-1] + 1):
                index = torch.randint(len(inputs), (batch,))
                loss = torch.nn.functional.cross_entropy(model(inputs[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step in at:
                    distance.append(
                        float(
                            (torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm()
                        )
                    )
            data = {"step": np.array(at, dtype=float), "distance": np.array(distance)}
            rows.append(
                (
                    batch,
                    fit(law("log-time"), data, starts=64).r_squared,
                    fit(law("power-time"), data, starts=64).r_squared,
                )
            )
    table = np.array(rows)
    by_batch = {
        int(b): {
            "log": float(table[table[:, 0] == b, 1].mean()),
            "power": float(table[table[:, 0] == b, 2].mean()),
        }
        for b in np.unique(table[:, 0])
    }
    wins = int((table[:, 1] > table[:, 2]).sum())
    return {
        "holds": wins > len(table) / 2,
        "r_squared": by_batch,
        "log_wins": wins,
        "of": len(table),
        "note": (
            f"a + b ln t fits better than a t^b in {wins} of {len(table)} runs (mean R^2 "
            f"{table[:, 1].mean():.4f} against {table[:, 2].mean():.4f})"
        ),
    }


def _card(name: str, row: int | None, needs: str, claim: str, measure: Any = None) -> Method:
    shape = LAWS[name]
    return Method(
        name=name,
        family="scaling",
        title=shape.title,
        source=shape.source,
        formula=shape.latex,
        needs=needs,
        claim=claim,
        row=row,
        measure=measure,
    )


RUNS = "finished runs of several sizes and token counts"
CARDS = [
    _card(
        "chinchilla", None, RUNS, "fitted to small runs, predicts a larger one within 2 %", measure_held_out
    ),
    _card("kaplan", None, RUNS, "fitted to small runs, predicts a larger one within 2 %", measure_held_out),
    _card(
        "over-training",
        None,
        RUNS,
        "fitted to small runs, predicts a larger, over-trained one within 2 %",
        measure_held_out,
    ),
    _card(
        "log-time",
        109,
        "distances of the weights from their start",
        "the distance grows like the logarithm of the step",
        measure_diffusion,
    ),
    _card(
        "kaplan-steps",
        140,
        "training curves of several sizes at several batch sizes",
        "predicts a larger run's curve at any batch before it starts",
    ),
    _card(
        "step-law-lr",
        20,
        "a learning-rate grid for several sizes and token counts",
        "advice within 0.1 % of the best loss on a grid",
    ),
    _card(
        "step-law-batch",
        20,
        "a batch-size grid for several token counts",
        "the best batch depends on tokens alone",
    ),
    _card("loss-time", 25, "a one-epoch training curve", "the loss falls as a power law of the step"),
    _card(
        "power-data",
        28,
        "end-of-schedule losses of a baseline optimizer",
        "an optimizer's worth is the tokens the baseline would need",
    ),
    _card(
        "sparse-average",
        170,
        "dense runs and runs pruned while training",
        "average parameters explain sparse and dense losses by one law",
    ),
    _card(
        "ensemble",
        176,
        "ensembles of one to five members",
        "the loss falls to an asymptote as a power of the members",
    ),
    _card(
        "power-params",
        176,
        "runs of several sizes on fixed data with tuned regularisation",
        "the loss falls to an asymptote as a power of the parameters",
    ),
    _card(
        "quantization-aware",
        177,
        "runs with several shares of quantization-aware training",
        "the best share grows with tokens per parameter byte",
    ),
    _card("precision", 202, "runs at several precisions", "low precision acts like fewer parameters"),
    _card(
        "weight-precision",
        202,
        "runs at several weight precisions",
        "low weight precision acts like fewer parameters",
    ),
    _card(
        "post-training-precision",
        202,
        "losses before and after post-training quantization",
        "over-trained models lose more to quantization",
    ),
    _card(
        "float-precision",
        261,
        "runs in several floating-point formats",
        "exponent bits are worth a little more than mantissa bits",
    ),
    _card(
        "data-constrained",
        None,
        "runs that repeat their data",
        "repeating up to four times costs almost nothing",
    ),
    _card(
        "routed",
        None,
        "dense and routed runs",
        "log loss is bilinear in log size and log experts, with saturation",
    ),
    _card("critical-batch", None, "steps to one loss at several batch sizes", "steps are smin + emin / B"),
    _card("broken-power", None, "losses across a change of slope", "one smooth break joins two power laws"),
    _card("sparse", None, "runs at several sparsities", "sparsity and size act through one term"),
]
