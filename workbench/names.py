"""What there is: instruments by command-line name, method cards by name, and what a name leads to."""

from __future__ import annotations

import functools
import importlib.util
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.axis import Choice, Entry, Fields, axes, axis_of, new_name, place_of
from workbench.errors import BadInput, unknown_name
from workbench.families import FAMILIES, import_families
from workbench.field_text import paragraph, shown
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.results import Result
from workbench.storage import evidence_record, verdict
from workbench.storage.identity import identity_records, identity_sentence


def catalog() -> dict[str, type[Instrument]]:
    """Every instrument by command-line name, those a user's own code defines included."""
    import_families()
    found: dict[str, type[Instrument]] = {}

    def walk(cls: type[Instrument]) -> None:
        for sub in cls.__subclasses__():
            if "_run" in vars(sub):
                found[sub.name()] = sub
            walk(sub)

    walk(Instrument)
    return dict(sorted(found.items()))


PACKAGE = Path(__file__).resolve().parent
#: One step of a recipe: an instrument by name, and the fields that differ from its defaults.
Step = tuple[str, dict[str, Any]]


def find(name: str) -> type[Instrument]:
    """The instrument class called `name` on the command line."""
    known = catalog()
    if name not in known:
        raise unknown_name("instrument", name, known)
    return known[name]


@dataclass(frozen=True)
class Method:
    """A catalog card: a named, published technique, what it needs, the recipe that runs it,
    and the evidence measured for it here.
    """

    name: str
    family: str
    title: str
    source: str  # authors, year
    formula: str  # plain text or LaTeX
    needs: str  # data, gradients, retraining
    claim: str  # what the source says, checkable here
    row: int | None = None  # the technique list's number
    recipe: tuple[Step, ...] = ()
    subject: str = "digits-vit"  # the smallest built-in subject that it is for, or the table of runs
    departs: str = ""  # in one sentence, how what runs here differs from what the source does

    def evidence(self) -> dict[str, Any] | None:
        """The stored measurement, one's own before the project's (`FAMILY/NAME.json`),
        or None when nothing was measured yet.
        """
        return evidence_record(self.family, self.name)

    def verdict(self) -> str:
        """What was found here: holds, does not hold, cannot be shown here, not measured."""
        return verdict(self.evidence())

    def words(self) -> str:
        """The recipe as the options that say the same."""
        return in_words(self.recipe)

    def instruments(self, **changes: Any) -> list[Instrument]:
        """The recipe's instruments, in order; a change goes to every step that has the field."""
        return instruments_of(self.recipe, changes)

    def check(self, on: Any, **changes: Any) -> None:
        """Raise `BadInput` where the first step can be seen to fail on this subject."""
        self.instruments(**changes)[0].check(on)

    def run(self, on: Any, progress: Progress | None = None, cache: bool = True, **changes: Any) -> Result:
        """Run the recipe: each step on what the one before returned. The last step's result."""
        *_, last = run_in_turn(self.instruments(**changes), on, progress, cache)
        return last


def run_in_turn(
    steps: Iterable[Instrument],
    on: Any,
    progress: Progress | None = None,
    cache: bool = True,
    fresh: bool = False,
    memory: int | None = None,
) -> Iterator[Result]:
    """The result of each instrument as it ends, run on the subject that the one before returned.
    A partial one is the last.
    """
    for step in steps:
        result = step.run(on, progress, cache, fresh, memory)
        on = result.subject
        yield result
        if result.partial:
            return


@functools.lru_cache(1)
def methods() -> dict[str, Method]:
    """Every method card by name; a family lists its own as METHODS in `workbench.FAMILY.method_cards`
    or `workbench.FAMILY.methods`.
    """
    cards: dict[str, Method] = {}
    for family in FAMILIES:
        for place in ("method_cards", "methods"):
            try:
                found = importlib.util.find_spec(f"workbench.{family}.{place}")
            except ModuleNotFoundError:  # the family is a single file
                found = None
            if found is not None:
                for card in importlib.import_module(f"workbench.{family}.{place}").METHODS:
                    cards[card.name] = card
                break
    return cards


def method(name: str) -> Method:
    """The method card called `name`."""
    if name not in methods():
        raise unknown_name("method", name, methods())
    return methods()[name]


def recipe(name: str) -> tuple[Step, ...]:
    """What a name runs: an instrument, a method's recipe,
    or the instrument that an axis' entry is chosen in.
    """
    if name in catalog():
        return ((name, {}),)
    if name in methods() and methods()[name].recipe:
        return methods()[name].recipe
    entries = entries_called(name)
    for entry in entries:
        found = home_of(entry)
        if found is not None:
            return ((found[0], {found[1]: name} | tried_with(entry)),)
    if name in methods():
        raise BadInput(f"method: {name} has no recipe to run; `workbench show {name}` says what it is")
    if entries:
        kind = entries[0].axis.kind
        how = (
            f"give --task {name} beside --subject" if kind == "task" else f"it is chosen inside other {kind}s"
        )
        raise BadInput(f"method: {name} is a {kind} and runs nothing by itself; {how}")
    known = [*catalog(), *methods(), *(entry for axis in axes().values() for entry in axis.entries)]
    raise unknown_name("instrument", name, dict.fromkeys(known))


def entries_called(name: str) -> list[Entry]:
    """The entries of this name, on whatever axis."""
    return [axis.entries[name] for axis in axes().values() if name in axis.entries]


def tried_with(entry: Entry) -> dict[str, Any]:
    """The fields that an entry is tried with beside its own: a saliency of heads needs such a pattern."""
    found = {} if entry.axis.beside is None else entry.axis.beside(entry)
    return {**found, **entry.beside}


def home_of(entry: Entry) -> tuple[str, str] | None:
    """(instrument, field) where an entry is chosen: what its axis says, else the only ones there are."""
    if home := entry.home or entry.axis.home:
        name, field = home.split(".")
        return name, field
    for name, cls in catalog().items():
        for field, info in cls.model_fields.items():
            if axis_of(info) is entry.axis:
                return name, field
    return None


def accepts(cls: type[Fields], field: str) -> bool:
    """True where `field` is one of these fields, an option of their choices, or a name of one release ago."""
    head = field.split(".")[0]
    if head in cls.model_fields or new_name(field, cls.renamed()):
        return True
    homes = [axis for info in cls.model_fields.values() if (axis := axis_of(info)) is not None]
    return any(field in e.options.model_fields for axis in homes for e in axis.entries.values())


def instruments_of(steps: Sequence[Step], changes: Mapping[str, Any]) -> list[Instrument]:
    """The instruments of a recipe with changes on top: each goes to every step that has the field."""
    made = []
    placed: set[str] = set()
    for name, fields in steps:
        cls = find(name)
        mine = {field: value for field, value in changes.items() if accepts(cls, field)}
        placed |= set(mine)
        today = {new_name(field, cls.renamed()) or field for field in mine}
        kept = {k: v for k, v in fields.items() if k.split(".")[0] not in today and k not in today}
        made.append(cls(**(kept | mine)))
    if missing := [field for field in changes if field not in placed]:
        raise BadInput(f"{missing[0]}: no step of {in_words(steps)} takes it")
    return made


def in_words(steps: Iterable[Step]) -> str:
    """A recipe as the options that say the same: 'rotate --kind learned, then quantize --format.bits 4'."""
    return ", then ".join(" ".join([name, *options_text(fields)]) for name, fields in steps)


def options_text(fields: Mapping[str, Any]) -> list[str]:
    texts = []
    for field, value in fields.items():
        nested = dict(value) if isinstance(value, Mapping) and "name" in value else {"name": value}
        option = field.replace("_", "-")
        texts.append(f"--{option} {quoted(shown(nested.pop('name')))}")
        texts += [f"--{option}.{k.replace('_', '-')} {quoted(shown(v))}" for k, v in nested.items()]
    return texts


def quoted(text: str) -> str:
    return shlex.quote(text)


@dataclass(frozen=True)
class Door:
    """What a name leads to, for `workbench show`: pairs of a label and a text."""

    name: str
    title: str
    facts: tuple[tuple[str, str], ...]


def doors(name: str) -> list[Door]:
    """Everything that is called `name`: an instrument, a method, entries of axes."""
    found: list[Door] = []
    if name in catalog():
        found.append(instrument_door(name))
    if name in methods():
        found.append(method_door(methods()[name]))
    found += [entry_door(entry) for entry in entries_called(name)]
    if not found:
        recipe(name)  # says what is known
    return found


def source_of(cls: type[Instrument]) -> str:
    """What an instrument is run on, as it is typed."""
    return "--subject SUBJECT" if cls.on == "subject" else "--runs FILE"


def instrument_door(name: str) -> Door:
    cls = find(name)
    facts = [
        ("about", paragraph(cls)),
        ("run", f"workbench run {name} {source_of(cls)}"),
        ("python", f"{cls.__module__}.{cls.__name__}"),
        ("defined", line_of(cls)),
    ]
    if name not in methods() and not entries_called(name):  # else these show them
        facts += identity_facts(name)
    return Door(name, "instrument", tuple(facts))


def method_door(card: Method) -> Door:
    facts = [
        ("source", card.source),
        ("formula", card.formula),
        ("needs", card.needs),
        ("claims", card.claim),
    ]
    if card.departs:
        facts.append(("departs", card.departs))
    if card.recipe:
        facts.append(("recipe", in_words(card.recipe)))
        facts.append(("run", f"workbench run {card.name} --{find(card.recipe[0][0]).on} {card.subject}"))
        facts.append(("defined", "; ".join(places(card.recipe))))
    note = "; ".join(dict.fromkeys(str((card.evidence() or {}).get("note", "")).split("; ")))
    facts.append(("evidence", ": ".join(part for part in (card.verdict(), note) if part)))
    facts += identity_facts(card.name)
    return Door(card.name, f"{card.title} (method, {card.family})", tuple(facts))


def identity_facts(name: str) -> list[tuple[str, str]]:
    """A line for each code or table that a method, an entry or an instrument was held against."""
    return [("identity", identity_sentence(record)) for record in identity_records(name)]


def places(steps: Iterable[Step]) -> list[str]:
    """Where the entries that a recipe chooses are defined, else its instruments."""
    found = []
    for name, fields in steps:
        made = find(name)(**fields)
        chosen = [getattr(made, field) for field in fields if "." not in field]
        found += [place_text(choice.entry) for choice in chosen if isinstance(choice, Choice)] or [
            f"{name}: {line_of(type(made))}"
        ]
    return list(dict.fromkeys(found))


def place_text(entry: Entry) -> str:
    return f"{entry.axis.kind} {entry.name}: {line_of(entry.value)}"


def line_of(value: Any) -> str:
    """`pruning/prune.py:31` of the package's own, the whole path of a user's."""
    file, line = place_of(value)
    shown_file = Path(file)
    if shown_file.is_relative_to(PACKAGE):
        shown_file = shown_file.relative_to(PACKAGE)
    return f"{shown_file}:{line}"


def entry_door(entry: Entry) -> Door:
    facts = [("source", entry.source), ("formula", entry.formula)]
    if entry.needs:
        facts.append(("needs", entry.needs))
    home = home_of(entry)
    if home is not None:
        field = home[1].replace("_", "-")
        words = in_words([(home[0], {home[1]: entry.name} | tried_with(entry))])
        run = f"workbench run {words} {source_of(find(home[0]))}"
        facts.append(("run", run))
        for option, info in entry.options.parameters().items():
            needed = info.is_required()
            default = (
                "required" if needed else f"default {shown(info.get_default(call_default_factory=True))}"
            )
            facts.append(("option", f"--{field}.{option.replace('_', '-')}: {info.description} ({default})"))
    facts.append(("defined", place_text(entry)))
    if entry.name not in methods():  # else its card shows them
        facts += identity_facts(entry.name)
    return Door(entry.name, entry.title or f"{entry.axis.kind}: {entry.axis.help}", tuple(facts))


Result.finds = find
