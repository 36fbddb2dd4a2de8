"""Kind (fault 46): what a run has made is gone when it has ended."""

from __future__ import annotations

import gc

import pytest
import torch

import workbench
from workbench.curvature import Spectrum, TopEigenvalues, Trace
from workbench.progress import Progress


def tensors():
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


@pytest.mark.parametrize(
    "instrument",
    [Spectrum(probes=1, steps=3, examples=32), Trace(examples=32), TopEigenvalues(examples=32, count=1)],
)
def test_a_run_keeps_no_tensor(instrument):
    """Each uncached run kept the graph that it weighs: 115 tensors."""
    on = workbench.subject("digits-vit")
    counts = []
    for _ in range(3):
        instrument.run(on, Progress(), cache=False)
        counts.append(tensors())
    assert counts[2] <= counts[1]
