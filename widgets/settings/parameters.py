"""A panel's settings as they are sent and stored: the fields that decide the others."""

from __future__ import annotations

import contextlib
import html
import json
import os
from collections.abc import Mapping
from typing import Any

import workbench.reports
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.names import find, methods
from workbench.values import read_file

KNOWN = ("instrument", "subject", "settings", "view", "fingerprint")


def read_parameters(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[Instrument, Any, Mapping[str, Any] | None]:
    """Instrument, what it works on and the view, from a YAML or JSON file or a mapping."""
    if isinstance(source, Mapping):
        given = dict(source)
    else:
        given = read_file(source)
    if not isinstance(given, dict) or "instrument" not in given or "subject" not in given:
        raise BadInput(
            f"parameters: expected a mapping with instrument and subject (keys: {', '.join(KNOWN)})"
        )
    unknown = [key for key in given if key not in KNOWN]
    if unknown:
        raise BadInput(f"{unknown[0]}: unknown parameter of a panel (parameters: {', '.join(KNOWN)})")
    kind = find(given["instrument"])
    on: Any = given["subject"]
    if given.get("fingerprint"):
        on = workbench.reports.reopen(kind, on, given["fingerprint"])
    return as_chosen(kind(**(given.get("settings") or {}))), on, given.get("view")


def what_decides(instrument: Instrument) -> dict[str, Any]:
    """The fields that were given, from which the others follow; all that matter, where some came under names
    of one release ago and are not among the given.
    """
    given = instrument.given()
    return given if type(instrument)(**given) == instrument else as_chosen(instrument).given()


def as_chosen(instrument: Instrument) -> Instrument:
    """The same instrument with only those fields given that decide the others: settings that a report wrote
    hold every field, those that a method fills in among them.
    """
    kind = type(instrument)
    given = {name: getattr(instrument, name) for name in kind.model_fields}
    for name in kind.model_fields:
        rest = {key: value for key, value in given.items() if key != name}
        with contextlib.suppress(BadInput):
            if kind(**rest) == instrument:
                given = rest
    return kind(**given)


def settings_html(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(k)}</th><td>{html.escape(json.dumps(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def published(kind: type[Instrument]) -> dict[str, Instrument]:
    """The published methods that are this instrument with other settings: name -> instrument."""
    found = {}
    for name, card in methods().items():
        if len(card.recipe) == 1 and card.recipe[0][0] == kind.name():
            found[name] = kind(**card.recipe[0][1])
    return found
