"""Kind (faults 13 and 50): an option that is ignored or changed is refused, or it is said that it has no
effect; none is dropped in silence.
"""

from __future__ import annotations

import warnings

import pandas as pd
import pytest

import workbench
from workbench.axis import parameter
from workbench.errors import BadInput, Notice
from workbench.instruments import SubjectInstrument
from workbench.progress import Progress
from workbench.pruning import Prune
from workbench.quantization import Quantize
from workbench.training import Train


class Tried(SubjectInstrument):
    """An option that another one switches on."""

    learning_rates: bool = parameter(False)
    training_steps: int = parameter(60, only_with="learning_rates")

    def _run(self, on, progress):
        return self.result(pd.DataFrame({"x": [1.0]}), {})


@pytest.fixture(scope="module")
def vit():
    return workbench.subject("digits-vit")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bits": 8, "format": "nf4"}, "format.bits: has no effect with format nf4"),
        ({"act_order": True}, "act_order: has no effect with rounding nearest"),
        ({"alpha": 0.3}, "alpha: has no effect with transform none"),
        ({"salient_bits": 8}, "salient.bits: has no effect with salient none"),
        ({"activation_bits": 4}, "activations.format.bits: has no effect with activations none"),
        ({"group_size": 20}, "group_size: 20 does not divide the 48 inputs of vit.layers.0.attention.q_proj"),
        ({"group_size": 16, "granularity": "channel"}, "group_size: has no effect with format int4"),
        ({"group_size": 16, "format": "mxfp4"}, "group_size: has no effect with format mxfp4"),
        ({"sequential_damp": 0.1}, "sequential_damp: has no effect without sequential"),
        ({"sequential_damp": 0.1, "sequential": True}, "sequential_damp: has no effect without sequential"),
        ({"target": "outputs", "sequential": False}, "target: has no effect without sequential"),
        ({"within": True, "sequential": False}, "within: has no effect without sequential"),
    ],
)
def test_an_option_that_does_nothing_says_so(vit, fields, told):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Quantize(**fields).check(vit)
    assert any(told in str(warning.message) for warning in said)


@pytest.mark.parametrize("fields", [{}, {"group_size": 16}, {"format": "int4", "format.bits": 4}])
def test_options_that_count_say_nothing(vit, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quantize(**fields).check(vit)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "nf4", "format.bits": 8},
        {"format": {"name": "nf4", "bits": 8}},
        {"format": "int4", "format.bits": 8},
        {"format": "e4m3", "format.mantissa": 2},
    ],
)
def test_an_option_that_contradicts_a_name_is_refused(fields):
    """nf4 of 8 bits was nf8, under the name nf4."""
    with pytest.raises(BadInput, match=r"contradicts format (nf4|int4|e4m3), which says [34]"):
        Quantize(**fields)
    assert Quantize(**{"format.bits": 3}).format == "int3"


@pytest.mark.parametrize(
    ("instrument", "fields", "told"),
    [
        ("prune", {"pattern": "2:4", "allocation": "row"}, "allocation: has no effect with pattern 2:4"),
        ("sharpness", {"bisect_steps": 30}, "bisect_steps: has no effect without bisect"),
        ("quadratic-prediction", {"sparsity": 0.3}, "sparsity: has no effect without change prune"),
        ("quadratic-prediction", {"bits": 8, "change": "prune"}, "bits: has no effect without change round"),
        ("train-quantized", {"temperature": 2.0}, "temperature: has no effect without distillation"),
        ("train-quantized", {"reset_optimizer": True}, "reset_optimizer: has no effect without switch_at"),
        (
            "trace",
            {"diagonal": True, "method": "xtrace"},
            "diagonal: has no effect without method hutchinson",
        ),
        ("batch-size-theory", {"training_steps": 90}, "training_steps: has no effect without learning_rates"),
        ("scaling-fit", {"against": ("kaplan",), "checks": False}, "against: has no effect without checks"),
        ("scaling-plan", {"utilisation": 0.5}, "utilisation: has no effect without gpu_hours or money"),
    ],
)
def test_an_option_that_nothing_reads_says_so(instrument, fields, told):
    """Examples of the kind that were not listed, of the other instruments."""
    cls = workbench.catalog()[instrument]
    assert [line for line in cls(**fields).idle() if line.startswith(told)]
    assert not list(cls().idle()) and not list(cls(**cls().model_dump(mode="json")).idle())


def test_what_nothing_reads_is_said_when_it_is_run(vit, cache):
    with pytest.warns(Notice, match="training_steps: has no effect without learning_rates"):
        Tried(training_steps=3).run(vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        Tried(training_steps=3, learning_rates=True).run(vit)


@pytest.mark.parametrize("fields", [{"pattern": "2:8", "sparsity": 0.5}, {"pattern": "1:4", "sparsity": 0.5}])
def test_a_sparsity_that_a_pattern_does_not_have_is_refused(vit, fields):
    with pytest.raises(BadInput, match="contradicts pattern"):
        Prune(**fields).run(vit, Progress())
    assert Prune(pattern="2:8").sparsity == 0.75


def test_a_schedule_is_the_one_that_was_asked_for(vit):
    rates = {
        name: tuple(Train(schedule=name, steps=4).run(vit, Progress(), cache=False).table.lr)
        for name in ("uba", "cosine")
    }
    assert rates["uba"] != rates["cosine"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (Quantize(calibration_examples=10**9), "calibration_examples: 1000000000 are asked for"),
        (Quantize(test_examples=10**6), "test_examples: 1000000 are asked for"),
        (Prune(calibration_examples=400, calibration_split="validation"), "the split validation has 359"),
    ],
)
def test_more_examples_than_there_are_is_said(made, told):
    """Kind: a number was asked for, a smaller one was used, and nothing said so."""
    (line,) = made.asks_beyond(workbench.subject("digits-vit"))
    assert told in line and line.endswith("these are taken")
    assert not list(type(made)().asks_beyond(workbench.subject("digits-vit")))
