"""Measurements of the scaling laws that this project can make itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.scaling.fitting import fit
from workbench.scaling.formulas.lawbook import law
from workbench.scaling.runs import OWN_SWEEP, Runs

CLAIMED = 0.02  # relative error of a prediction


def measure_held_out(name: str, progress: Progress) -> dict[str, Any]:
    """Fit the law to the project's small runs (lowest loss per size and token count)
    and predict the held-out larger one. Its gate: the fit has converged, and another seed moves a loss
    by less than the claim allows.
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
    spread = float(seeds.loss.std() / seeds.loss.mean())
    passed = found.certificate.converged and 1.96 * spread < CLAIMED
    return {
        "holds": bool(error.max() < CLAIMED),
        "held_out_error": float(error.max()),
        "power_in_compute_error": float(baseline_error.max()),
        "predicted": predicted.tolist(),
        "observed": held.loss.tolist(),
        "compute_multiple": multiple,
        "fitted_runs": len(small),
        "fit_rmse": found.rmse,
        "seed_spread": spread,
        "parameters": found.params,
        "certificate": found.certificate.text,
        "gate": {"converged": found.certificate.converged, "seeds": 1.96 * spread, "passed": passed},
        "note": f"held-out run at {multiple:.2g} x the compute predicted within {100 * error.max():.1f} % (a "
        "power law in compute alone: "
        f"{100 * baseline_error.max():.1f} %; the same run with another seed differs by "
        f"{100 * spread:.1f} %)" + ("" if found.certificate.converged else f"; {found.certificate.text}"),
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


RUNS = "finished runs of several sizes and token counts"
MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "chinchilla": measure_held_out,
    "kaplan": measure_held_out,
    "over-training": measure_held_out,
    "log-time": measure_diffusion,
}
