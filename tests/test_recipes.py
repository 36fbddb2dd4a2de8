"""Every published name is a door: each card's recipe is accepted, runs, and is no other card's.

A run is reduced to a few steps, examples and probes; what makes the method stays.
"""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import workbench
from workbench.axis import axes
from workbench.commands.listing import described
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.names import (
    Method,
    accepts,
    catalog,
    doors,
    entries_called,
    find,
    home_of,
    in_words,
    instruments_of,
    methods,
    recipe,
    tried_with,
)
from workbench.progress import Progress
from workbench.scaling import load_runs
from workbench.storage import cache_folder
from workbench.subjects import Subject
from workbench.subjects.loaders import builtin_names

CARDS = methods()
#: Cards that run in a second or two and between them go through every family.
QUICK = (
    "slq",
    "hutch++",
    "obert",
    "sparsegpt-2:4",
    "movement",
    "minitron",
    "pst",
    "gptq",
    "resq",
    "double-rounding",
    "ptq-or-qat",
    "uba",
    "agvm",
    "ghost-batch-norm",
    "concurrent-adversary",
    "self-tuning",
    "routed",
    "model-stock",
    "bitdelta",
    "stack",
)
MINILM = "minilm-docstrings"
#: Windows of a byte model's splits here: measuring one on all of them takes minutes.
WINDOWS = 8

STUDY = {"examples": 64, "evaluate_limit": 16, "learning_rate_points": 2, "workers": 1}
TRAINED = {"steps": 4, "batch_size": 8, "test_examples": 16}
#: Field of an instrument, or option of whatever is chosen for it -> a value that takes no time.
REDUCED: dict[str, dict[str, Any]] = {
    "spectrum": {"steps": 6, "probes": 2},
    "trace": {"products": 9},
    "batch-size-theory": {"examples": 64, "sizes": 2, "repeats": 2},
    "flatness": {"seeds": 1, "steps": 20, "probes": 2, "examples": 8},
    "quadratic-prediction": {"examples": 8, "radius": False},
    "prune": {
        "calibration_examples": 16,
        "predict_examples": 4,
        "method.gradients": 16,
        "saliency.gradients": 16,
        "sparsity_schedule.events": 2,
        "recovery.steps": 12,
        "recovery.batch_size": 4,
    },
    "train-sparse": {"steps": 10, "batch_size": 4, "calibration_examples": 8, "saliency.gradients": 8},
    "subtune": {"steps": 2, "most": 1},
    "quantize": {
        "calibration_examples": 8,
        "predict_examples": 4,
        "test_examples": 16,
        "rounding.steps": 4,
        "transform.steps": 4,
    },
    "rotate": {"calibration_examples": 8, "kind.steps": 2},
    "equalize": {"calibration_examples": 8, "kind.ratios": 4},
    "allocate": {
        "calibration_examples": 8,
        "predict_examples": 8,
        "test_examples": 16,
        "draws": 1,
        "sensitivity.probes": 2,
        "sensitivity.levels": 1,
    },
    "train-quantized": TRAINED,
    "ptq-or-qat": TRAINED | {"widths": [4], "calibration_examples": 8},
    "train": {"steps": 4},
    "self-tuning": {"rounds": 4, "warmup_rounds": 1, "batch_size": 8},
    "gradient-noise": {"groups": 8, "size": 4},
    "optimizer-comparison": STUDY | {"seeds": 1, "batch_size": 16},
    "learning-rate-batch-size": STUDY
    | {"batch_sizes": (4, 8, 16), "learning_rate_points": 3, "resamples": 20},
    "critical-batch": STUDY
    | {"target": 2.25, "steps": 30, "resamples": 20, "noise_groups": 4, "noise_size": 4},
    "scaling-fit": {"starts": 32, "resamples": 20, "checks": False},
    "merge": {
        "steps": 2,
        "validation_examples": 16,
        "test_examples": 16,
        "method.examples": 4,
        "method.probes": 1,
        "method.epochs": 1,
    },
    "delta": {"steps": 2, "calibration_examples": 8, "validation_examples": 16, "test_examples": 16}
    | {"method.steps": 2},
    "grow": {"test_examples": 16},
    "v-cycle": {"small_steps": 2, "validation_examples": 16},
}


def reduced(step: tuple[str, Mapping[str, Any]]) -> Instrument:
    name, fields = step
    made = find(name)(**fields)
    small = {}
    for field, value in REDUCED[name].items():
        head, _, option = field.partition(".")
        if not option or option in getattr(made, head).entry.options.model_fields:
            small[field] = value
    return made.with_fields(**small)


def run_reduced(card: Method, on: Any) -> Any:
    for step in card.recipe:
        result = reduced(step).run(on, Progress(), cache=False)
        on = result.subject
    return result


@functools.cache
def opened(name: str) -> Any:
    """A card's subject, or its table of runs."""
    if name not in builtin_names():
        return load_runs(name)
    on = workbench.subject(name)
    if not name.startswith("byte"):
        return on
    splits = {split: {k: v[:WINDOWS] for k, v in columns.items()} for split, columns in on.splits.items()}
    return Subject(on.name, on.model, on.task, splits, tokenizer=on.tokenizer, data_note=on.data_note)


@pytest.fixture(scope="module", autouse=True)
def no_old_names() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


@pytest.fixture(params=list(CARDS))
def card(request: pytest.FixtureRequest) -> Method:
    return CARDS[request.param]


def wanted(card: Method) -> Any:
    """The card's subject; the fine-tuned MiniLM only where somebody has it already."""
    if card.subject == MINILM and not list((cache_folder() / "subjects").glob(f"{MINILM}-*")):
        pytest.skip(f"{MINILM} was not fine-tuned on this machine yet")
    return opened(card.subject)


def test_there_are_cards_of_every_family():
    assert len(CARDS) >= 147
    assert set(QUICK) <= set(CARDS)


def test_every_recipe_is_built_of_todays_names(card: Method):
    assert card.recipe, f"{card.name} has no recipe"
    made = card.instruments()
    assert [each.name() for each in made] == [name for name, _ in card.recipe]
    for each, (_, fields) in zip(made, card.recipe, strict=True):
        assert all(accepts(type(each), field) for field in fields)
        assert {field.split(".")[0] for field in fields} == each.model_fields_set


def test_what_a_recipe_says_is_not_what_the_instrument_does_anyway(card: Method):
    if card.name in catalog():
        assert card.recipe == ((card.name, {}),), "a name stands for the instrument of this name"
        return
    assert any(each.model_dump() != type(each)().model_dump() for each in card.instruments())


def test_no_two_cards_have_one_recipe():
    cards = collections.defaultdict(list)
    for name, each in CARDS.items():
        cards[repr([(i.name(), i.model_dump(mode="json")) for i in each.instruments()])].append(name)
    assert [names for names in cards.values() if len(names) > 1] == []


def test_a_name_is_one_computation(card: Method):
    """Where an axis has an entry of the card's name, the recipe chooses it, in the instrument it is at home
    in; where an instrument has its name, the recipe is that instrument and no entry has it.
    """
    homes = [home for entry in entries_called(card.name) if (home := home_of(entry)) is not None]
    if card.name in catalog():
        assert homes == []
        return
    assert recipe(card.name) == card.recipe
    for instrument, field in homes:
        steps = [made for made in card.instruments() if made.name() == instrument]
        assert card.name in [getattr(step, field).name for step in steps], (instrument, field)


def test_every_entrys_name_runs_or_says_where_it_is_chosen():
    """Nothing that `list axes` prints leads nowhere."""
    silent = []
    for axis in axes().values():
        for name in axis:
            try:
                recipe(name)
            except BadInput as error:
                if "runs nothing by itself" not in str(error):
                    silent.append((axis.kind, name, str(error)))
    assert silent == []


def test_every_entry_is_accepted_as_show_says_it_is_run(checkpoints):
    """Kind: a command that the bench prints itself and then refuses. The three that are left go on with what
    another run has made, and say which.
    """
    subjects = [opened("digits-vit"), opened("bytelm")]
    subjects.append(workbench.subject(checkpoints["mixtral"], data="random", max_length=16))
    refused = {}
    for entry in (entry for axis in axes().values() for entry in axis.entries.values()):
        home = home_of(entry)
        if home is None or find(home[0]).on != "subject":
            continue
        made = find(home[0])(**{home[1]: entry.name}, **tried_with(entry))
        for on in subjects:
            try:
                made.check(on)
            except BadInput as error:
                refused[entry.axis.kind, entry.name] = str(error)
            else:
                refused.pop((entry.axis.kind, entry.name), None)
                break
    before = {"kept": "prune it first", "lifted": "prune it first", "adapters": "quantize with adapter"}
    assert {name for _, name in refused} == set(before)
    assert all(before[name] in said for (_, name), said in refused.items())


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("adamw", ("train", "optimizer")),
        ("stochastic", ("quantize", "rounding")),
        ("hadamard", ("rotate", "kind")),
        ("2:4 outputs", None),
        ("norm-test", ("train", "batch_rule")),
        ("gates", ("train-sparse", "masks")),
        ("global", ("prune", "allocation")),
        ("power-compute", ("scaling-fit", "law")),
    ],
)
def test_the_home_of_an_entry(name: str, home: tuple[str, str] | None):
    found = [home_of(entry) for entry in entries_called(name)]
    assert (home in found) if home else not found


def test_show_says_source_formula_recipe_and_file(card: Method):
    door = next(found for found in doors(card.name) if found.title.endswith(f"(method, {card.family})"))
    facts = dict(door.facts)
    assert facts["source"] == card.source and facts["formula"] == card.formula
    assert facts["recipe"] == in_words(card.recipe) == card.words()
    on = find(card.recipe[0][0]).on
    assert facts["run"] == f"workbench run {card.name} --{on} {card.subject}"
    assert all(place.rpartition(":")[2].isdigit() for place in facts["defined"].split("; ")), facts["defined"]
    assert facts.get("departs", "") == card.departs
    assert facts["evidence"]
    text = "\n".join(described(door))
    assert card.name in text and card.recipe[0][0] in text


def test_the_first_step_is_accepted_on_its_subject(card: Method):
    card.check(wanted(card))


@pytest.mark.long
def test_every_recipe_runs(card: Method):
    result = run_reduced(card, wanted(card))
    assert len(result.table) and not result.partial


@pytest.mark.parametrize("name", QUICK)
def test_some_recipes_run(name: str):
    result = run_reduced(CARDS[name], opened(CARDS[name].subject))
    assert len(result.table) and not result.partial


def test_a_change_goes_to_every_step_that_has_the_field():
    first, second = instruments_of(CARDS["quarot"].recipe, {"calibration_examples": 8, "test_examples": 16})
    assert first.calibration_examples == second.calibration_examples == 8
    assert second.test_examples == 16 and str(second.activations.options.format) == "int4"
