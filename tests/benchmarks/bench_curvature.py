"""Curvature products and stochastic Lanczos quadrature beside curvlinops and hessian-eigenthings,
on the MiniLM encoder.

    python tests/benchmarks/bench_curvature.py products [--repeats 5] [--examples 4] [--batch-size 2]
    [--probes 8]
    python tests/benchmarks/bench_curvature.py steps    [--repeats 4] [--probes 2]
    python tests/benchmarks/bench_curvature.py slq
        [--repeats 5] [--examples 4] [--batch-size 2] [--probes 8] [--steps 30] [--whole]
    python tests/benchmarks/bench_curvature.py memory --library workbench | curvlinops | hessian-eigenthings
    [--steps 3]

All libraries that are installed get the same 36 encoder matrices, the same micro-batches, float32 and plain
matrix-product attention (the peers raise on the fused one). Times are CPU seconds of one thread, taken in
turns in one process, and printed as medians of ratios: in gradients (one gradient = forward and backward over
the same data, with the same attention) and of peer to workbench.

`slq` compares whole calls from data to density. All run probes of this size one after the other (the
workbench in pairs), each at the same cost, so every repeat takes a call with one probe (a pair) times
the number of probes (pairs), plus what a peer does once: curvlinops first searches the spectrum's boundaries.
What the workbench does once, building the graphs, is thus counted for every pair. `--whole` also runs
the whole calls of the workbench and curvlinops once, to check those sums. `memory` runs a whole call in
a process of its own (hessian-eigenthings: one probe, as it runs them one by one). Only its memory grows with
the steps at this size, as it keeps every Krylov vector: three steps are enough for the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench
from workbench.curvature import curvature_operator
from workbench.curvature.estimators.lanczos import GroupedProbes, Lockstep, Quadrature, band, keeps_basis
from workbench.curvature.estimators.probes import rademacher
from workbench.curvature.operators.weights import find_places

LAYERS = "bert.encoder.layer.*"


class Logits(nn.Module):
    """The classifier as a function of the token ids alone: padding is id 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    began = time.process_time()
    value = work(*arguments, **options)
    return time.process_time() - began, value


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    return timed(work, *arguments)[0]


class Bench:
    def __init__(self, examples: int, batch_size: int) -> None:
        self.subject = workbench.subject("minilm-docstrings")
        self.examples, self.batch_size = examples, batch_size
        self.places = find_places(self.subject.model, LAYERS)
        chosen = {id(p.parameter) for p in self.places}
        for p in self.subject.model.parameters():
            p.requires_grad_(id(p) in chosen)
        self.logits = Logits(self.subject.model)
        self.parameters = {n: p for n, p in self.logits.named_parameters() if p.requires_grad}
        self.pairs = [
            (b["input_ids"], b["labels"]) for b in self.subject.batches("calibration", batch_size, examples)
        ]
        self.size = sum(p.numel() for p in self.parameters.values())

    def open(self, kind: str = "hessian") -> Any:
        return curvature_operator(
            self.subject, kind, LAYERS, examples=self.examples, batch_size=self.batch_size
        )

    def curvlinops(self, kind: str = "hessian") -> Any:
        import curvlinops

        peer = curvlinops.HessianLinearOperator if kind == "hessian" else curvlinops.GGNLinearOperator
        return peer(
            self.logits,
            nn.CrossEntropyLoss(),
            list(self.parameters.values()),
            self.pairs,
            check_deterministic=False,
        )

    def eigenthings(self) -> Any:
        import hessian_eigenthings

        return hessian_eigenthings.HessianOperator(
            self.logits,
            self.pairs,
            hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss()),
            param_filter=lambda name, parameter: name in self.parameters,
        )

    def eigenthings_slq(self, probes: int, steps: int) -> Any:
        import hessian_eigenthings

        return hessian_eigenthings.spectral_density(
            self.eigenthings(), num_runs=probes, lanczos_steps=steps, seed=0
        )

    def slq(self, probes: int, steps: int, of: int | None = None) -> Quadrature:
        """A whole call with so many probes, made as one with `of` probes is."""
        with self.open() as operator:
            full = keeps_basis(operator.size, of or probes, steps, 4)
            run = GroupedProbes(
                operator, lambda numbers: rademacher(operator, numbers, 0), probes, steps, full
            )
            for _ in run.run():
                pass
            found = run.quadrature()
            band(found.densities(found.grid(found.default_width()), found.default_width()))
            return found


EIGENTHINGS = importlib.util.find_spec("hessian_eigenthings") is not None
Rows = list[tuple[str, float, float, float]]


def summary(found: dict[str, list[float]]) -> Rows:
    return [(k, median(v), min(v), max(v)) for k, v in found.items()]


def products(bench: Bench, repeats: int, probes: int) -> Iterator[Rows]:
    """After every repeat, the (what, median, lowest, highest) of the ratios so far."""
    vectors = torch.randn(probes, bench.size, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    agree = bench.curvlinops("ggn") @ vectors[0]
    with bench.open("ggn") as operator:
        error = float((operator.matvec(vectors[0]) - agree).norm() / agree.norm())
    print(f"Gauss-Newton product, relative difference to curvlinops: {error:.1e}", flush=True)
    if EIGENTHINGS:
        agree = bench.eigenthings().matvec(vectors[0])
        with bench.open() as operator:
            error = float((operator.matvec(vectors[0]) - agree).norm() / agree.norm())
        print(f"Hessian product, relative difference to hessian-eigenthings: {error:.1e}", flush=True)
    del agree
    columns = vectors.T.contiguous()
    for _ in range(repeats):
        row: dict[str, float] = {}
        with bench.open() as operator:
            gradient = seconds(operator.gradient)
            row[f"Hessian, {probes} vectors, first product: gradients a vector"] = (
                seconds(operator.matmat, vectors) / probes
            )
            operator.matmat(vectors[:1])  # from here on the graphs are kept
            row[f"Hessian, {probes} vectors, further products: gradients a vector"] = (
                seconds(operator.matmat, vectors) / probes
            )
            row["Hessian, 1 vector, further products: gradients"] = seconds(operator.matmat, vectors[:1])
            gradient = (gradient + seconds(operator.gradient)) / 2
        with bench.open("ggn") as operator:
            row[f"GGN, {probes} vectors, first product: gradients a vector"] = (
                seconds(operator.matmat, vectors) / probes
            )
            operator.matmat(vectors[:1])
            row[f"GGN, {probes} vectors, further products: gradients a vector"] = (
                seconds(operator.matmat, vectors) / probes
            )
        their_hessian, their_ggn = bench.curvlinops(), bench.curvlinops("ggn")
        row["curvlinops Hessian, 1 vector: gradients"] = seconds(their_hessian.__matmul__, columns[:, 0])
        row["curvlinops GGN, 4 columns: gradients a vector"] = (
            seconds(their_ggn.__matmul__, columns[:, :4]) / 4
        )
        for key, value in row.items():
            found.setdefault(key, []).append(value / gradient)
        print(
            f"one gradient {gradient:.3f} s; " + "; ".join(f"{k} {v[-1]:.2f}" for k, v in found.items()),
            flush=True,
        )
        yield summary(found)


def lanczos_steps(bench: Bench, repeats: int, probes: int) -> Iterator[Rows]:
    """One step of a probe in lockstep, graphs kept, beside one product of curvlinops;
    as `products`, in seconds instead of minutes.
    """
    found: dict[str, list[float]] = {}
    theirs, vector = bench.curvlinops(), torch.randn(bench.size, generator=torch.Generator().manual_seed(0))
    theirs @ vector
    other = bench.eigenthings() if EIGENTHINGS else None
    with bench.open() as operator:
        operator.gradient()
        run = Lockstep(operator, rademacher(operator, range(probes), 0), repeats + 2, False)
        run.step()
        run.step()
        for _ in range(repeats):
            gradient, mine, peer = (
                seconds(operator.gradient),
                seconds(run.step) / probes,
                seconds(theirs.__matmul__, vector),
            )
            row = {
                "workbench, one probe and step: gradients": mine / gradient,
                "curvlinops Hessian, one product: gradients": peer / gradient,
                "curvlinops product over workbench step": peer / mine,
            }
            if other is not None:
                spent = seconds(other.matvec, vector)
                row |= {
                    "hessian-eigenthings, one product: gradients": spent / gradient,
                    "hessian-eigenthings product over workbench step": spent / mine,
                }
            for key, value in row.items():
                found.setdefault(key, []).append(value)
            yield summary(found)


def slq(bench: Bench, repeats: int, probes: int, steps: int, whole: bool) -> Iterator[Rows]:
    """Whole calls, as `products`."""
    from curvlinops.papyan2020traces.spectrum import (
        approximate_boundaries,
        fast_lanczos,
        lanczos_approximate_spectrum,
    )

    found: dict[str, list[float]] = {}
    pair = min(2, probes)
    for _ in range(repeats):
        with bench.open() as operator:
            gradient = seconds(operator.gradient)
        row: dict[str, float] = {}
        row["workbench, two probes"], mine = timed(bench.slq, pair, steps, probes)
        whole_call = row["workbench, two probes"] * probes / pair
        theirs = bench.curvlinops()
        row["curvlinops, boundaries"], bounds = timed(approximate_boundaries, theirs)
        row["curvlinops, one probe"], (nodes, _) = timed(fast_lanczos, theirs, steps)
        sums = {
            "curvlinops": row["curvlinops, boundaries"] + probes * row["curvlinops, one probe"],
            "curvlinops with given boundaries": probes * row["curvlinops, one probe"],
        }
        if EIGENTHINGS:
            row["hessian-eigenthings, one probe"], _ = timed(bench.eigenthings_slq, 1, steps)
            sums["hessian-eigenthings"] = probes * row["hessian-eigenthings, one probe"]
        lines = {f"{name}: gradients": value / gradient for name, value in row.items()}
        lines |= {f"whole call, {name} over workbench": value / whole_call for name, value in sums.items()}
        for key, value in lines.items():
            found.setdefault(key, []).append(value)
        print(
            f"one gradient {gradient:.3f} s, workbench {whole_call:.1f} s; "
            + "; ".join(f"{k} {v:.2f}" for k, v in lines.items()),
            flush=True,
        )
        print(
            f"extent: workbench {mine.extent}, curvlinops {float(nodes.min()), float(nodes.max())}, "
            f"its boundaries {bounds}",
            flush=True,
        )
        yield summary(found)
    if whole:
        print(
            "\n".join(
                f"| {what} | {middle:.2f} | {low:.2f} | {high:.2f} |"
                for what, middle, low, high in summary(found)
            ),
            flush=True,
        )
        measured, _ = timed(bench.slq, probes, steps)
        print(f"the workbench's whole call: {measured:.1f} s; from its parts: {whole_call:.1f} s", flush=True)
        theirs_measured, _ = timed(lanczos_approximate_spectrum, theirs, ncv=steps, num_repeats=probes)
        print(
            f"curvlinops' whole call: {theirs_measured:.1f} s, {theirs_measured / measured:.2f} times; "
            f"from its parts: {sums['curvlinops']:.1f} s",
            flush=True,
        )


def memory(bench: Bench, library: str, probes: int, steps: int) -> None:
    """Peak resident memory of a whole call, beyond one gradient's."""
    with bench.open() as operator:
        operator.gradient()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if library == "workbench":
        bench.slq(probes, steps)
    elif library == "curvlinops":
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

        lanczos_approximate_spectrum(bench.curvlinops(), ncv=steps)
    else:
        bench.eigenthings_slq(1, steps)
    print(
        f"{library}, {steps} steps: peak "
        f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB above one "
        "gradient's"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("products", "steps", "slq", "memory"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument(
        "--library", choices=("workbench", "curvlinops", "hessian-eigenthings"), default="workbench"
    )
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2; curvlinops divides by steps - 1")
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        bench = Bench(options.examples, options.batch_size)
        if options.what == "memory":
            memory(bench, options.library, options.probes, options.steps)
            return
        if options.what == "products":
            runs = products(bench, options.repeats, options.probes)
        elif options.what == "steps":
            runs = lanczos_steps(bench, options.repeats, options.probes)
        else:
            runs = slq(bench, options.repeats, options.probes, options.steps, options.whole)
        rows: Rows = []
        loads = []
        for found in runs:
            rows = found
            loads.append(os.getloadavg()[0])
    print(
        "\n".join(
            [
                f"MiniLM encoder, {options.examples} examples in micro-batches of {options.batch_size}, "
                f"{options.probes} probes, {options.steps} steps, {options.repeats} "
                f"repeats, torch {torch.__version__}, one thread of {os.cpu_count()} {platform.machine()} "
                f"cores, CPU seconds; load {min(loads):.0f} to {max(loads):.0f}.",
                "",
                "| what | median | lowest | highest |",
                "|---|---|---|---|",
                *(f"| {what} | {middle:.2f} | {low:.2f} | {high:.2f} |" for what, middle, low, high in rows),
            ]
        )
    )


if __name__ == "__main__":
    main()
