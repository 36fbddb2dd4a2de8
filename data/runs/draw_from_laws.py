"""Tables drawn from the laws whose columns the project's own runs lack: a law's values on its own columns,
with a scatter of 0.2 %.

    python data/runs/draw_from_laws.py
        # writes data/runs/drawn/LAW.csv

They are for trying a law out and for knowing that a fit finds what is there. They are no evidence for a law.
Constants are the published ones where there are some (see each law's source), plausible ones otherwise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.scaling.formulas.lawbook import law

ROWS, SCATTER = 60, 0.002
CHINCHILLA = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
CONSTANTS: dict[str, dict[str, float]] = {
    "step-law-lr": {"c": 1.79, "x": 0.713, "y": 0.307},
    "step-law-batch": {"c": 0.58, "y": 0.571},
    "log-time": {"a": 0.4, "b": 1.7},
    "loss-time": {"E": 1.5, "c": 12.0, "g": 0.4},
    "sparse-average": CHINCHILLA,
    "ensemble": {"E": 3.2, "A": 0.3, "alpha": 0.9},
    "quantization-aware": CHINCHILLA
    | {"theta": 0.1, "kappa": 0.5, "phi": 2.0, "chi": 0.6, "psi": 0.1, "omega": 0.2}
    | {"lam": 1.0, "mu": 0.5, "nu": 0.1, "xi": 0.2, "rho": 0.1},
    "precision": CHINCHILLA | {"gw": 2.7, "ga": 2.2, "gkv": 1.0},
    "weight-precision": CHINCHILLA | {"gw": 2.7},
    "post-training-precision": {"CT": 0.05, "gd": 0.5, "gn": 0.5, "gp": 0.6},
    "mixed-quantization": {"C": 20.0, "a": 1.6, "b": 0.2, "gn": 0.3},
    "float-precision": {"E": 1.8, "n": 480.0, "d": 2000.0, "alpha": 0.35, "beta": 0.37}
    | {"gamma": 1e3, "delta": 1.5, "nu": 1.5},
    "data-constrained": {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353}
    | {"RD": 15.4, "RN": 5.3},
    "routed": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "Estart": 1.85, "Emax": 314.0},
    "broken-power": {"E": 1.0, "B": 30.0, "c0": 0.1, "c1": 0.2, "knee": 1e8, "f": 0.3},
    "farseer": {"s": -0.062465473, "q": 0.13, "K": np.exp(0.1284880679442551), "B": 230.73437075885855}
    | {"b": 0.1729, "J": np.exp(-1.544209554), "A": -1.665630816, "a": 0.0459, "E": 3.133347198805445},
    "parallel-streams": {"E": 1.288766, "A": 1.973498e8, "k": 0.334456, "alpha": 0.196333},
    "vocabulary": {"E": 5.5, "A1": 60.0, "A2": 40.0, "B": 5000.0, "alpha1": 0.3, "alpha2": 0.4, "beta": 0.4},
    "granularity": {"c": 0.47, "g": 2.1, "a": 18.1, "b": 30.8, "gamma": 0.58, "alpha": 0.115, "beta": 0.147},
    "joint-experts": {"c": 1.3637, "a": 35.91, "b": 35.98, "alpha": -0.1889, "beta": -0.1775}
    | {"gamma": -0.0098, "zeta": 0.0259, "delta": 0.2285, "omega": -0.5529, "Estart": 2.07, "Emax": 290.0},
    "upcycling": {"E": 1.5, "A": 3e6, "alpha1": 0.5, "alpha2": 0.6, "alpha3": 0.02},
    "upcycling-size": {"d1": 90.0, "a": 0.3, "b": 0.25, "c": 0.01, "d3": 1.4},
    "rate-surface": CHINCHILLA
    | {"h": 0.02, "c": 1.79, "x": 0.713, "y": 0.307, "g": 0.01, "k": 0.58, "z": 0.571},
    "data-mixing": {"c": 1.5, "t1": -1.0, "t2": 0.2, "t3": -0.4, "t4": 0.5, "t5": -2.0},
    "domain-sum": {"E": 1.5}
    | {"C1": 1.0, "C2": 0.3, "C3": 0.5, "C4": 0.2, "C5": 2.0}
    | {"g1": 0.5, "g2": 0.8, "g3": 0.3, "g4": 1.0, "g5": 0.6},
    "accuracy-of-loss": {"a": -0.6, "k": 6.0, "L0": 0.9, "b": 0.95},
    "error-of-loss": {"eps": 0.86, "k": 1.0, "gamma": 1.0},
    "sparse": {"E": 0.65, "aS": 16.8, "bS": 0.722, "cS": 45.0, "bN": 0.245, "aD": 6.9e8, "bD": 0.203},
}
#: Lowest and highest value of a column; a list is all the values it takes.
SPANS: dict[str, tuple[float, float] | list[float]] = {
    "params": (1e7, 1e10),
    "average_params": (1e7, 1e10),
    "tokens": (1e9, 1e11),
    "unique_tokens": (1e8, 1e10),
    "step": (1.0, 1e5),
    "members": [1.0, 2.0, 3.0, 4.0, 5.0],
    "experts": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0],
    "bits": [2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    "activation_bits": [3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    "kv_bits": [2.0, 3.0, 4.0, 6.0, 8.0, 16.0],
    "post_bits": [2.0, 3.0, 4.0, 6.0, 8.0],
    "exponent_bits": [1.0, 2.0, 3.0, 4.0, 5.0],
    "mantissa_bits": [1.0, 2.0, 3.0, 4.0, 7.0],
    "block_size": [32.0, 64.0, 128.0, 256.0, 512.0],
    "qat_fraction": (0.05, 0.9),
    "quantized_share": (0.1, 1.0),
    "streams": [1.0, 2.0, 4.0, 8.0],
    "vocab_params": (1e6, 1e9),
    "non_vocab_params": (3e7, 1e9),
    "active_params": (1e7, 3e9),
    "granularity": [1.0, 2.0, 4.0, 8.0, 16.0],
    "dense_tokens": (1e9, 1e11),
    "sparse_tokens": (1e9, 1e11),
    "expert_ratio": [1.0, 2.0, 4.0, 8.0],
    "learning_rate": (1e-4, 1e-2),
    "batch_tokens": (3e4, 3e6),
    "task_loss": (0.3, 3.0),
    "sparsity": [0.0, 0.5, 0.75, 0.875],
}


def column(name: str, draw: np.random.Generator) -> np.ndarray:
    """Values of a column, evenly spread over its choices or, in the logarithm, over its span."""
    if name.startswith("proportion_"):
        return draw.gamma(1.0, size=ROWS)
    span = SPANS[name]
    if isinstance(span, list):
        return draw.choice(span, ROWS)
    whole = np.exp(draw.uniform(*np.log(span), ROWS))
    return whole if span[1] <= 4 else np.round(whole)


def table(name: str) -> dict[str, np.ndarray]:
    """The columns of one law and what it says of them, scattered."""
    shape, draw = law(name), np.random.default_rng(0)
    columns = {found: column(found, draw) for found in shape.columns}
    shares = [c for c in columns if c.startswith("proportion_")]
    total = sum(columns[c] for c in shares)
    columns |= {c: columns[c] / total for c in shares}
    exact = shape.predict(CONSTANTS[name], columns)
    return columns | {shape.target: exact * np.exp(SCATTER * draw.standard_normal(ROWS))}


def main() -> None:
    folder = Path(__file__).parent / "drawn"
    folder.mkdir(exist_ok=True)
    for name in CONSTANTS:
        columns = table(name)
        rows = [",".join(f"{value:.7g}" for value in row) for row in zip(*columns.values(), strict=True)]
        (folder / f"{name}.csv").write_text("\n".join([",".join(columns), *rows, ""]))


if __name__ == "__main__":
    main()
