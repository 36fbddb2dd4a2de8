"""Format x granularity x rounding on the six small random architectures:
each combination runs, or is refused with a reason.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Quantize
from workbench.quantization.quantized_layer import moments_for
from workbench.quantization.rounding.feedback import Factors
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.rounding_order import Source, round_layer

FORMATS: list[dict[str, object]] = [
    {"format": "int2"},
    {"format": "int4"},
    {"format": "int8"},
    {"format": "uint3"},
    {"format": "e4m3fn"},
    {"format": "e5m2"},
    {"format": "e3m2"},
    {"format": "e2m3"},
    {"format": "e2m1"},
    {"format": "bf16"},
    {"format": "fp16"},
    {"format": "nf4"},
    {"format": "quantile3"},
    {"format": "mxfp4"},
    {"format": "mxfp6"},
    {"format": "mxfp8"},
    {"format": "nvfp4"},
    {"format": "fixed8.6"},
    {"format": "ternary"},
    {"format": "binary"},
]
GRANULARITIES = ("auto", "tensor", "channel", "group")
#: What is refused, and the word the message must hold; everything else must run.
REFUSED = {
    "adaround": lambda f: not f.uniform,
    "lowrank-adaround": lambda f: not f.uniform,
    "hqq": lambda f: not f.affine,
    **{name: (lambda f: f.scale != "real") for name in ("flexround", "signround", "adaquant", "scales")},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_combination_runs_or_says_why_not(checkpoints: dict[str, Path], architecture: str) -> None:
    on = workbench.subject(checkpoints[architecture], data="random")
    layer = on.layers("blocks")[0]
    moments = moments_for(on, [layer], 4, Progress())[layer.name]
    factors, ran, refused = Factors(), 0, 0
    for fields, granularity, rounding in itertools.product(FORMATS, GRANULARITIES, ROUNDING):
        instrument = Quantize(
            **(
                fields
                | {
                    "layers": layer.name,
                    "granularity": granularity,
                    "rounding": rounding,
                    "group_size": 16,
                    "calibration_examples": 4,
                    **({"rounding.steps": 2} if rounding in ROUNDING.with_trait("learned") else {}),
                }
            )
        )
        format = instrument.format_for(layer.name)
        reason = "granularity" if format.block and granularity != "auto" else ""
        reason = "rounding" if REFUSED.get(rounding, lambda f: False)(format) else reason
        if reason:
            with pytest.raises(BadInput, match=f"^{reason}: .*{'' if reason == 'granularity' else rounding}"):
                instrument.check(on)
            refused += 1
            continue
        instrument.check(on)
        source = Source(moments, torch.Generator().manual_seed(0), factors)
        values, grid, _ = round_layer(instrument, layer, source)
        assert values.shape == layer.shape and bool(torch.isfinite(values).all()), (
            fields,
            granularity,
            rounding,
        )
        # What was returned is on the grid that was returned.
        assert torch.allclose(grid.round(values), values, atol=1e-5 * float(values.abs().max())), (
            fields,
            granularity,
            rounding,
        )
        ran += 1
    assert ran + refused == len(FORMATS) * len(GRANULARITIES) * len(ROUNDING.entries)
