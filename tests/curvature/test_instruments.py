"""The curvature instruments on stock classes, from Python and the command line; partial results;
clear errors first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from tests.conftest import ARCHITECTURES
from tests.curvature.small import mlp, stock
from workbench import curvature
from workbench.cli import main
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.subjects import Mask, Subject

SMALL: dict[str, Instrument] = {
    "spectrum": curvature.Spectrum(probes=2, steps=6, examples=4, batch_size=2),
    "trace": curvature.Trace(products=4, examples=4, batch_size=4),
    "top-eigenvalues": curvature.TopEigenvalues(
        count=1, examples=4, batch_size=4, tolerance=0.05, verify=False
    ),
    "sharpness": curvature.Sharpness(examples=4, batch_size=2, tolerance=0.05),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instrument_runs_on_every_stock_class(architecture: str) -> None:
    subject = stock(architecture)
    before = subject.fingerprint
    tops = []
    for name, instrument in SMALL.items():
        result = instrument.run(subject, cache=False)
        assert not result.partial and len(result.table) and len(result.figure().data), name
        assert all(
            math.isfinite(v) for v in result.facts.values() if isinstance(v, float) and v != math.inf
        ), (name, result.facts)
        assert result.summary()
        tops.append(result.facts.get("top_eigenvalue"))
    assert tops[2] == pytest.approx(tops[3], rel=0.1)
    weights = curvature.WeightSpectrum().run(subject, cache=False)
    assert len(weights.table) == sum(max(1, math.prod(layer.shape[:-2])) for layer in subject.layers())
    assert subject.fingerprint == before


def test_the_command_line_runs_them_on_a_checkpoint(
    checkpoints: dict[str, Path], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "run",
        "spectrum",
        "--subject",
        str(checkpoints["gpt2"]),
        "--data",
        "random",
        "--probes",
        "2",
        "--steps",
        "5",
        "--examples",
        "2",
        "--layers",
        "blocks",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    saved = Result.load(out)
    assert saved.facts["parameters"] == 2 * 12 * 32 * 32  # attention 4, MLP 8 times width squared, two blocks
    assert saved.facts["mass"] == pytest.approx(1, abs=1e-3) and len(saved.figure().data) >= 2
    assert (
        main(
            [
                *arguments[:2],
                "--subject",
                str(checkpoints["gpt2"]),
                "--data",
                "random",
                "--layers",
                "nothing*",
            ]
        )
        == 2
    )
    assert "nothing*" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_command_line_runs_all_four_on_every_stock_class(
    architecture: str, checkpoints: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    for name, instrument in SMALL.items():
        options = [
            part
            for field, value in instrument.model_dump(exclude_unset=True).items()
            for part in (f"--{field.replace('_', '-')}", str(value))
        ]
        assert (
            main(
                [
                    "run",
                    name,
                    "--subject",
                    str(checkpoints[architecture]),
                    "--data",
                    "random",
                    *options,
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
        saved = Result.load(tmp_path / name)
        assert not saved.partial and len(saved.table) and len(saved.figure().data), name


def test_digits_spectrum_meets_the_published_hessian(cache: Path) -> None:
    subject = workbench.subject("digits-softmax")
    result = curvature.Spectrum(split="all", examples=1797, batch_size=1797).run(subject)
    assert result.facts["top_eigenvalue"] == pytest.approx(1.0455299687, abs=1e-4)
    assert result.facts["mass"] == pytest.approx(1, abs=1e-3)
    assert abs(result.facts["trace"] - 13.5127791110) < 2 * result.facts["trace_standard_error"]
    assert result.tables["outliers"]["eigenvalue"].iloc[0] == pytest.approx(1.0455299687, abs=1e-4)
    assert result.tables["layers"]["trace"].sum() == pytest.approx(result.facts["trace"], rel=1e-5)
    again = curvature.Spectrum(split="all", examples=1797, batch_size=1797).run(subject)
    assert again.facts == pytest.approx(result.facts, nan_ok=True) and again.table.equals(result.table)
    for view in ({}, {"show": "layers"}, {"axis": "signed log"}):
        assert len(again.figure(**view).data)


def test_spectrum_does_not_depend_on_micro_batches_and_shows_batch_noise() -> None:
    subject = mlp(examples=24)
    results = [
        curvature.Spectrum(probes=3, steps=20, batch_size=b, dtype="float64").run(subject, cache=False)
        for b in (5, 24)
    ]
    assert np.allclose(results[0].table.to_numpy(), results[1].table.to_numpy(), rtol=1e-6, atol=1e-9)
    assert results[0].facts["item_noise"] > 0 and "item_noise" not in results[1].facts
    view = results[0].view_model()
    assert "batch" in view.model_fields and "batch" not in results[1].view_model().model_fields
    marks = [trace.name for trace in results[0].figure(batch=6).data]
    assert any(name and "B=6" in name for name in marks)


def test_per_layer_spectra_are_those_of_the_blocks() -> None:
    subject = mlp()
    result = curvature.Spectrum(probes=2, steps=60, per_layer=True, dtype="float64").run(subject, cache=False)
    rows = result.tables["layers"].set_index("layer")
    for name in ("0.weight", "3.weight"):
        exact = curvature.TopEigenvalues(layers=name, count=1, dtype="float64", tolerance=1e-8).run(
            subject, cache=False
        )
        assert rows.loc[name, "top_eigenvalue"] == pytest.approx(exact.facts["top_eigenvalue"], rel=1e-6)
        fig = result.figure(layer=name)
        assert name in fig.layout.title.text


def test_pruned_weights_have_curvature_too() -> None:
    subject = mlp(loss="squared_error", widths=(5, 3))
    dense = curvature.Trace(layers="*", products=64, dtype="float64").run(subject, cache=False).facts["trace"]
    layer = subject.layers("*")[0]
    layer.attach(Mask(torch.rand(layer.shape) > 0.5))
    pruned = (
        curvature.Trace(layers="*", products=64, dtype="float64").run(subject, cache=False).facts["trace"]
    )
    assert pruned == pytest.approx(
        dense, rel=1e-12
    )  # a linear model's Gauss-Newton matrix does not depend on its weights


class StopAfter(Progress):
    """Stop once `count` units were reported, keeping every preview."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count
        self.seen: list[tuple[bool, int, float | None]] = []

    def show(self, label: str, done: int, total: int | None) -> None:
        self.left -= 1
        if self.left <= 0:
            self.stop.set()

    def preview(self, result: Result) -> None:
        self.seen.append((result.partial, len(result.figure().data), result.facts.get("trace")))


LONG: list[Instrument] = [
    curvature.Spectrum(steps=40, examples=24, batch_size=3),
    curvature.Trace(products=64, examples=24),
    curvature.Trace(method="xtrace", products=64, interval=1e-6, examples=24),
    curvature.TopEigenvalues(examples=24),
    curvature.Sharpness(examples=24, bisect=True),
    curvature.QuadraticPrediction(layers="*", examples=24),
    curvature.WeightSpectrum(layers="*"),
]


@pytest.mark.parametrize("instrument", LONG, ids=lambda i: i.name())
@pytest.mark.parametrize("units", [1, 2, 4])
def test_a_stop_keeps_the_estimate_so_far(instrument: Instrument, units: int) -> None:
    deep = mlp(examples=24, widths=(5, 4, 4, 4, 4, 4, 3))
    result = instrument.run(deep, progress=StopAfter(units), cache=False)
    assert result.partial and "partial" in result.summary()
    result.figure()


def test_the_density_refines_while_it_runs() -> None:
    progress = StopAfter(10_000)
    result = curvature.Spectrum(probes=4, steps=12, batch_size=24).run(mlp(), progress=progress, cache=False)
    assert len(progress.seen) == 12 and all(partial and traces for partial, traces, _ in progress.seen)
    assert not result.partial and progress.seen[-1][2] == pytest.approx(result.facts["trace"])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(layers="missing*"), "missing"),
        (dict(split="dev"), "dev"),
        (dict(probes=0), "probes"),
        (dict(operator="kfac"), "operator"),
        (dict(prob=3), "probes"),
        (dict(dtype="float16"), "dtype"),
    ],
)
def test_bad_fields_are_one_clear_line(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as error:
        curvature.Spectrum(**fields).run(mlp(), cache=False)
    assert "\n" not in str(error.value)


def test_limits_from_curvature_agree_with_bisection(cache: Path) -> None:
    """On an exactly known Hessian 2/lambda is the stability limit of gradient descent;
    the preconditioned one that of Adam.
    """
    result = curvature.Sharpness(
        split="all", examples=1797, batch_size=600, bisect=True, dtype="float64"
    ).run(workbench.subject("digits-softmax"))
    assert result.facts["sgd_limit"] == pytest.approx(2 / 1.0455299687, rel=1e-3)
    assert result.facts["sgd_limit_measured"] == pytest.approx(result.facts["sgd_limit"], rel=0.03)
    assert result.facts["adam_limit_measured"] == pytest.approx(result.facts["adam_limit"], rel=0.05)
    assert result.facts["rise_at_radius"] == pytest.approx(result.facts["rise_predicted"], rel=1e-2)


def test_prediction_of_a_quadratic_loss_holds_at_every_scale() -> None:
    subject: Subject = mlp(loss="squared_error", widths=(6, 3))
    for change in ("round", "prune"):
        result = curvature.QuadraticPrediction(layers="*", change=change, dtype="float64", bits=3).run(
            subject, cache=False
        )
        assert result.table["measured"].to_numpy() == pytest.approx(
            result.table["predicted"].to_numpy(), rel=1e-9
        )
        assert result.facts["joint_measured"] == pytest.approx(result.facts["joint_predicted"], rel=1e-9)
        assert (result.table["radius"] == math.inf).all() and result.facts["joint_radius"] == math.inf


def test_validity_radius_finds_where_a_quartic_leaves_its_parabola() -> None:
    """measured = s^2 + c s^4 is twice the prediction s^2 at s = 1 / sqrt(c)."""
    from workbench.curvature.studies.quadratic_prediction import validity_radius

    for c in (0.01, 0.7, 30.0):

        def quartic(s: float, c: float = c) -> float:
            return s**2 + c * s**4

        assert validity_radius(lambda s: s**2, quartic, 0.0) == pytest.approx(c**-0.5, rel=0.05)


def test_results_survive_saving(tmp_path: Path) -> None:
    for name, instrument in SMALL.items():
        result = instrument.run(mlp(), cache=False)
        result.save(tmp_path / name)
        back = Result.load(tmp_path / name)
        assert json.dumps(back.facts, default=str) == json.dumps(
            json.loads(json.dumps(result.facts, default=float)), default=str
        )
        assert len(back.figure().data) == len(result.figure().data)
