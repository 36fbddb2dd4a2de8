"""Measurements of the curvature methods, on small exactly known or quickly trained subjects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workbench.progress import Progress

DIGITS_TRACE = 13.5127791110
DIGITS_TOP = 1.0455299687


def coverage(method: str) -> Callable[[str, Progress], dict[str, Any]]:
    """How often the exact trace of the digits' softmax Hessian lies within two standard errors."""

    def measure(name: str, progress: Progress) -> dict[str, Any]:
        import workbench
        from workbench.curvature.estimators.traces import estimate
        from workbench.curvature.operators.curvature_operator import curvature_operator

        with curvature_operator(
            workbench.subject("digits-softmax"), split="all", examples=1797, batch_size=1797
        ) as operator:
            found = [
                estimate(operator, method, 48, seed)
                for seed in progress.track(range(100), "seeded repeats", 100)
            ]
        hits = float(np.mean([abs(f.value - DIGITS_TRACE) <= 2 * f.error for f in found]))
        error = float(np.sqrt(np.mean([(f.value - DIGITS_TRACE) ** 2 for f in found])))
        return {
            "holds": hits >= 0.95,
            "covered": hits,
            "root_mean_square_error": error,
            "products": 48,
            "repeats": 100,
            "note": (
                f"exact trace within two standard errors in {hits:.0%} of 100 repeats; "
                f"error {error / DIGITS_TRACE:.2%} with 48 products"
            ),
        }

    return measure


def measure_lanczos(name: str, progress: Progress) -> dict[str, Any]:
    import workbench
    from workbench.curvature.estimators.lanczos import Lockstep, outliers
    from workbench.curvature.estimators.probes import rademacher
    from workbench.curvature.operators.curvature_operator import curvature_operator

    with curvature_operator(
        workbench.subject("digits-softmax"), split="all", examples=1797, batch_size=1797
    ) as operator:
        run = Lockstep(operator, rademacher(operator, range(4), 0), 30)
        for _ in progress.track(run.run(), "Lanczos steps", 30):
            pass
    found, _ = outliers(run.quadrature(), operator.size)
    error = abs(found[0].value - DIGITS_TOP) / DIGITS_TOP
    return {
        "holds": error < 1e-4,
        "relative_error": error,
        "note": f"top eigenvalue to {error:.1e} relative after 30 steps of 4 probes",
    }


def measure_batch_theory(name: str, progress: Progress) -> dict[str, Any]:
    """Digits at zero weights (Gauss-Newton = Hessian) and a small trained vision transformer;
    tuned on nothing.

    The claim needs the formula with the noise that was measured;
    a fit of the noise's level shows whether the shape 1 / b alone is right.
    """
    import workbench
    from workbench.curvature.studies.batch_size_theory import BatchSizeTheory

    records = {}
    studies: dict[str, dict[str, Any]] = {
        "digits-softmax": dict(examples=1000, sizes=6, repeats=24, learning_rates=True),
        "digits-vit": dict(examples=256, sizes=4, repeats=6, tolerance=0.03),
    }
    for subject, fields in studies.items():
        result = BatchSizeTheory(batch_size=8, **fields).run(
            workbench.subject(subject), progress=progress, cache=False
        )
        measured, error = (
            result.table["measured"].to_numpy(),
            result.table["standard_error"].fillna(0).to_numpy(),
        )
        records[subject] = {
            "falls": bool(np.all(np.diff(measured) <= 2 * np.hypot(error[1:], error[:-1]))),
            "r2_predicted": result.facts.get("r2_predicted"),
            "r2_fitted": result.facts.get("r2_fitted"),
            "fitted_over_measured_noise": result.facts["fitted_over_measured_noise"],
            "sgd_limit_slope": result.facts.get("sgd_limit_slope"),
            "adam_limit_slope": result.facts.get("adam_limit_slope"),
            "rows": result.table.to_dict("records"),
        }
    holds = all(r["falls"] and (r["r2_predicted"] or 0) > 0.8 for r in records.values())
    note = "; ".join(
        f"{k}: {'falls' if r['falls'] else 'does not fall'}, "
        f"R2 {r['r2_predicted']:.2f} with measured noise, {r['r2_fitted']:.2f} with "
        f"{r['fitted_over_measured_noise']:.0f} times that noise"
        for k, r in records.items()
    )
    rates = records["digits-softmax"]
    note += (
        "; log-log slope of the largest stable rate, digits-softmax: "
        f"SGD {rates['sgd_limit_slope']:.2f}, Adam {rates['adam_limit_slope']:.2f}"
    )
    return {"holds": holds, "subjects": records, "note": note}


def measure_flatness(name: str, progress: Progress) -> dict[str, Any]:
    import workbench
    from workbench.curvature.estimators.flatness import flatness_study, rank_correlations

    table = flatness_study(workbench.subject("hidden-markov"), progress=progress)
    found = rank_correlations(table)
    holds = found["trace_correlation"] < 0 and found["trace_p"] < 0.05
    return {
        "holds": holds if found["models"] >= 3 else None,
        **found,
        "rows": table.to_dict("records"),
        "note": f"{found['models']:.0f} models at loss {found['loss']:.3f}: "
        "rank correlation of trace and probe accuracy "
        f"{found['trace_correlation']:.2f} (p {found['trace_p']:.2g}), "
        f"of top eigenvalue {found['top_eigenvalue_correlation']:.2f}",
    }


PREDICTED = ("minilm-docstrings", "bytelm")


def measure_prediction(name: str, progress: Progress) -> dict[str, Any]:
    """4-bit rounding and 50 % pruning of every layer, one at a time,
    on the same few examples for prediction and measurement.
    """
    import workbench
    from workbench.curvature.studies.quadratic_prediction import QuadraticPrediction

    records: dict[str, Any] = {}
    examples = 8
    for subject in PREDICTED:
        on = workbench.subject(subject)
        for change in ("round", "prune"):
            study = QuadraticPrediction(
                layers="blocks", change=change, bits=4, sparsity=0.5, examples=examples, batch_size=8
            )
            result = study.run(on, progress=progress, cache=False)
            records[f"{subject}, {change}"] = {
                **result.facts,
                "examples": examples,
                "rows": result.table.to_dict("records"),
            }
    holds = all(r["rank_correlation"] > 0.8 for r in records.values())
    note = "; ".join(
        f"{k}: rank correlation {r['rank_correlation']:.2f}, "
        f"{r['within_factor_2']:.0%} of layers within a factor of 2, median radius "
        f"{r['median_radius']:.2g}, of all together {r['joint_radius']:.2g}"
        for k, r in records.items()
    )
    return {"holds": holds, "cases": records, "note": note}


MEASURES: dict[str, Callable[[str, Progress], dict[str, Any]]] = {
    "slq": measure_lanczos,
    "hutchinson": coverage("hutchinson"),
    "hutch++": coverage("hutch++"),
    "xtrace": coverage("xtrace"),
    "batch-size-theory": measure_batch_theory,
    "flatness": measure_flatness,
    "quadratic-prediction": measure_prediction,
}
