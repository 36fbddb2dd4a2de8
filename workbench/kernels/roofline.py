"""Least possible time of an operation on a device: max(bytes / bandwidth, FLOPs / peak),
and how full a compiled kernel keeps it.

Williams, Waterman and Patterson (2009). Device figures are the manufacturer's published peaks (dense, without
sparsity); a time computed from them is a prediction and is labelled so wherever it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench import figures
from workbench.kernels import backend, check
from workbench.kernels.registry import Case


@dataclass(frozen=True)
class Device:
    """Published peaks: bandwidth in GB/s, arithmetic in TFLOP/s (TOP/s for int8); `capability` as in sm_90;
    SM limits per multiprocessor.
    """

    name: str
    capability: int
    bandwidth: float
    peaks: Mapping[str, float]
    shared_per_multiprocessor: int  # bytes
    source: str
    registers_per_multiprocessor: int = 65536
    warps_per_multiprocessor: int = 64


DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100-SXM4-80GB",
            80,
            2039,
            {"fp32": 19.5, "bf16": 312, "fp8": 312, "int8": 624},
            167936,
            "NVIDIA A100 datasheet (2022); no fp8 units: fp8 computes as bf16",
        ),
        Device(
            "H100-SXM5",
            90,
            3350,
            {"fp32": 67, "bf16": 989, "fp8": 1979, "int8": 1979},
            233472,
            "NVIDIA H100 datasheet (2023)",
        ),
        Device(
            "H200-SXM5",
            90,
            4800,
            {"fp32": 67, "bf16": 989, "fp8": 1979, "int8": 1979},
            233472,
            "NVIDIA H200 datasheet (2024)",
        ),
        Device(
            "B200-SXM",
            100,
            8000,
            {"fp32": 75, "bf16": 2250, "fp8": 4500, "int8": 4500},
            233472,
            "NVIDIA HGX B200 datasheet (2024)",
        ),
    )
}


def predicted_ms(case: Case, device: Device) -> float:
    """Least time in milliseconds: the larger of moving the bytes and doing the arithmetic.

    >>> from workbench.kernels.registry import Case
    >>> case = Case("copy", "1 GB", 1, bytes=4.8e9, flops=0, make=None)
    >>> predicted_ms(case, DEVICES["H200-SXM5"])
    1.0
    """
    return 1e3 * max(case.bytes / (device.bandwidth * 1e9), case.flops / (device.peaks[case.peak] * 1e12))


def occupancy(registers: int, shared: int, warps: int, device: Device) -> float:
    """Share of the multiprocessor's warp slots that blocks of `warps` warps can fill,
    by registers and shared memory.

    Registers are given out per warp in units of 256, shared memory per block with 1 KiB of the system's own.

    >>> occupancy(registers=64, shared=0, warps=4, device=DEVICES["H100-SXM5"])
    0.5
    """
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        device.warps_per_multiprocessor // warps,
        device.registers_per_multiprocessor // (per_warp * warps),
        device.shared_per_multiprocessor // (shared + 1024),
        32,
    )
    return blocks * warps / device.warps_per_multiprocessor


def roofline_table(cases: list[Case], device: Device) -> pd.DataFrame:
    """One row per operation and shape: bytes, FLOPs, intensity (FLOP per byte), what binds,
    predicted milliseconds.
    """
    rows = []
    for case in cases:
        memory = case.bytes / (device.bandwidth * 1e9)
        compute = case.flops / (device.peaks[case.peak] * 1e12)
        rows.append(
            {
                "operation": case.operation,
                "shape": case.shape,
                "size": case.size,
                "unit": case.peak,
                "bytes": case.bytes,
                "FLOPs": case.flops,
                "intensity": case.flops / case.bytes,
                "bound by": "memory" if memory >= compute else "arithmetic",
                "predicted ms": 1e3 * max(memory, compute),
                "device": device.name,
            }
        )
    return pd.DataFrame(rows)


def resource_table(device: Device) -> pd.DataFrame:
    """Compiled resources of every kernel configuration for the device's architecture,
    from the committed table, with occupancy.

    Registers and spilled bytes are per thread, shared memory in KiB per block,
    occupancy the share of warp slots filled.
    """
    rows = []
    for key, used in check.load_table()["kernels"].items():
        kernel, configuration, target = key.split("/")
        if target == f"sm_{device.capability}":
            rows.append(
                {
                    "kernel": kernel,
                    "configuration": configuration,
                    "registers": used["registers"],
                    "spilled bytes": used["spilled"],
                    "shared KiB": used["shared"] / 1024,
                    "warps": used["warps"],
                    "occupancy": occupancy(used["registers"], used["shared"], used["warps"], device),
                }
            )
    return pd.DataFrame(rows)


def measured_table() -> pd.DataFrame:
    """Every measurement that was committed, with the name of its GPU and the date;
    empty where no GPU was at hand.
    """
    rows = []
    for file in sorted(backend.DATA.glob("measured_*.json")):
        table = json.loads(file.read_text())
        rows += [{"device": table["device"], "date": table["date"], **row} for row in table["rows"]]
    columns = [
        "device",
        "date",
        "operation",
        "shape",
        "triton_ms",
        "torch_ms",
        "comparator",
        "speedup",
        "bandwidth_share",
        "tflops",
    ]
    return pd.DataFrame(rows, columns=columns)


def roofline_figure(table: pd.DataFrame, device: Device, measured: pd.DataFrame | None = None) -> go.Figure:
    """Attainable arithmetic against intensity: the device's roofs, each operation at its prediction,
    measurements where there are any.
    """
    fig = figures.figure(
        f"Predicted roofline, {device.name}: published peaks, nothing measured"
        if measured is None or measured.empty
        else f"Roofline, {device.name}",
        x="intensity (FLOP per byte)",
        y="arithmetic (TFLOP/s or TOP/s)",
        xaxis_type="log",
        yaxis_type="log",
        height=560,
    )
    reach = np.geomspace(0.05, 1e5, 60)
    for unit in dict.fromkeys(table["unit"]):
        roof = np.minimum(reach * device.bandwidth / 1e3, device.peaks[unit])
        figures.line(fig, reach, roof, f"{unit} roof", mode="lines")
    shown = table[table["FLOPs"] > 0]
    for operation, part in shown.groupby("operation", sort=False):
        figures.line(
            fig,
            part["intensity"],
            part["FLOPs"] / part["predicted ms"] / 1e9,
            f"{operation} (predicted)",
            mode="markers",
            text=part["shape"],
        )
    if measured is not None and not measured.empty:
        both = measured.merge(table[["operation", "shape", "intensity"]], on=["operation", "shape"])
        figures.line(
            fig,
            both["intensity"],
            both["tflops"],
            f"measured on {both['device'].iloc[0]}",
            mode="markers",
            text=both["shape"],
        )
    return fig
