"""Rounding against memory, GPTQ against the plain column loop, reconstruction errors against peers;
medians of five, printed as ratios.

    python -m tests.benchmarks.bench_quantization speed
        # rounding against a copy, GPTQ against the plain column loop
    python -m tests.benchmarks.bench_quantization errors
        # against torch, compressed-tensors and the dense inverse, on a random layer
    python -m tests.benchmarks.bench_quantization peers
        # against torchao, HQQ, quanto and AutoRound where importable, on layers of the MiniLM
    python -m tests.benchmarks.bench_quantization allocation
        # seconds of the integer program, and its certificate
    python -m tests.benchmarks.bench_quantization encoder
        # GPTQ over all encoder linears of the MiniLM: CPU seconds and error

Libraries outside the environment: `pip install --target FOLDER --no-deps hqq torchao optimum-quanto
auto-round termcolor py-cpuinfo ninja`, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

import workbench
from tests.benchmarks.quantization_peers import PEERS
from workbench.quantization.allocation.integer_program import allocate
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.quantize import Quantize
from workbench.quantization.rounding.feedback import Factors, linear_feedback
from workbench.quantization.rounding.gptq import gptq
from workbench.quantization.rounding_order import Source, round_layer
from workbench.statistics import second_moments
from workbench.statistics.damping import damped
from workbench.subjects import Layer, Subject

REPEATS = 5


def median_of(function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return statistics.median(times)


def column_loop(weight: Tensor, upper: Tensor, grid: Grid, block: int = 128, moving: bool = False) -> Tensor:
    """GPTQ as its paper's algorithm 1 states it: one column, then a rank-one update of the rest of its block
    of 128. With `moving` every block is a group whose scale is found once the loop is there,
    as the authors' script does.
    """
    work, out = weight.clone(), torch.zeros_like(weight)
    scale, _ = grid.columns(weight.shape[1])
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        if moving:
            scale[:, start:end] = fit(work[:, start:end], grid.format, "channel").scale
        errors = torch.zeros(len(weight), end - start)
        for i in range(start, end):
            out[:, i] = grid.format.element.round(work[:, i] / scale[:, i]) * scale[:, i]
            errors[:, i - start] = (work[:, i] - out[:, i]) / upper[i, i]
            work[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        work[:, end:] -= errors @ upper[start:end, end:]
    return out


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse as the authors' script finds it:
    two factorisations and an inverse.
    """
    return torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damp))), upper=True
    )


def dense_inverse(weight: Tensor, gram: Tensor, damp: float, grid: Grid) -> Tensor:
    """Optimal brain quantization in column order: after each column its row and column are eliminated from
    the explicit inverse, in float64.
    """
    work, inverse, out = (
        weight.double(),
        torch.linalg.inv(damped(gram, damp).double()),
        torch.zeros_like(weight, dtype=torch.float64),
    )
    scale = grid.columns(weight.shape[1])[0].double()
    for i in range(weight.shape[1]):
        out[:, i] = grid.format.element.round(work[:, i] / scale[:, i]) * scale[:, i]
        error = (work[:, i] - out[:, i]) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out.float()


def by_torch(weight: Tensor, grid: Grid) -> Tensor:
    """One scale a row, symmetric integers, by torch's own kernel."""
    scale, element = grid.scale[:, 0], grid.format.element
    return torch.fake_quantize_per_channel_affine(
        weight,
        scale,
        torch.zeros(len(scale), dtype=torch.int32),
        0,
        int(element.lowest),
        int(element.highest),
    )


def by_compressed_tensors(weight: Tensor, bits: int, group: int) -> Tensor:
    """Groups with a zero point, scales and rounding by compressed-tensors (vLLM's format library)."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group
    )
    blocks = weight.unflatten(1, (-1, group))
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), settings)
    return fake_quantize(weight, scale, zero, settings)


def compare_errors() -> None:
    torch.manual_seed(1)
    weight = torch.randn(384, 384) * torch.rand(384, 1)
    inputs = torch.randn(768, 384) @ torch.randn(384, 384)
    gram = inputs.T @ inputs

    def error(values: Tensor) -> float:
        return float((((values - weight).double() @ gram.double()) * (values - weight)).sum())

    print("error of the outputs, ours over the peer's, one layer, inputs and bits")
    for bits in (3, 4, 8):
        row = fit(weight, named("int", bits), "channel")
        print(
            f"  nearest int{bits}, a scale a row, over torch.fake_quantize          "
            f"{error(row.round(weight)) / error(by_torch(weight, row)):.4f}"
        )
        if importlib.util.find_spec("compressed_tensors"):
            ours = fit(weight, named("int", bits, False), "group", 64).round(weight)
            print(
                f"  nearest uint{bits}, groups of 64, over compressed-tensors            "
                f"{error(ours) / error(by_compressed_tensors(weight, bits, 64)):.4f}"
            )
        found = gptq(weight, linear_feedback(gram, 0.01), row)
        print(
            f"  GPTQ int{bits}, over the dense inverse in float64                    "
            f"{error(found) / error(dense_inverse(weight, gram, 0.01, row)):.4f}"
        )


def compare_peers(examples: int = 32) -> None:
    """Squared error of each layer's outputs and weights over the library's,
    on the first block of the MiniLM with real inputs.
    """
    on = workbench.subject("minilm-docstrings")
    layers = on.layers("*layer.0.*")
    moments = second_moments(on, layers, "calibration", examples)
    print(
        f"{len(layers)} layers, {examples} calibration texts; ours over the library's: "
        "outputs (median, worst layer), weights (median, worst layer)"
    )
    for peer in PEERS:
        name = f"{peer.package} {peer.version or ''}: {peer.what}"
        if peer.version is None:
            print(f"  {name:66} absent")
            continue
        outputs, weights = [], []
        try:
            for layer in layers:
                weight, gram = layer.weight.detach().float(), moments[layer.name].gram[0]
                ours, theirs = (values(weight, gram) - weight for values in (peer.ours, peer.theirs))
                outputs.append(float((ours @ gram * ours).sum() / (theirs @ gram * theirs).sum()))
                weights.append(float(ours.square().sum() / theirs.square().sum()))
        except (ImportError, AttributeError, RuntimeError, TypeError) as problem:
            print(f"  {name:66} did not run: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}")
            continue
        print(
            f"  {name:66} {statistics.median(outputs):.4f} {max(outputs):.4f}   "
            f"{statistics.median(weights):.4f} {max(weights):.4f}"
        )


def whole_encoder() -> None:
    """GPTQ int4, a scale for 128 weights, over all encoder linears with 128 calibration texts, the authors'
    scheme and ours by turns in one process: CPU seconds (medians), the ratio of each turn,
    and the errors on one and the same second moment.
    """
    on = workbench.subject("minilm-docstrings")
    layers = on.layers("blocks")
    on.task.output(on.model, next(on.batches("calibration", 4)))  # opened and loaded
    weights = {layer.name: layer.weight.detach() for layer in layers}
    spent: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    schemes = {
        "authors' scheme": functools.partial(reference_encoder, on, layers),
        "workbench": functools.partial(our_encoder, on, layers, False),
        "workbench, act-order": functools.partial(our_encoder, on, layers, True),
    }
    moments = second_moments(on, layers, "calibration", 128)
    for _ in range(REPEATS):
        for name, scheme in schemes.items():
            hessian_seconds, rounding_seconds, values = scheme()
            for part, seconds in (
                ("second moments", hessian_seconds),
                ("rounding", rounding_seconds),
                ("together", hessian_seconds + rounding_seconds),
            ):
                spent.setdefault(f"{name}: {part}", []).append(seconds)
            shares = []
            for layer in layers:
                weight, gram = weights[layer.name], moments[layer.name].gram
                assert gram is not None
                gap = values[layer.name] - weight
                shares.append(float((gap @ gram[0] * gap).sum() / (weight @ gram[0] * weight).sum()))
            errors[name] = statistics.mean(shares)
    for what, seconds in spent.items():
        print(
            f"  {what:40} {statistics.median(seconds):6.2f} s of CPU ({min(seconds):.2f} to "
            f"{max(seconds):.2f})"
        )
    for name, error in errors.items():
        ratios = [
            a / b for a, b in zip(spent["authors' scheme: together"], spent[f"{name}: together"], strict=True)
        ]
        print(
            f"  {name:24} {statistics.median(ratios):5.2f} times as fast as the authors' scheme "
            f"({min(ratios):.2f} to {max(ratios):.2f}); "
            f"relative output error {error:.6f} (mean over {len(layers)} layers)"
        )


def our_encoder(
    on: Subject, layers: Sequence[Layer], act_order: bool
) -> tuple[float, float, dict[str, Tensor]]:
    """CPU seconds of the second moments and of the rounding, and the values."""
    began = time.process_time()
    moments = second_moments(on, layers, "calibration", 128)
    middle = time.process_time()
    quantizer, factors = (
        Quantize(format="int4", group_size=128, rounding={"name": "gptq", "act_order": act_order}),
        Factors(),
    )
    values = {
        layer.name: round_layer(quantizer, layer, Source(moments[layer.name], torch.Generator(), factors))[0]
        for layer in layers
    }
    return middle - began, time.process_time() - middle, values


def reference_encoder(on: Subject, layers: Sequence[Layer]) -> tuple[float, float, dict[str, Tensor]]:
    """The same of GPTQ as its authors' script does it: a Hessian for every layer from hooks, padding
    included, then the column loop, which finds a group's scale when it gets there."""
    began = time.process_time()
    hessians = {layer.name: torch.zeros(layer.shape[-1], layer.shape[-1]) for layer in layers}

    def add(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            hessians[name] += rows.T @ rows

        return hook

    hooks = [layer.module.register_forward_pre_hook(add(layer.name)) for layer in layers]
    with torch.no_grad():
        for batch in on.batches("calibration", 16, 128):
            on.task.output(on.model, batch)
    for hook in hooks:
        hook.remove()
    middle = time.process_time()
    values = {}
    for layer in layers:
        weight = layer.weight.detach()
        values[layer.name] = column_loop(
            weight,
            inverse_factor(hessians[layer.name], 0.01),
            fit(weight, named("int4"), "group", 128),
            moving=True,
        )
    return middle - began, time.process_time() - middle, values


def compare_speed() -> None:
    torch.manual_seed(0)
    big = torch.randn(4096, 4096)
    # reads it and writes a new tensor, as rounding does; a copy into touched memory is several times faster
    copy = median_of(big.clone)
    print("nearest rounding of 16.8 M weights in groups of 64, in times of cloning the tensor")
    for name in ("int4", "int8", "uint4", "e4m3fn", "e2m1", "nf4", "mxfp4"):
        grid = fit(big, named(name), "auto", 64)
        print(f"  {name:8} {median_of(lambda grid=grid: grid.round(big)) / copy:6.2f}")
    print("GPTQ, speed over the column loop, and its squared error relative to the loop's")
    for out, width in ((384, 384), (1536, 384), (384, 1536)):
        inputs = torch.randn(2 * width, width) @ torch.randn(width, width)
        weight, gram = torch.randn(out, width), inputs.T @ inputs
        upper, feedback, grid = (
            inverse_factor(gram, 0.01),
            linear_feedback(gram, 0.01),
            fit(weight, named("int4"), "channel"),
        )
        values, plain = gptq(weight, feedback, grid), column_loop(weight, upper, grid)
        errors = [float((((v - weight) @ gram) * (v - weight)).sum()) for v in (values, plain)]
        speed = median_of(lambda w=weight, u=upper, g=grid: column_loop(w, u, g)) / median_of(
            lambda w=weight, f=feedback, g=grid: gptq(w, f, g)
        )
        print(f"  {out:5} x {width:5} {speed:6.2f} x faster, error {errors[0] / errors[1]:.4f}")


def allocation() -> None:
    """CPU seconds of the integer program at 30 budgets, six widths a layer,
    and the gap that the solver leaves to its proven bound.
    """
    random, widths = np.random.default_rng(0), np.array([2, 3, 4, 5, 6, 8.0])
    for layers in (28, 36, 224):
        weights = random.integers(1, 9, layers) * 36864.0
        cost, size = (
            random.lognormal(0, 1.2, layers)[:, None] * weights[:, None] * 4.0**-widths,
            weights[:, None] * widths,
        )
        times, gaps = [], []
        for average in np.linspace(2.1, 7.9, 30):
            began = time.process_time()
            found = allocate(cost, size, average * weights.sum())
            times.append(time.process_time() - began)
            gaps.append((found.cost - found.bound) / found.cost)
        print(
            f"  {layers:4} layers: median {np.median(times):.3f} s, slowest {max(times):.3f} s, "
            f"largest gap {max(gaps):.0e}"
        )


def main() -> None:
    modes = {
        "allocation": allocation,
        "speed": compare_speed,
        "errors": compare_errors,
        "peers": compare_peers,
        "encoder": whole_encoder,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=list(modes))
    torch.set_num_threads(1)
    with threadpool_limits(1):  # scipy's BLAS
        modes[parser.parse_args().mode]()


if __name__ == "__main__":
    main()
