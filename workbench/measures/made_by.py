"""The commands that give a model, from the steps that a saved one remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.names import catalog, in_words, quoted

STEP = "step-{}"  # the folder that a step before the last is saved in


def made_by(history: Sequence[Mapping[str, Any]], begun_from: str) -> list[str]:
    """One command a step, each on what the step before it saved; none where no step is known.

    history : {"instrument": name, "fields": values as JSON holds them} of each step
    begun_from : what the first step is run on, as it is typed
    """
    commands = []
    for number, step in enumerate(history, start=1):
        source = STEP.format(number - 1) if number > 1 else begun_from
        words = in_words([(step["instrument"], unusual(step["instrument"], step["fields"]))])
        kept = f" --out {STEP.format(number)}" if number < len(history) else ""
        commands.append(f"workbench run {words} --subject {quoted(source)}{kept}")
    return commands


def unusual(instrument: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults of an instrument; all of one that is not known."""
    if instrument not in catalog():
        return dict(fields)
    known = catalog()[instrument]
    usual = known().model_dump(mode="json")
    return {name: value for name, value in fields.items() if name not in usual or usual[name] != value}


def looked_into(reference: str, source: str) -> str:
    """The command that tells which part of a model made its distance to the reference."""
    return f"workbench run attribution --subject {quoted(reference)} --changed {quoted(source)}"
