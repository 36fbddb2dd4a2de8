"""Curvature products and stochastic Lanczos quadrature beside curvlinops and hessian-eigenthings, on the MiniLM encoder.

    python tests/benchmarks/bench_curvature.py [--repeats 5] [--examples 16] [--batch-size 8] [--steps 4] [--out data/benchmarks/curvature.md]
    python tests/benchmarks/bench_curvature.py --memory workbench | curvlinops | hessian-eigenthings

All libraries get the same 36 encoder matrices, the same micro-batches, float32 and plain matrix-product attention (the peers
raise on the fused one). Times are CPU seconds of one thread, taken in turns in one process, and printed as medians of ratios: in
gradients (one gradient = forward and backward over the same data, with the same attention) and of peer to workbench.
SLQ runs are `--steps` long (the peers repeat one probe after the other, so their cost a step and probe does not depend on
the number of probes; the workbench runs all of its probes in lockstep). Peak memory: `--memory` runs 30 steps in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench
from workbench.curvature import curvature_operator
from workbench.curvature.lanczos import Lockstep, keeps_basis
from workbench.curvature.probes import rademacher
from workbench.curvature.weights import find_places

LAYERS = "bert.encoder.layer.*"


class Logits(nn.Module):
    """The classifier as a function of the token ids alone: padding is id 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


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
        self.pairs = [(b["input_ids"], b["labels"]) for b in self.subject.batches("calibration", batch_size, examples)]
        self.size = sum(p.numel() for p in self.parameters.values())

    def open(self, kind: str = "hessian") -> Any:
        return curvature_operator(self.subject, kind, LAYERS, examples=self.examples, batch_size=self.batch_size)

    def curvlinops(self, kind: str = "hessian") -> Any:
        import curvlinops

        peer = curvlinops.HessianLinearOperator if kind == "hessian" else curvlinops.GGNLinearOperator
        return peer(self.logits, nn.CrossEntropyLoss(), list(self.parameters.values()), self.pairs, check_deterministic=False)

    def eigenthings(self) -> Any:
        import hessian_eigenthings

        return hessian_eigenthings.HessianOperator(self.logits, self.pairs, hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss()),
                                                   param_filter=lambda name, parameter: name in self.parameters)  # fmt: skip

    def slq(self, probes: int, steps: int) -> Lockstep:
        with self.open() as operator:
            full = keeps_basis(operator.size, probes, steps, 4)
            run = Lockstep(operator, rademacher(operator, range(probes), 0), steps, full)
            for _ in run.run():
                pass
            return run

    def peer_slq(self, name: str, probes: int, steps: int) -> Any:
        if name == "curvlinops":
            from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

            return lanczos_approximate_spectrum(self.curvlinops(), ncv=steps, num_repeats=probes, boundaries=(-300.0, 900.0))
        import hessian_eigenthings

        return hessian_eigenthings.spectral_density(self.eigenthings(), num_runs=probes, lanczos_steps=steps, seed=0)


Rows = list[tuple[str, float, float, float]]


def measure(repeats: int, examples: int, batch_size: int, steps: int, probes: int) -> Iterator[Rows]:
    """After every repeat, the (what, median, lowest, highest) of the ratios so far."""
    bench = Bench(examples, batch_size)
    vectors = torch.randn(probes, bench.size, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    with sdpa_kernel(SDPBackend.MATH):
        agree = bench.curvlinops("ggn") @ vectors[0]
        with bench.open("ggn") as operator:
            error = float((operator.matvec(vectors[0]) - agree).norm() / agree.norm())
        print(f"Gauss-Newton product, relative difference to curvlinops: {error:.1e}", flush=True)
        theirs = bench.eigenthings()
        agree = theirs.matvec(vectors[0])
        with bench.open() as operator:
            error = float((operator.matvec(vectors[0]) - agree).norm() / agree.norm())
        print(f"Hessian product, relative difference to hessian-eigenthings: {error:.1e}", flush=True)
        del theirs, agree
        for number in range(repeats):
            with bench.open() as operator:
                gradient = seconds(operator.gradient)
                hessian = seconds(lambda op=operator: op.matmat(vectors)) / probes
                one = seconds(lambda op=operator: op.matmat(vectors[:1]))
                gradient = (gradient + seconds(operator.gradient)) / 2
            with bench.open("ggn") as operator:
                ggn = seconds(lambda op=operator: op.matmat(vectors)) / probes
            columns = vectors.T.contiguous()
            their_hessian, their_ggn = bench.curvlinops(), bench.curvlinops("ggn")
            c_one = seconds(lambda op=their_hessian, v=columns[:, 0]: op @ v)
            c_ggn = seconds(lambda op=their_ggn, v=columns[:, :4]: op @ v) / 4
            ours = seconds(lambda: bench.slq(probes, steps)) / (probes * steps)
            c_slq = seconds(lambda: bench.peer_slq("curvlinops", 1, steps)) / steps
            e_slq = seconds(lambda: bench.peer_slq("hessian-eigenthings", 1, steps)) / steps
            row = {
                f"Hessian, {probes} vectors: gradients a vector": hessian / gradient, "Hessian, 1 vector: gradients": one / gradient,
                f"GGN, {probes} vectors: gradients a vector": ggn / gradient, "curvlinops Hessian, 1 vector: gradients": c_one / gradient,
                "curvlinops GGN, 4 columns: gradients a vector": c_ggn / gradient, f"SLQ, {probes} probes: gradients a probe and step": ours / gradient,
                "curvlinops SLQ: gradients a probe and step": c_slq / gradient, "hessian-eigenthings SLQ: gradients a probe and step": e_slq / gradient,
                "SLQ speed-up over curvlinops": c_slq / ours, "SLQ speed-up over hessian-eigenthings": e_slq / ours,
            }  # fmt: skip
            print(f"repeat {number + 1}: one gradient {gradient:.2f} s; " + "; ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
            for key, value in row.items():
                found.setdefault(key, []).append(value)
            yield [(k, median(v), min(v), max(v)) for k, v in found.items()]


def memory(name: str, examples: int, batch_size: int) -> None:
    """Peak resident memory of 30 Lanczos steps (workbench: 8 probes together; peers: one probe at a time, as they run), beyond the model."""
    bench = Bench(examples, batch_size)
    with sdpa_kernel(SDPBackend.MATH):
        with bench.open() as operator:
            operator.gradient()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if name == "workbench":
            bench.slq(8, 30)
        else:
            bench.peer_slq(name, 1, 30)
    print(f"{name}: peak {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MiB above one gradient's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--memory", choices=("workbench", "curvlinops", "hessian-eigenthings"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2; curvlinops divides by steps - 1")
    torch.set_num_threads(1)
    if options.memory:
        memory(options.memory, options.batch_size, options.batch_size)
        return
    loads = []
    text = ""
    for done, rows in enumerate(measure(options.repeats, options.examples, options.batch_size, options.steps, options.probes), 1):
        loads.append(os.getloadavg()[0])
        text = "\n".join([
            f"MiniLM encoder, {options.examples} examples in micro-batches of {options.batch_size}, {options.probes} probes, SLQ of {options.steps} "
            f"step(s), {done} repeat(s), torch {torch.__version__}, one thread of {os.cpu_count()} {platform.machine()} cores.",
            f"CPU seconds, not wall time; meanwhile the machine's load was {min(loads):.0f} to {max(loads):.0f} processes, so caches were shared and single ratios are noisy.",
            "", "| what | median | lowest | highest |", "|---|---|---|---|",
            *(f"| {what} | {middle:.2f} | {low:.2f} | {high:.2f} |" for what, middle, low, high in rows), ""])  # fmt: skip
        if options.out:  # every repeat, so that a run cut short leaves what it measured
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
