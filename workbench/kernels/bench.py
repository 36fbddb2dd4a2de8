"""Measured times of every operation beside PyTorch, in one process, so that the ratios mean something.

On a GPU both paths run as CUDA work timed by events after a warm-up; the table that results decides which
path "auto" takes on that device from then on. Without a GPU only the operations that have a CPU path worth
timing are run by hand (`tests/benchmarks`): the interpreter's seconds say nothing.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from workbench import figures
from workbench.errors import BadInput
from workbench.kernels.backend import measurement_file
from workbench.kernels.registry import Case, cases
from workbench.storage import replacing


def median_ms(call: Callable[[], Any], repeats: int = 20, warmup: int = 5) -> float:
    """Median milliseconds of `call` on the current GPU; the second-level cache is overwritten before every
    run.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(size: int = 2**30) -> float:
    """GB/s of a device-to-device copy (read plus write), the ceiling for everything bound by memory."""
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median_ms(lambda: target.copy_(source)) / 1e6


def time_case(case: Case, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Both paths of one case, and the share of the copy bandwidth that the Triton path reaches."""
    triton_call, torch_call = case.make(device)
    triton_ms, torch_ms = median_ms(triton_call), median_ms(torch_call)
    return {
        "operation": case.operation,
        "shape": case.shape,
        "size": case.size,
        "triton_ms": triton_ms,
        "torch_ms": torch_ms,
        "comparator": case.comparator,
        "speedup": torch_ms / triton_ms,
        "bandwidth_share": case.bytes / triton_ms / 1e6 / bandwidth,
        "tflops": case.flops / triton_ms / 1e9,
    }


def run(only: str = "*", record: bool = False, say: Callable[[str], Any] = print) -> Path | None:
    """Time every case whose operation matches the glob `only`;
    `record` writes the table that "auto" reads.
    """
    if not torch.cuda.is_available():
        raise BadInput(
            "kernels bench: no CUDA device here; run it on a machine with a GPU (`workbench kernels check` "
            "needs none)"
        )
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    bandwidth = copy_bandwidth()
    say(f"{name}: copy {bandwidth:.0f} GB/s")
    rows = []
    for case in cases():
        if not fnmatch.fnmatch(case.operation, only):
            continue
        row = time_case(case, device, bandwidth)
        rows.append(row)
        say(
            f"{case.operation:28} {case.shape:36} triton {row['triton_ms']:9.3f} ms  {case.comparator} "
            f"{row['torch_ms']:9.3f} ms  "
            f"x {row['speedup']:.2f}  {100 * row['bandwidth_share']:.0f} % of copy  {row['tflops']:.1f} "
            "TFLOP/s"
        )
        torch.cuda.empty_cache()
    if not record:
        return None
    path = measurement_file(name)
    table = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "copy_gb_per_s": bandwidth,
        "rows": rows,
    }
    with replacing(path) as draft:
        draft.write_text(json.dumps(table, indent=1) + "\n")
    return path


def unpadded_on_cpu(
    spreads: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    batch: int = 32,
    length: int = 128,
    layers: int = 2,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Padded and unpadded BERT (MiniLM's width, random weights) side by side on this CPU,
    over log-normal lengths.

    `spreads` are the standard deviations of log length (0: all equal, 1: web text); lengths are clipped to
    4..`length`. One row each: padding fraction, ideal ratio (padded / valid tokens), measured ratio
    (median of `repeats`, alternating), largest difference.
    """
    from transformers import BertConfig, BertModel

    from workbench.kernels.sequence.unpadded import repad, unpad

    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=1000,
    )
    model: Any = BertModel(config, add_pooling_layer=False).eval()
    rows = []
    for spread in spreads:
        drawn = (
            np.exp(generator.normal(np.log(length / 3), spread, batch)) if spread else np.full(batch, length)
        )
        lengths = torch.from_numpy(np.clip(np.round(drawn), 4, length).astype(np.int64))
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(0, 1000, mask.shape) * mask
        ratios, worst = [], 0.0
        for repeat in range(repeats + 1):
            seconds, outputs = [], []
            for change in (repad, unpad):
                change(model)
                start = time.process_time()
                with torch.no_grad():
                    outputs.append(model(ids, attention_mask=mask).last_hidden_state)
                seconds.append(time.process_time() - start)
            worst = max(worst, float(((outputs[0] - outputs[1]) * mask[..., None]).abs().max()))
            if repeat:  # the first is the warm-up
                ratios.append(seconds[0] / seconds[1])
        ideal, ratio = mask.numel() / int(mask.sum()), statistics.median(ratios)
        rows.append(
            {
                "spread of log length": spread,
                "padding fraction": 1 - 1 / ideal,
                "ideal ratio": ideal,
                "measured ratio": ratio,
                "share of ideal": ratio / ideal,
                "largest difference": worst,
            }
        )
    return pd.DataFrame(rows)


def unpadded_figure(table: pd.DataFrame) -> go.Figure:
    """Measured and ideal speed-up of unpadded execution against the padding fraction."""
    fig = figures.figure(
        "Unpadded BERT against padded, measured on this CPU",
        x="padding fraction",
        y="speed-up (padded time / unpadded time)",
    )
    ordered = table.sort_values("padding fraction")
    figures.line(fig, ordered["padding fraction"], ordered["ideal ratio"], "ideal: padded / valid tokens")
    figures.line(fig, ordered["padding fraction"], ordered["measured ratio"], "measured")
    return fig
