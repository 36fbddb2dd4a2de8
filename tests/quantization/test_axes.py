"""The axes of quantization: a user's own entries, options by their dotted names, old names, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from workbench.axis import AXES, Axis, Choice, Options, axis_of, parameter
from workbench.errors import BadInput
from workbench.progress import Progress
from workbench.quantization import Allocate, LayerSensitivity, Quantize, Rotate, TrainQuantized, named
from workbench.quantization.number.formats import Codebook, Format
from workbench.quantization.number.grid import Grid
from workbench.quantization.number.number_format import NUMBER_FORMAT
from workbench.quantization.number.split_grid import SALIENT, Wide
from workbench.quantization.rounding.problem import Problem
from workbench.quantization.rounding.rounding import ROUNDING
from workbench.quantization.trained.settings import TRAINED_ROUNDING
from workbench.quantization.trained.trained_rounding import MeanScaled
from workbench.quantization.transform.coordinates import Transform
from workbench.quantization.transform.transform import TRANSFORM

#: Axes of training have a test of their own.
TRAINING = ("optimizer", "learning-rate-schedule", "precision")
FIELDS = [
    (instrument, name, entry)
    for instrument in (Quantize, LayerSensitivity, Allocate, Rotate, TrainQuantized)
    for name, info in instrument.model_fields.items()
    if (home := axis_of(info)) is not None and home.kind not in TRAINING
    for entry in home
]
SMALL = {"calibration_examples": 4, "predict_examples": 0, "test_examples": 4, "group_size": 16}


def another(value: Any) -> Any:
    """A value that an option with this one also takes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value < 8 else value - 1
    return value * 1.05 if isinstance(value, float) else value


def option_paths(options: Options) -> Iterator[tuple[str, Any]]:
    for name, value in options:
        yield name, value
        if isinstance(value, Choice):
            yield from ((f"{name}.{inner}", found) for inner, found in option_paths(value.options))


@pytest.mark.parametrize(("instrument", "field", "entry"), FIELDS)
def test_every_option_is_set_by_its_dotted_name(instrument: Any, field: str, entry: str) -> None:
    home = axis_of(instrument.model_fields[field])
    assert home is not None
    options = dict(option_paths(home.chosen(entry).options))
    for path, value in options.items():
        if path.endswith("full") and not options[path.replace("full", "symmetric")]:
            with pytest.raises(BadInput, match="full: .*zero point"):
                instrument(**{field: entry, f"{field}.{path}": False})
            continue
        changed = another(value)
        made = instrument(**{field: entry, f"{field}.{path}": changed})
        found = getattr(made, field)
        for part in path.split("."):
            found = getattr(found.options, part)
        assert found == changed
        assert instrument(**made.model_dump(mode="json")) == made
        assert getattr(made.with_fields(seed=3), field) == getattr(made, field)


@pytest.mark.parametrize(("instrument", "field", "entry"), FIELDS)
def test_an_option_of_another_entry_is_refused(instrument: Any, field: str, entry: str) -> None:
    home = axis_of(instrument.model_fields[field])
    assert home is not None
    mine = set(home[entry].options.model_fields)
    for other in {name for e in home.entries.values() for name in e.options.model_fields} - mine:
        with pytest.raises(BadInput, match=rf"{field}\.{other}: {entry} has no such option"):
            instrument(**{field: entry, f"{field}.{other}": 1})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"bits": 3, "symmetric": False}, {"format": "uint3"}),
        ({"format": "nf4", "bits": 3}, {"format": "nf4"}),
        ({"format": "int6", "bits": 3}, {"format": "int6"}),
        ({"format": "int", "bits": 5}, {"format": {"name": "int", "bits": 5}}),
        (
            {"rounding": "gptq", "damp": 0.2},
            {"rounding": "gptq", "rounding.damp": 0.2, "sequential_damp": 0.2},
        ),
        (
            {"window": 2, "objective": "block", "rounding": "flexround", "steps": 9},
            {
                "rounding": "flexround",
                "rounding.steps": 9,
                "rounding.objective": "block",
                "rounding.objective.window": 2,
            },
        ),
        (
            {"activations": "token", "activation_format": "int", "activation_bits": 5},
            {"activations": "token", "activations.format": "uint5"},
        ),
        ({"activations": "none", "activation_bits": 5}, {}),
        ({"objective": "layer", "window": 1}, {}),
        (
            {"salient_share": 0.2, "salient_bits": 5},
            {"salient": {"name": "columns", "share": 0.2, "bits": 5}},
        ),
        (
            {"salient_share": 0.2, "salient_pattern": "weights"},
            {"salient": {"name": "weights", "share": 0.2}},
        ),
        ({"salient_share": 0.0}, {}),
        ({"adapter_rank": 4}, {"adapter": {"name": "loftq", "rank": 4}}),
        ({"adapter_rank": 4, "adapter_steps": 0}, {"adapter": {"name": "qlora", "rank": 4}}),
        ({"adapter_rank": 0, "adapter_steps": 3}, {}),
        ({"transform": "smooth", "alpha": 0.7}, {"transform": {"name": "smooth", "alpha": 0.7}}),
        ({"examples": 9}, {"calibration_examples": 9}),
    ],
)
def test_names_of_one_release_ago_mean_what_they_meant(old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(FutureWarning):
        made = Quantize(**old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made == Quantize(**new)
    with warnings.catch_warnings():  # what was given by an old name is kept by a copy
        warnings.simplefilter("ignore")
        assert made.with_fields(seed=1).format == made.format


@pytest.mark.parametrize(
    ("text", "entry", "options"),
    [
        ("int4", "int", {"bits": 4, "symmetric": True}),
        ("uint3", "int", {"bits": 3, "symmetric": False}),
        ("e3m4", "ExMy", {"exponent": 3, "mantissa": 4}),
        ("e4m3fn", "e4m3fn", {}),
        ("e4m2ieee", "ExMy", {"exponent": 4, "mantissa": 2, "special": "ieee"}),
        ("fixed8.4", "fixed", {"width": 8, "fraction": 4}),
        ("nf3", "nf", {"bits": 3}),
        ("quantile3", "quantile", {"bits": 3}),
        ("mxfp4", "mxfp4", {}),
    ],
)
def test_a_text_stands_for_a_format_and_its_options(text: str, entry: str, options: dict[str, Any]) -> None:
    chosen = Quantize(format=text).format
    assert chosen == text and chosen.name == entry and chosen().name == named(text).name == text
    assert chosen == NUMBER_FORMAT.chosen({"name": entry, **options})
    assert Quantize(**Quantize(format=text).model_dump(mode="json")).format == chosen


def test_an_old_name_beside_a_new_option_is_heard() -> None:
    with pytest.warns(FutureWarning, match=r"format\.bits"):
        assert Quantize(bits=3, **{"format.full": False}).format == "int3-odd"


@pytest.fixture
def own() -> Iterator[None]:
    """What is registered in a test is taken off again."""
    before = {kind: dict(home.entries) for kind, home in AXES.items()}
    yield
    for kind, entries in before.items():
        home: Axis = AXES[kind]
        home.entries.clear()
        home.entries.update(entries)


class Twice(Options):
    factor: float = parameter(2.0, "of the steps", gt=0)


def test_a_users_own_entries_work_in_quantize(
    own: None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    @ROUNDING.add("downwards", formula="s floor(w / s)", source="a test", traits="any grid")
    def downwards(problem: Problem, options: Options) -> tuple[Tensor, Grid]:
        grid = problem.grid()
        scale, _ = grid.columns(problem.weight.shape[1])
        element = grid.format.element
        whole = torch.floor(problem.weight / scale).clamp(element.lowest, element.highest)
        return problem.masked(whole * scale), grid

    @TRANSFORM.add("stretched", formula="T = f I", source="a test", options=Twice)
    def stretched(problem: Problem, options: Twice) -> Transform:
        return Transform(scale=torch.full((problem.weight.shape[1],), options.factor))

    @NUMBER_FORMAT.add("thirds", formula="{-1, -1/3, 1/3, 1}", source="a test")
    def thirds(options: Options) -> Format:
        return Format("thirds", Codebook(2, (-1.0, -1 / 3, 1 / 3, 1.0)))

    @SALIENT.add("first", formula="-j", source="a test", options=Wide)
    def first(weight: Tensor, gram: Tensor, options: Wide) -> Tensor:
        return -torch.arange(weight.shape[1], dtype=weight.dtype)[None]

    on = workbench.subject(checkpoints["bert"], data="random")
    made = Quantize(
        **SMALL,
        **{"rounding": "downwards", "format": "int4-odd", "transform": "stretched", "transform.factor": 4.0},
    ).run(on, Progress(), cache=False)
    assert made.subject is not None
    for before, after in zip(on.layers(), made.subject.layers(), strict=True):
        scale = after.changes[0].grid.columns(after.shape[-1])[0]
        assert (after.weight <= before.weight + 1e-3).all()  # a stored scale has 16 bits
        units = after.weight * 4 / scale
        assert torch.allclose(units, units.round(), atol=1e-3)
    books = Quantize(**SMALL, format="thirds", salient={"name": "first", "share": 0.25}).run(
        on, Progress(), cache=False
    )
    books.save(tmp_path / "out")
    assert books.subject is not None
    mask = books.subject.layers()[0].changes[0].mask
    assert torch.equal(mask[0].nonzero().flatten(), torch.arange(int(mask.sum())))
    again = workbench.subject(tmp_path / "out")
    assert torch.equal(again.layers()[0].weight, books.subject.layers()[0].weight)


def test_a_users_own_trained_rounding(own: None) -> None:
    TRAINED_ROUNDING.add(
        "ternary-again",
        formula="as ternary",
        source="a test",
        options=TRAINED_ROUNDING["ternary"].options,
    )(TernaryAgain)
    on = workbench.subject("digits-vit")
    result = TrainQuantized(
        method="ternary-again", layers="*.0.*", steps=2, batch_size=8, test_examples=16
    ).run(on, Progress(), cache=False)
    assert result.subject is not None
    for layer in result.subject.layers("*.0.*"):
        assert len(torch.unique(layer.weight[0])) <= 3


class TernaryAgain(MeanScaled):
    """Ternary under another name."""

    @classmethod
    def begin(cls, weight: Tensor, group: int, settings: Any) -> MeanScaled:
        return cls(torch.ones(()), format="ternary", group=group)


def test_a_learned_choice_for_blocks_is_refused_where_layers_are_taken_alone() -> None:
    on = workbench.subject("digits-vit")
    fields = {"rounding": "adaround", "rounding.objective": "block"}
    for instrument in (LayerSensitivity, Allocate):
        with pytest.raises(BadInput, match="rounding.objective: 'block'"):
            instrument(**fields).check(on)
