"""Every published name is a door: each card's recipe runs, is its own, and means one computation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import workbench
from workbench.axis import axis_of
from workbench.cli import main
from workbench.names import catalog, doors, entries_called, find, home_of, in_words, methods, recipe
from workbench.scaling import load_runs

#: Fields that make a run small, where an instrument has them.
SMALL: dict[str, Any] = {
    "steps": 10,
    "probes": 2,
    "products": 12,
    "examples": 256,
    "calibration_examples": 8,
    "test_examples": 16,
    "predict_examples": 4,
    "curvature_examples": 16,
    "learning_rate_points": 2,
    "rounds": 3,
    "warmup_rounds": 1,
    "workers": 1,
    "evaluate_limit": 16,
    "batch_size": 8,
    "repeats": 1,
    "draws": 1,
    "resamples": 20,
}
#: What runs without --long: one recipe of a kind, each in a second or two.
QUICK = {
    "wanda",
    "obert",
    "gptq",
    "awq",
    "smoothquant",
    "lsq",
    "uba",
    "lamb",
    "slq",
    "hutchinson",
    "chinchilla",
}


def on_of(card: Any) -> Any:
    """The subject, or the runs, that a card is tried on."""
    if find(card.recipe[0][0]).on == "runs":
        return load_runs(card.subject)
    return workbench.subject(card.subject)


def small(card: Any) -> dict[str, Any]:
    """Changes that make the recipe's run small, as far as its instruments have the fields."""
    classes = [find(name) for name, _ in card.recipe]
    return {
        field: value for field, value in SMALL.items() if any(field in cls.model_fields for cls in classes)
    }


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_card_leads_to_a_run_of_its_own(name: str) -> None:
    card = methods()[name]
    assert card.recipe, "no recipe"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        instruments = card.instruments()
    plain = [type(step)() for step in instruments if name != step.name()]
    assert not plain or instruments != plain, f"{in_words(card.recipe)} is what the instrument does anyway"


def test_no_two_cards_are_the_same_run() -> None:
    seen: dict[str, str] = {}
    for name, card in methods().items():
        fields = [(step.name(), step.model_dump(mode="json")) for step in card.instruments()]
        text = repr((fields, card.subject))
        assert text not in seen, f"{name} and {seen[text]} are one run"
        seen[text] = name


def test_no_name_means_two_computations() -> None:
    """A card that shares its name with an entry runs that entry; with an instrument, that instrument."""
    for name, card in methods().items():
        if name in catalog():
            assert [step for step, _ in card.recipe] == [name]
            continue
        chosen = {
            value.name
            for step in card.instruments()
            for field in type(step).model_fields
            if axis_of(type(step).model_fields[field]) is not None
            for value in [getattr(step, field)]
        }
        entries = [entry for entry in entries_called(name) if home_of(entry) is not None]
        assert not entries or name in chosen, f"{name}: {in_words(card.recipe)}"


@pytest.mark.parametrize("name", sorted(methods()))
def test_show_says_what_a_name_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name]) == 0
    told = capsys.readouterr().out
    for label in ("source", "formula", "recipe", "defined", "evidence"):
        assert f"\n  {label}" in told
    assert doors(name)[0].name == name and recipe(name)


def runs() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long, id=name)
        for name in sorted(methods())
    ]


@pytest.mark.parametrize("name", runs())
def test_a_recipe_runs(name: str, cache: Any) -> None:
    card = methods()[name]
    if card.subject == "minilm-docstrings":
        pytest.skip("the fine-tuned MiniLM takes a quarter of an hour to make")
    on = on_of(card)
    card.check(on, **small(card))
    result = card.run(on, cache=False, **small(card))
    assert not result.partial and len(result.table)
