"""What a subject costs to run on this device: measured milliseconds, memory, bytes, parameters and FLOPs.

Timings are of the baked model (masks and number formats multiplied in), in inference mode, on one real batch.
Every layer is also timed alone, dense and in the sparse formats the device has,
so that sparsity that makes things slower says so.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.axis import parameter
from workbench.errors import BadInput
from workbench.instruments import SubjectInstrument
from workbench.measures.texts.continued import continued
from workbench.progress import Progress
from workbench.results import Result
from workbench.statistics import InputCapture
from workbench.subjects import Layer, Mask, Subject, bake
from workbench.subjects.stored import bytes_of_weights, saved_size

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Latency(SubjectInstrument):
    """Median latency with quartiles, peak memory, bytes (dense and sparse-packed),
    parameters and FLOPs on this device; of a causal language model also tokens read and written a second.
    """

    summary_line: ClassVar[str] = "measured milliseconds, memory, bytes and FLOPs of a subject"

    batch_size: int = parameter(16, "examples in the timed batch", ge=1, unit="examples")
    repeats: int = parameter(11, "timed runs; the median and the quartiles are reported", ge=3, le=100_000)
    formats: bool = parameter(
        True, "also time every layer alone: dense, CSR, BSR and, on CUDA, 2:4 semi-structured"
    )
    decode_tokens: int = parameter(
        16, "tokens that a causal language model goes on by, timed; 0: none", ge=0, le=4096, unit="tokens"
    )
    layers: str = parameter("blocks", "layers timed alone: blocks or globs")
    split: str = parameter("test", "split the batch comes from", group="Data")

    @classmethod
    def result_class(cls) -> type[Result]:
        return LatencyResult

    def check(self, on: Any) -> None:
        on.split(self.split)
        on.layers(self.layers)

    def _run(self, on: Subject, progress: Progress) -> Result:
        baked = on.with_model(bake(copy.deepcopy(on.model)))
        batch = next(baked.batches(self.split, self.batch_size))

        def forward() -> None:
            with torch.inference_mode():
                baked.task.output(baked.model, batch)

        seconds = timed(forward, self.repeats, on.device, progress, "whole model")
        quartiles = statistics.quantiles(seconds, n=4)
        flops = count_flops(baked, batch)
        layers = on.layers("*")
        facts = {
            "median_ms": 1000 * quartiles[1],
            "quartile_low_ms": 1000 * quartiles[0],
            "quartile_high_ms": 1000 * quartiles[2],
            "examples_per_second": len(next(iter(batch.values()))) / quartiles[1],
            "peak_memory_bytes": peak_memory(baked, batch),
            "parameters": on.parameter_count(),
            "nonzero": on.parameter_count() - sum(int((layer.weight == 0).sum()) for layer in layers),
            "dense_bytes": saved_size(baked.model),
            "packed_bytes": saved_size(baked.model) - saved_bytes(on.model, layers),
            "flops": flops,
            "flops_without_zeros": flops - zero_flops(on, layers, batch),
            "batch": " x ".join(str(n) for n in next(iter(batch.values())).shape),
        }
        if on.task.name == "causal-lm":
            facts["prefill_tokens_per_second"] = batch["input_ids"].numel() / quartiles[1]
            if self.decode_tokens:
                facts["decode_tokens_per_second"] = self.written(baked, batch["input_ids"], progress)
        rows = layer_rows(on, on.layers(self.layers), batch, self.repeats if self.formats else 0, progress)
        return self.result(pd.DataFrame(rows), facts)

    def written(self, on: Subject, prompts: Tensor, progress: Progress) -> float:
        """Tokens a second after the first, of all texts together, each behind its prompt: the median."""
        ends: list[float] = []

        def note(*called: object) -> None:
            wait_for(on.device)
            ends.append(time.perf_counter())

        rates = []
        handle = on.model.register_forward_hook(note)
        try:
            for _ in progress.track(range(self.repeats), "writing"):
                ends.clear()
                continued(on.model, prompts, 1 + self.decode_tokens)
                rates.append(len(prompts) * self.decode_tokens / (ends[-1] - ends[0]))
        finally:
            handle.remove()
        return statistics.median(rates) if rates else math.nan


class LatencyResult(Result):
    """Milliseconds of every layer, format beside format."""

    def figure(self, **view: Any) -> go.Figure:
        from workbench.figures import by_layer

        timed = [str(c) for c in self.table.columns if str(c).endswith("_ms")]
        return by_layer(
            f"Milliseconds of each layer, batch {self.facts['batch']}",
            self.table["layer"].to_list(),
            {name.removesuffix("_ms"): self.table[name] for name in timed},
            "milliseconds (median)",
        )


def timed(
    run: Callable[[], Any],
    repeats: int,
    device: torch.device,
    progress: Progress | None = None,
    label: str = "timing",
) -> list[float]:
    """Seconds of each of `repeats` runs after two that are not counted; on CUDA the device is waited for."""
    progress = progress or Progress()
    found = []
    for number in progress.track(range(repeats + 2), label):
        wait_for(device)
        began = time.perf_counter()
        run()
        wait_for(device)
        if number >= 2:
            found.append(time.perf_counter() - began)
    if len(found) < 2:
        raise BadInput("repeats: stopped before two runs were timed")
    return found


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MemoryWatch(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._known:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, size)
        return output

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@torch.no_grad()
def peak_memory(subject: Subject, batch: dict[str, Tensor]) -> int:
    """Bytes at the highest point of one forward pass: parameters and buffers plus the intermediate tensors
    alive together.
    """
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
        subject.task.output(subject.model, batch)
        return torch.cuda.max_memory_allocated(subject.device)
    with MemoryWatch() as watch:
        subject.task.output(subject.model, batch)
    return watch.peak + model_bytes(subject.model)


class Total:
    """What `FlopCounterMode` asks for the modules that run: nothing but the whole. Its own hooks on modules
    are for gradients, and fail on models that give a slice of a parameter to a module (DeBERTa).
    """

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> Total:
        return self

    def __exit__(self, *args: object) -> None:
        pass


@torch.no_grad()
def count_flops(subject: Subject, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the matrix products of one forward pass (a multiply-add is 2),
    attention included.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Total()  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH), counter:
        subject.task.output(subject.model, batch)
    return counter.get_total_flops()


@torch.no_grad()
def tokens_of(subject: Subject, layers: list[Layer], batch: dict[str, Tensor]) -> dict[tuple[str, int], int]:
    """(layer, expert) -> rows that it multiplies for this batch."""
    found: dict[tuple[str, int], int] = {}

    def add(layer: Layer, expert: int, rows: Tensor) -> None:
        found[layer.name, expert] = found.get((layer.name, expert), 0) + len(rows)

    with InputCapture(layers, add):
        subject.task.output(subject.model, batch)
    return found


def zero_flops(subject: Subject, layers: list[Layer], batch: dict[str, Tensor]) -> int:
    """FLOPs spent multiplying by stored zeros."""
    rows = tokens_of(subject, layers, batch)
    total = 0
    for layer in layers:
        weight = layer.weight.detach()
        for expert, matrix in enumerate(weight if weight.ndim == 3 else weight[None]):
            total += 2 * rows.get((layer.name, expert), 0) * int((matrix == 0).sum())
    return total


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied weights once."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def saved_bytes(model: nn.Module, layers: list[Layer]) -> int:
    """What storing only the non-zeros of masked layers, and one bit a weight for their places, saves."""
    saved = 0
    for layer in layers:
        if any(isinstance(change, Mask) for change in layer.changes):
            weight = layer.weight
            zeros = int((weight == 0).sum())
            saved += zeros * bytes_of_weights(model, [weight]) - weight.numel() // 8
    return max(saved, 0)


def layer_rows(
    subject: Subject, layers: list[Layer], batch: dict[str, Tensor], repeats: int, progress: Progress
) -> list[dict[str, Any]]:
    """Each layer's shape, density and, with repeats > 0, its milliseconds alone in every format the device
    multiplies.
    """
    rows = tokens_of(subject, layers, batch)
    found = []
    for layer in progress.track(layers, "layers alone"):
        weight = layer.weight.detach()
        matrix = weight[0] if weight.ndim == 3 else weight
        tokens = max(rows.get((layer.name, 0), 0), 1)
        row: dict[str, Any] = {
            "layer": layer.name,
            "out": matrix.shape[0],
            "in": matrix.shape[1],
            "rows": tokens,
            "sparsity": float((weight == 0).float().mean()),
        }
        if repeats:
            row |= {
                f"{name}_ms": 1000 * seconds
                for name, seconds in format_times(matrix, tokens, repeats).items()
            }
        found.append(row)
    return found


def formats_of(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Products x -> x W^T of a matrix in every format this device has;
    sparse ones only when the matrix has zeros.

    BSR needs square blocks that divide the shape (other shapes are refused by the CPU library); 2:4 needs
    CUDA, half precision and a matrix that has the pattern.
    """
    made: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda x: torch.nn.functional.linear(x, weight)}
    if bool((weight != 0).all()):
        return made
    csr = weight.to_sparse_csr()
    made["csr"] = lambda x: torch.sparse.mm(csr, x.T)
    for side in (16, 32):
        if weight.shape[0] % side == 0 and weight.shape[1] % side == 0:
            bsr = weight.to_sparse_bsr((side, side))
            made[f"bsr{side}"] = lambda x, bsr=bsr: torch.matmul(bsr, x.T)  # type: ignore[misc]
    if weight.is_cuda:
        half = weight.half()
        made["dense_half"] = lambda x: torch.nn.functional.linear(x.half(), half)
        if weight.shape[1] % 4 == 0 and bool(((weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()):
            packed = torch.sparse.to_sparse_semi_structured(half)
            made["two_four_half"] = lambda x: torch.nn.functional.linear(x.half(), packed)
    return made


def format_times(weight: Tensor, rows: int, repeats: int) -> dict[str, float]:
    """Median seconds of a product with `rows` random inputs, by format;
    formats take turns, so noise falls on all alike.
    """
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the sparse formats announce themselves as beta
        products = formats_of(weight)
        inputs = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        samples: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(repeats):
            for name, product in products.items():
                samples[name].append(timed(lambda product=product: product(inputs), 2, weight.device)[-1])  # type: ignore[misc]
    return {name: statistics.median(values) for name, values in samples.items()}
