"""Every option of every optimizer and schedule as `workbench run train` takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from workbench.axis import Entry, axis_of
from workbench.cli import main
from workbench.commands.run import field_options
from workbench.errors import BadInput
from workbench.names import instruments_of
from workbench.training import LEARNING_RATE_SCHEDULE, OPTIMIZER, Train
from workbench.values import read

ENTRIES = {
    f"{field} {entry.name}": (field, entry)
    for field, axis in (("optimizer", OPTIMIZER), ("schedule", LEARNING_RATE_SCHEDULE))
    for entry in axis.entries.values()
    if entry.value.__module__.startswith("workbench.")
}
#: Values of options that have no default, and of those that go with few values of another.
NEEDED: dict[str, dict[str, Any]] = {
    "power": {"batch": 32, "tokens": 1e6},
    "muon": {"weight_map": "normalise"},
}


def other(entry: Entry, option: str) -> Any:
    """A value of this option that it accepts and that is not its default."""
    info = entry.options.model_fields[option]
    given, default = NEEDED.get(entry.name, {}), info.default
    if option in given:
        return given[option]
    if axis_of(info) is not None:
        return "lion"
    if get_origin(info.annotation) is Literal:
        return next(value for value in get_args(info.annotation) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, tuple):
        return tuple(round(0.9 * value, 6) for value in default)
    for value in (default + 1,) if isinstance(default, int) else (0.9 * default, 1.1 * default, 0.05):
        try:
            found = entry.options(**given, **{option: round(value, 12)})
        except BadInput:
            continue
        if getattr(found, option) != default:
            return getattr(found, option)
    raise AssertionError(f"{entry.name}.{option}: no other value found")


def told(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(option -> value, option of the command -> text)"""
    field, entry = ENTRIES[name]
    values = {option: other(entry, option) for option in entry.options.model_fields}
    texts = {field: entry.name}
    for option, value in values.items():
        words = value if isinstance(value, tuple) else (value,)
        text = ",".join(str(word) for word in words)
        texts[f"{field}.{option}".replace("_", "-")] = text
    return values, texts


def as_told(texts: dict[str, str]) -> Train:
    known = field_options([Train])
    given = {option.replace("-", "_"): read(text, known[option], option) for option, text in texts.items()}
    (made,) = instruments_of([("train", {})], given)
    assert isinstance(made, Train)
    return made


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_is_read_as_it_is_typed(name: str) -> None:
    values, texts = told(name)
    options = getattr(as_told(texts), ENTRIES[name][0]).options
    assert {option: getattr(options, option) for option in values} == values


@pytest.mark.parametrize("name", ENTRIES)
def test_a_run_with_every_option_keeps_them(name: str, cache: Path) -> None:
    values, texts = told(name)
    words = [word for option, text in texts.items() for word in (f"--{option}", text)]
    assert main(["run", "train", "--subject", "digits-vit", "--steps", "2", "--batch-size", "8", *words]) == 0
    (file,) = cache.rglob("result.json")
    made = Train(**json.loads(file.read_text())["fields"])
    options = getattr(made, ENTRIES[name][0]).options
    assert {option: getattr(options, option) for option in values} == values


def test_options_of_the_optimizer_inside_another_are_read() -> None:
    """Kind: an option of a choice that an option makes; AGVM and MKOR run another optimizer inside."""
    for outer in ("agvm", "mkor"):
        made = as_told({"optimizer": outer, "optimizer.inner": "lion", "optimizer.inner.betas": "0.5,0.6"})
        assert made.optimizer.options.inner.options.betas == (0.5, 0.6)


@pytest.mark.parametrize("text", ["0.9", "0.9,0.9,0.9"])
def test_too_few_and_too_many_values_are_counted(text: str) -> None:
    """Kind: a list of fixed length whose error spoke of a field that does not exist (`betas.1: required`)."""
    with pytest.raises(BadInput, match=r"^optimizer\.betas: \[.*\] is not accepted, it should be 2 values$"):
        as_told({"optimizer.betas": text})
