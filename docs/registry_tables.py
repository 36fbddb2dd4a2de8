"""The tables of instruments, subjects, methods and axes, from the registries."""

from __future__ import annotations

from markup import cell, code_cell, first_sentence, formula, table
from pydantic.fields import FieldInfo
from reference import api_links

import workbench
from workbench.axis import axes
from workbench.names import Method
from workbench.subjects.registry import BUILTINS


def instruments_page() -> str:
    links = {cls: link.replace("../", "../api/", 1) for cls, link in api_links().items()}
    rows = []
    for name, cls in workbench.catalog().items():
        package = ".".join(cls.__module__.split(".")[:2])
        shown = f"`{package.removeprefix('workbench.')}.{cls.__name__}`"
        linked = f"[{shown}]({links[cls]})" if cls in links else shown
        changes = "yes" if cls.changes_model else ""
        rows.append((f"`{name}`", linked, cls.on, changes, cell(first_sentence(cls))))
    head = ("command", "class", "works on", "changes the model", "what it does")
    return (
        f"# Instruments\n\n`workbench run COMMAND --help` lists the fields of one.\n\n{table(head, rows)}\n"
    )


def subjects_page() -> str:
    rows = [(f"`{name}`", cell(note)) for name, (_, _, note) in BUILTINS.items()]
    return (
        "# Subjects\n\n"
        "Built-in subjects need no download. A folder, a hub id, `file.py:function` and an `nn.Module` are "
        "subjects too: see [`subject`](../api/workbench/subject-function.md).\n\n"
        f"{table(('name', 'what it is'), rows)}\n"
    )


def methods_page() -> str:
    parts = [
        "# Methods",
        "Published methods, with what their source claims and what was measured here: "
        "equal budget, tuned on validation, "
        "reported on test. A claim that does not hold at this scale is shown as not holding.",
    ]
    families: dict[str, list[Method]] = {}
    for card in workbench.methods().values():
        families.setdefault(card.family, []).append(card)
    for family, cards in families.items():
        rows = []
        for card in cards:
            name = f"`{card.name}`<br>{cell(card.title)}"
            what = (
                cell(card.source),
                formula(card.formula),
                card.needs,
                cell(card.claim),
                cell(card.departs),
            )
            rows.append((name, *what, found_here(card)))
        head = ("method", "source", "formula", "needs", "claim", "differs here", "measured here")
        parts += [f"## {family.capitalize()}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def found_here(card: Method) -> str:
    """What the stored measurement says of the claim, and the subject it was measured on."""
    subject = (card.evidence() or {}).get("subject")
    return card.verdict() + (f", on {cell(subject)}" if isinstance(subject, str) and subject else "")


def axes_page() -> str:
    parts = [
        "# Axes",
        "A method is a choice on each axis of its family; an instrument's fields name the axes. "
        "A choice of one's own "
        "is [added in twenty lines](../add-a-method.md).",
    ]
    for kind, axis in axes().items():
        rows = []
        for entry in axis.entries.values():
            options = "; ".join(option_text(name, info) for name, info in entry.options.model_fields.items())
            traits = ", ".join(sorted(entry.traits))
            rows.append(
                (
                    f"`{entry.name}`",
                    formula(entry.formula),
                    cell(entry.source),
                    cell(entry.needs),
                    cell(traits),
                    options,
                )
            )
        head = ("choice", "formula", "source", "needs", "traits", "options")
        parts += [f"## {kind.capitalize()}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def option_text(name: str, info: FieldInfo) -> str:
    default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
    return f"`{name}` ({code_cell(default)}): {cell(info.description or '')}"
