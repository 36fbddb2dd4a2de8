"""GPTQ beside llm-compressor: the same weights, second moments, grids and windows, one thread; CPU seconds
and how far the weights are apart.

    python -m tests.benchmarks.bench_gptq layers --peer FOLDER/bin/python
        # the linears of one block of `smollm2`, second moments of 8 windows: the rounding alone
    python -m tests.benchmarks.bench_gptq model --peer FOLDER/bin/python --windows 32
        # all blocks, calibration included

The library has an environment of its own: `python -m venv FOLDER`, `FOLDER/bin/pip install llmcompressor
torch==2.13.0`. Without `--peer`, or where it cannot be imported there, the workbench is timed alone and the
reason printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import workbench
from workbench.quantization.number.formats import named
from workbench.quantization.number.grid import Grid, fit
from workbench.quantization.quantize import Quantize
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding.gptq import gptq, gptq_error
from workbench.quantization.rounding_order import Source, round_layers
from workbench.statistics import second_moments
from workbench.subjects import Subject

PEER = Path(__file__).with_name("gptq_peer.py")
GROUP, REPEATS = 64, 5


def ask(python: str | None, *words: object) -> dict[str, Any] | None:
    """What the peer prints, or None, the reason printed."""
    if python is None:
        print("llm-compressor left out: --peer names no interpreter of an environment that has it")
        return None
    command = [python, str(PEER), *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, capture_output=True, text=True
    )
    if done.returncode:
        print(f"llm-compressor left out: {done.stderr.strip().splitlines()[-1]}")
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def median_seconds(function: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return statistics.median(found)


def whole(weight: Tensor, gram: Tensor, grid: Grid, ordered: bool) -> Tensor:
    """Factorisation and column loop."""
    feedback, order = Factors().of(gram, 0.01, ordered)
    return gptq(weight, feedback, grid, order=order)


def one_block(on: Subject, python: str | None, windows: int, block: str) -> None:
    """The rounding alone, layer by layer and the block as a run does it."""
    layers = on.layers(f"*{block}*")
    moments = second_moments(on, layers, "calibration", windows)
    weights = {layer.name: layer.weight.detach().float() for layer in layers}
    grams = {name: each.gram[0] for name, each in moments.items() if each.gram is not None}
    grids = {name: fit(weight, named("uint4"), "group", GROUP) for name, weight in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        given, put = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        tensors = {}
        for name, grid in grids.items():
            assert grid.zero is not None
            tensors |= {f"{name}/weight": weights[name], f"{name}/gram": grams[name]}
            tensors |= {f"{name}/scale": grid.scale, f"{name}/zero": grid.zero - 8}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given)
        found = ask(python, "layers", given, put, REPEATS)
        theirs = load_file(put) if found else {}
    print(found["versions"] if found else "", f"torch {torch.__version__}")
    print("| layer | order | ms | llm-compressor, ms | ratio | equal codes | error, ours over theirs |")
    print("|---|---|---|---|---|---|---|")
    for name, weight in weights.items():
        for ordered in (False, True):
            grid, gram = grids[name], grams[name]
            values = whole(weight, gram, grid, ordered)
            spent = median_seconds(lambda w=weight, g=gram, at=grid, o=ordered: whole(w, g, at, o))  # type: ignore[misc]
            line = f"| {name} | {'static' if ordered else 'in order'} | {spent * 1e3:.1f} |"
            if found:
                key = f"{name}/{'static' if ordered else 'in order'}"
                peer, own = theirs[key], found["seconds"][key]
                same = float((grid.codes(values) == grid.codes(peer)).float().mean())
                error = gptq_error(weight, values, gram) / gptq_error(weight, peer, gram)
                line += f" {own * 1e3:.1f} | {own / spent:.1f} | {same:.4f} | {error:.4f} |"
            print(line)
    settings = Quantize(format="uint4", group_size=GROUP, rounding="gptq")

    def as_a_run_does() -> None:
        factors = Factors()
        sources = {n: Source(moments[n], torch.Generator(), factors) for n in weights}
        list(round_layers(settings, layers, sources))

    spent = median_seconds(as_a_run_does)
    print(f"the block, scales found on the way: {spent * 1e3:.0f} ms")
    if found:
        own = sum(s for key, s in found["seconds"].items() if key.endswith("/in order"))
        print(f"llm-compressor's layers, scales given: {own * 1e3:.0f} ms, {own / spent:.1f} times as long")


def whole_model(on: Subject, python: str | None, windows: int) -> None:
    """All blocks in sequence, calibration included; losses left out."""
    settings = Quantize(
        format="uint4",
        group_size=GROUP,
        rounding="gptq",
        calibration_examples=windows,
        predict_examples=0,
        test_examples=0,
    )
    ids = on.split("calibration")["input_ids"][:windows]
    with tempfile.TemporaryDirectory() as folder:
        on.model.save_pretrained(folder)
        on.tokenizer.save_pretrained(folder)
        save_file({"input_ids": ids.contiguous()}, Path(folder) / "tokens.safetensors")
        put = Path(folder) / "out.safetensors"
        found = ask(python, "model", folder, Path(folder) / "tokens.safetensors", put)
        theirs = load_file(put) if found else {}
    began = time.process_time()
    result = settings.run(on, cache=False)
    spent = time.process_time() - began
    print(found["versions"] if found else "", f"torch {torch.__version__}")
    print(f"workbench {spent:.1f} CPU s for {windows} windows of {ids.shape[1]} tokens")
    if not found:
        return
    print(f"llm-compressor {found['seconds']:.1f} CPU s, {found['seconds'] / spent:.2f} times as long")
    split = ("validation", 32)
    ours = result.subject.evaluated(*split)["loss"]
    other = on.copy()
    for layer in other.layers("blocks"):
        layer.write(theirs[layer.name].to(layer.original.dtype))
    peer = other.evaluated(*split)["loss"]
    print(f"loss on {split[1]} windows of {split[0]}: {ours:.4f}, llm-compressor {peer:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("layers", "model"))
    parser.add_argument("--peer", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows")
    parser.add_argument("--block", default="layers.3.", help="the block that `layers` takes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    on = workbench.subject("smollm2")
    if asked.what == "layers":
        one_block(on, asked.peer, asked.windows, asked.block)
    else:
        whole_model(on, asked.peer, asked.windows)


if __name__ == "__main__":
    main()
