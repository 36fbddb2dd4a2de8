"""An instrument as the command that runs it: the fields that somebody set, every digit of them.

command_of(Prune(sparsity=0.7), "digits-vit")
    # workbench run prune --subject digits-vit --sparsity 0.7
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any


def command_of(instrument: Any, source: str) -> str:
    """The command that makes the same result; `source` opens what it works on."""
    option = "--subject" if instrument.on == "subject" else "--runs"
    words = ["workbench", "run", instrument.name(), option, shlex.quote(source), *options_of(instrument)]
    return " ".join(words)


def options_of(instrument: Any) -> list[str]:
    """The fields that somebody set, as options."""
    words = []
    for name, value in instrument.given().items():
        option, found = f"--{name.replace('_', '-')}", plain(value)
        inner = dict(found) if isinstance(found, Mapping) and "name" in found else {}
        words += [option, typed(inner.pop("name") if inner else found)]
        for key, each in inner.items():
            words += [f"{option}.{key.replace('_', '-')}", typed(each)]
    return words


def typed(value: Any) -> str:
    """A value as a shell and `workbench run` read it back: numbers, lists and mappings as JSON."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def plain(value: Any) -> Any:
    """A field's value as JSON holds it: a choice as its name, or a mapping with its options."""
    return value.plain() if hasattr(value, "plain") else value
