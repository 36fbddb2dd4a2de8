"""Lists of choices as texts: `adamw`, or with options `uba phi=0.5`, `adamw betas=[0.9, 0.95]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from workbench.axis import Axis, Choice
from workbench.errors import BadInput
from workbench.values import read

OPTION = re.compile(r"\s+(\w+)=")


def separated(value: Any) -> Any:
    """A text with commas as a list of texts."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


#: The type of a field that lists choices.
Texts = Annotated[list[str], BeforeValidator(separated)]


def listed(axis: Axis, texts: Sequence[str], field: str) -> list[Choice]:
    """The choices that are meant, each once; `BadInput` names the field and what is close."""
    if not texts:
        raise BadInput(f"{field}: names nothing; known: {', '.join(axis)}")
    found: list[Choice] = []
    for text in texts:
        name, *parts = OPTION.split(text.strip())
        pairs = zip(parts[::2], parts[1::2], strict=True)
        choice = axis.chosen(
            {"name": name, **{key: read(value, object, f"{field}.{key}") for key, value in pairs}}, field
        )
        if choice not in found:
            found.append(choice)
    return found


def labels(choices: Sequence[Choice]) -> list[str]:
    """Names, with the options that are not the usual ones where two choices have the same name."""
    names = [choice.name for choice in choices]
    found = []
    for choice in choices:
        unusual = choice.options.model_dump(exclude_defaults=True) if names.count(choice.name) > 1 else {}
        found.append(" ".join([choice.name, *(f"{name}={value}" for name, value in unusual.items())]))
    return found
