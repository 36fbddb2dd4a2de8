"""Rounding against memory and GPTQ against the plain column loop, side by side in one process; medians of five, printed as ratios.

    python tests/benchmarks/bench_quantization.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from workbench.quantization.formats import named
from workbench.quantization.gptq import gptq, inverse_factor
from workbench.quantization.grid import Grid, fit

REPEATS = 5


def median_of(function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return statistics.median(times)


def column_loop(weight: Tensor, upper: Tensor, grid: Grid, block: int = 128) -> Tensor:
    """GPTQ as its paper's algorithm 1 states it: one column, then a rank-one update of the rest of its block of 128."""
    work, out = weight.clone(), torch.zeros_like(weight)
    scale, _ = grid.columns(weight.shape[1])
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        errors = torch.zeros(len(weight), end - start)
        for i in range(start, end):
            out[:, i] = grid.format.element.round(work[:, i] / scale[:, i]) * scale[:, i]
            errors[:, i - start] = (work[:, i] - out[:, i]) / upper[i, i]
            work[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        work[:, end:] -= errors @ upper[start:end, end:]
    return out


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    big = torch.randn(4096, 4096)
    copy = median_of(big.clone)  # reads it and writes a new tensor, as rounding does; a copy into touched memory is several times faster
    print("nearest rounding of 16.8 M weights in groups of 64, in times of cloning the tensor")
    for name in ("int4", "int8", "uint4", "e4m3fn", "e2m1", "nf4", "mxfp4"):
        grid = fit(big, named(name), "auto", 64)
        print(f"  {name:8} {median_of(lambda grid=grid: grid.round(big)) / copy:6.2f}")
    print("GPTQ, speed over the column loop, and its squared error relative to the loop's")
    for out, width in ((384, 384), (1536, 384), (384, 1536)):
        inputs = torch.randn(2 * width, width) @ torch.randn(width, width)
        weight, gram = torch.randn(out, width), inputs.T @ inputs
        upper, grid = inverse_factor(gram, 0.01), fit(weight, named("int4"), "channel")
        values, plain = gptq(weight, upper, grid), column_loop(weight, upper, grid)
        errors = [float((((v - weight) @ gram) * (v - weight)).sum()) for v in (values, plain)]
        speed = median_of(lambda w=weight, u=upper, g=grid: column_loop(w, u, g)) / median_of(lambda w=weight, u=upper, g=grid: gptq(w, u, g))
        print(f"  {out:5} x {width:5} {speed:6.2f} x faster, error {errors[0] / errors[1]:.4f}")


if __name__ == "__main__":
    main()
