"""Numbers that are not finite. Kind (faults 14, 19, 20, 30, 45): NaN and infinity are found where they arise,
by layer, batch and quantity, before the long computation where they can be seen; no search meets them.
"""

from __future__ import annotations

import math
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from workbench.curvature.studies.batch_size_theory import largest_rate
from workbench.curvature.studies.sharpness import stability_limit
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.quantization.rounding.feedback import linear_feedback
from workbench.subjects import finite

SIZES = {"train": 640, "calibration": 64, "validation": 32, "test": 32}
FACTORS = {"huge": 1e30, "overflow": 1e12, "zero": 0.0}
SMALL = {"steps": 4, "examples": 64, "gradients": 32, "products": 4, "probes": 1, "predict_examples": 8}
INSTRUMENTS = [name for name, cls in workbench.catalog().items() if cls.on == "subject"]


def made(kind="", dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    data = {
        split: {"inputs": torch.randn(size, 8), "labels": torch.randint(4, (size,))}
        for split, size in SIZES.items()
    }
    with torch.no_grad():
        if kind in ("nan", "inf"):
            module[2].weight[3, 4] = float(kind)
        if kind == "input":
            data["calibration"]["inputs"][50, 2] = math.nan
        if kind in FACTORS:
            for weight in module.parameters():
                weight.mul_(FACTORS[kind])
    data = {
        s: {k: v.to(dtype) if v.is_floating_point() else v for k, v in c.items()} for s, c in data.items()
    }
    return workbench.subject(module.to(dtype), data=data)


@pytest.fixture(autouse=True)
def bounded():
    """What hangs fails."""

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_instrument_names_what_is_not_finite(name, cache):
    cls = workbench.catalog()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        instrument = cls()
    for kind, told in (
        ("nan", "weight '2.weight' holds nan or inf (1 NaN of 256 values)"),
        ("inf", "weight '2.weight' holds nan or inf (1 infinite of 256 values)"),
        (
            "input",
            "column 'inputs' of the split 'calibration' holds nan or inf (1 NaN of 512 values, first in ",
        ),
    ):
        with pytest.raises(BadInput) as error:
            instrument.run(made(kind), Progress())
        assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    (
        "error-anatomy gradient-noise layer-sensitivity prune quadratic-prediction quantize sharpness "
        "spectrum trace train-quantized weight-spectrum"
    ).split(),
)
def test_weights_that_are_all_zero_are_no_traceback(name):
    """Fault 45: 20 of 396 subjects with NaN, zero or huge weights ended in a traceback."""
    cls = workbench.catalog()[name]
    small = {name: size for name, size in SMALL.items() if name in cls.model_fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert len(cls(**small).run(made("zero"), Progress(), cache=False).table)
        except BadInput as error:
            assert "\n" not in str(error)


def test_activations_that_overflow_are_named_before_anything_is_computed():
    with pytest.raises(BadInput, match=r"in batch 0 of the split 'train': the output of '2' \(Linear\)"):
        workbench.curvature.Trace().run(made("huge"), Progress())


@pytest.mark.parametrize(
    ("instrument", "told"),
    [
        (workbench.curvature.Trace(), "the second derivative of '2.bias'"),
        (workbench.curvature.Spectrum(), "the second derivative of '2.bias'"),
        (Quantize(rounding="gptq"), "the second moment of the inputs of layer '4'"),
        (Prune(method="sparsegpt"), "the second moment of the inputs of layer '4'"),
        (Prune(), "the gradients of layer '0'"),
    ],
)
def test_a_quantity_that_overflows_later_is_named(instrument, told):
    """Weights, activations, loss and gradient are finite; what is computed from them is not."""
    with pytest.raises(BadInput) as error:
        instrument.run(made("overflow"), Progress())
    assert told in str(error.value)


def test_gradients_of_a_root_at_zero_are_named():
    """Two more of the kind: a derivative that is infinite where the loss is not, and NaN in a buffer."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, inputs):
            return (0 * self.inner(inputs)).square().sqrt()

    data = {"inputs": torch.randn(40, 4), "labels": torch.randint(3, (40,))}
    on = workbench.subject(Root(), data=data)
    told = finite.explanation(on)
    assert told is not None and "the gradient of 'inner.bias'" in told
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    normed[1].running_var[1] = math.nan
    with pytest.raises(BadInput, match=r"buffer '1.running_var' holds nan \(1 NaN of 3 values\)"):
        workbench.curvature.Trace().run(workbench.subject(normed, data=data), Progress())


def test_what_may_be_infinite_is_left_alone():
    """A buffer that masks with minus infinity, and a mask among the columns."""
    module = nn.Linear(4, 3)
    module.register_buffer("hidden", torch.full((2, 2), -math.inf).triu(1).nan_to_num(0, neginf=-math.inf))
    data = {
        "inputs": torch.randn(40, 4),
        "labels": torch.randint(3, (40,)),
        "additive_mask": torch.full((40, 2), -math.inf),
    }
    workbench.subject(module, data=data).check_finite()


def test_searches_have_an_end():
    with pytest.raises(BadInput, match="second moment of a layer's inputs is not finite"):
        linear_feedback(torch.full((4, 4), math.nan), 0.01)
    with pytest.raises(BadInput, match="not finite"):
        linear_feedback(torch.full((4, 4), math.inf), 0.01)
    with pytest.raises(BadInput, match="at any damping"):
        linear_feedback(torch.diag(torch.tensor([-1e30, 1.0])), 0.01)
    still = torch.ones(3)
    for guess in (math.inf, math.nan, 0.0):
        found = stability_limit(lambda d: d, still, guess, 0.0, 8)
        assert found == guess or math.isnan(guess)
        found = largest_rate(made(), "train", "sgd", guess, 8, 2, 1.0, 0, Progress())
        assert found == guess or math.isnan(guess)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "2:4"},
        {"saliency": "magnitude", "compensation": "bias"},
        {"saliency": "magnitude", "compensation": "least-squares"},
    ],
)
def test_a_module_of_any_precision_is_pruned(fields, dtype, cache):
    """Kind (fault 19): statistics are float32, the weights need not be."""
    found = Prune(**fields).run(made(dtype=dtype), Progress(), cache=False)
    assert {p.dtype for p in found.subject.model.parameters()} == {dtype}
    single = Prune(**fields).run(made(), Progress(), cache=False)
    assert found.facts["loss"] == pytest.approx(single.facts["loss"], abs=0.02)


@pytest.mark.parametrize("name", ["trace", "spectrum", "sharpness"])
def test_products_that_overflow_are_one_line(name: str, checkpoints: Any, cache: Path) -> None:
    """Kind: finite weights whose curvature is not end in a traceback, or in nan beside nan."""
    on = workbench.subject(checkpoints["llama"], data="random", max_length=8)
    with torch.no_grad():
        on.model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(BadInput, match="not finite|is inf|is nan"):
        workbench.catalog()[name]().run(on, Progress(), cache=False)
