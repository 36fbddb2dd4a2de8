"""An axis: one named choice of an instrument, each entry with a formula, a source and options of its own.

    SALIENCY = Axis("saliency", "what a weight's removal is thought to cost",
    found_in="workbench.pruning.saliency", home="prune.saliency")

    class Fisher(Options):
        damp: float = parameter(0.01, "share of the mean diagonal added to it", gt=0)

    @SALIENCY.add("fisher", formula="w^2 / (2 [F^-1]_qq)", source="Kurtic et al. 2022", needs="gradients",
    options=Fisher) def fisher(layer, calibration, pattern, options): ...

    class Prune(Instrument):
        saliency: Choice = SALIENCY.choice("fisher")

    Prune(saliency="fisher"), Prune(saliency={"name": "fisher", "damp": 0.1}), Prune(**{"saliency.damp": 0.1})

One registration is all that an entry needs: the command line, panels, reports, the docs, 'did you mean'
and the key of a stored result are derived from it, for a user's own entries as well.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, core_schema

from workbench.errors import BadInput, describe, unknown_name
from workbench.families import import_families, import_plugins
from workbench.values import check_numbers

#: Every axis by its kind, in the order in which they were made.
AXES: dict[str, Axis] = {}


def parameter(
    default: Any = PydanticUndefined,
    help: str = "",
    *,
    unit: str = "",
    scale: Literal["linear", "log"] = "linear",
    step: float | None = None,
    only_with: str = "",
    group: str = "",
    **bounds: Any,
) -> Any:
    """One field of an instrument or of an entry's options.
    `bounds` are pydantic's `ge`, `gt`, `le`, `lt`, `min_length`, ...

    only_with : the field without which this one is not read ("bisect"), one of several ("money or flops"), or
        the value that another has to have ("change=prune"); see `Fields.idle`
    group : what it stands under in a panel and in the help ("Data"); without one it is among the few that are
        shown at once
    """
    extra: dict[str, Any] = {"unit": unit, "scale": scale, "step": step}
    if group:
        extra["group"] = group
    if only_with:
        extra["only_with"] = only_with
    return Field(default, description=help, json_schema_extra=extra, **bounds)


class Fields(BaseModel):
    """Parameters: what instruments and the options of entries have in common.
    Frozen; an unknown name is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **given: Any) -> None:
        named = resolved(type(self), given)
        for name, info in type(self).model_fields.items():
            if name in named.values:
                check_numbers(named.values[name], info.annotation, name)
        try:
            super().__init__(**named.values)
        except ValidationError as error:
            raise BadInput(describe(error, type(self))) from None
        object.__setattr__(self, "__pydantic_fields_set__", named.given)

    @classmethod
    def parameters(cls) -> dict[str, FieldInfo]:
        """Field name -> pydantic FieldInfo, in declaration order."""
        return dict(cls.model_fields)

    @classmethod
    def renamed(cls) -> Mapping[str, str]:
        """Names of one release ago -> the names of today ("lr" -> "learning_rate", "phi" ->
        "schedule.phi").
        """
        return {}

    @classmethod
    def filled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values of fields that were not given and that follow from those that were,
        such as a method's choices.
        """
        return {}

    def idle(self) -> Iterator[str]:
        """A line for each field that somebody set, and that is not read beside the others as they are."""
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            needed = str(extra.get("only_with", "")) if isinstance(extra, dict) else ""
            changed = name in self.model_fields_set and getattr(self, name) != info.default
            if needed and changed and not any(self._met(part) for part in needed.split(" or ")):
                yield f"{name}: has no effect without {needed.replace('=', ' ')}"

    def _met(self, needed: str) -> bool:
        name, _, wanted = needed.partition("=")
        value = getattr(self, name)
        return str(value) == wanted if wanted else bool(value)


class Options(Fields):
    """Options of one entry; an entry without any has this class itself."""


@dataclass(frozen=True)
class Entry:
    """One choice of an axis.

    value : what is called or built;  needs : data the entry asks for
        ("inputs", "gradients", "training" or nothing)
    traits : what the engine may ask of it, such as "loss-like";
        spelled : options -> the text that stands for name and options
    home : the instrument and field where it is tried, if that is not its axis' one;
        beside : fields that it is tried with there, by name or with options ("recovery.steps")
    """

    axis: Axis = field(repr=False)
    name: str
    value: Any
    formula: str
    source: str
    needs: str = ""
    title: str = ""
    options: type[Options] = Options
    traits: frozenset[str] = frozenset()
    spelled: Callable[[Any], str] | None = None
    home: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)

    def place(self) -> tuple[str, int]:
        """The file and line where the value is defined."""
        return place_of(self.value)


def place_of(value: Any) -> tuple[str, int]:
    """The file and line where a function, a class, or an object's class is defined."""
    import inspect

    target = inspect.unwrap(getattr(value, "func", value))
    if not (inspect.isfunction(target) or inspect.isclass(target) or inspect.ismethod(target)):
        target = type(target)
    return inspect.getsourcefile(target) or "", inspect.getsourcelines(target)[1]


class Choice(str):
    """An entry with its options, as a field holds it. It is the entry's name to whatever reads it as text."""

    entry: Entry
    options: Any

    def __new__(cls, entry: Entry, options: Options) -> Self:
        made = super().__new__(cls, entry.spelled(options) if entry.spelled else entry.name)
        made.entry, made.options = entry, options
        return made

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def value(self) -> Any:
        return self.entry.value

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The entry's value on these arguments and, last, its options."""
        return self.entry.value(*arguments, self.options, **named)

    def has(self, trait: str) -> bool:
        return trait in self.entry.traits

    def plain(self) -> Any:
        """As JSON holds it: the name, or a mapping with the options that were given or differ from their
        defaults.
        """
        if self.entry.spelled:
            return str(self)
        options = self.options.model_dump(mode="json")
        return {"name": self.name, **options} if options else self.name

    def with_options(self, **options: Any) -> Choice:
        return Choice(self.entry, self.entry.options(**(self.options.model_dump() | options)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Choice):
            return self.entry is other.entry and self.options == other.options
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{str(self)!r}" if self.entry.spelled or not options else f"{self.name}({options})"

    def __reduce__(self) -> tuple[Any, ...]:
        if getattr(self.entry.value, "__module__", "") == "__main__":  # a notebook's own entry goes with it
            return _brought, (self.entry.axis.kind, self.entry, self.options.model_dump())
        return _looked_up, (self.entry.axis.kind, self.plain())

    def __deepcopy__(self, memo: Any) -> Choice:
        return self

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def plain(choice: Choice) -> Any:
            return choice.plain()

        return core_schema.is_instance_schema(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(plain)
        )


def _looked_up(kind: str, plain: Any) -> Choice:
    return axis(kind).chosen(plain)


def _brought(kind: str, entry: Entry, options: dict[str, Any]) -> Choice:
    home = axis(kind)
    home.entries.setdefault(entry.name, entry)
    return Choice(entry, entry.options(**options))


class Axis:
    """A named choice. `home` is the instrument and field where an entry is tried ("prune.saliency"), where
    several have one, and `beside` tells what an entry is tried with there. `found_in` names the modules or
    packages whose import registers the entries of the package itself.
    """

    def __init__(
        self,
        kind: str,
        help: str,
        *,
        found_in: str | tuple[str, ...] = (),
        shorthand: Callable[[str], Mapping[str, Any] | None] | None = None,
        home: str = "",
        beside: Callable[[Entry], Mapping[str, Any]] | None = None,
    ) -> None:
        if kind in AXES:
            raise BadInput(f"axis: {kind!r} exists already; give another kind")
        self.kind, self.help, self.shorthand, self.home = kind, help, shorthand, home
        self.beside = beside
        self.found_in = (found_in,) if isinstance(found_in, str) else tuple(found_in)
        self._entries: dict[str, Entry] = {}
        self._open = bool(self.found_in)
        AXES[kind] = self

    def __deepcopy__(self, memo: Any) -> Axis:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return axis, (self.kind,)

    @property
    def entries(self) -> dict[str, Entry]:
        """Entries by name; the package's own are imported when they are first asked for, and come first, in
        one order whatever was imported before.
        """
        if self._open:
            self._open = False
            modules = []
            for name in self.found_in:
                module = importlib.import_module(name)
                modules.append(name)
                for _, child, _ in pkgutil.iter_modules(getattr(module, "__path__", ())):
                    importlib.import_module(f"{name}.{child}")
                    modules.append(f"{name}.{child}")
            place = {name: index for index, name in enumerate(modules)}
            by_place = sorted(
                self._entries.items(), key=lambda item: place.get(_module(item[1].value), len(place))
            )
            self._entries.clear()
            self._entries.update(by_place)
        return self._entries

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise self.unknown(name)
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def with_trait(self, trait: str) -> tuple[str, ...]:
        return tuple(name for name, entry in self.entries.items() if trait in entry.traits)

    def add(
        self,
        name: str,
        *,
        formula: str,
        source: str,
        needs: str = "",
        title: str = "",
        options: type[Options] = Options,
        traits: str | tuple[str, ...] = (),
        spelled: Callable[[Any], str] | None = None,
        home: str = "",
        beside: Mapping[str, Any] | None = None,
    ) -> Callable[[Any], Any]:
        """Register what follows under `name`. A name is registered once,
        except by the code that registered it (a cell run again).
        """

        def register(value: Any) -> Any:
            before = self._entries.get(name)
            if before is not None and _where(before.value) != _where(value):
                raise BadInput(
                    f"{self.kind}: {name!r} is registered already, by {_where(before.value)}; "
                    "choose another name"
                )
            marks = frozenset((traits,) if isinstance(traits, str) else traits)
            self._entries[name] = Entry(
                self, name, value, formula, source, needs, title, options, marks, spelled, home, beside or {}
            )
            return value

        return register

    def unknown(self, name: object, field: str = "") -> BadInput:
        return unknown_name(field or self.kind, name, self.entries)

    def said_by(self, given: Any) -> Mapping[str, Any]:
        """The options that a text such as `int4` already says."""
        if type(given) is not str or given in self.entries or self.shorthand is None:
            return {}
        return self.shorthand(given) or {}

    def chosen(self, given: Any, field: str = "", **more: Any) -> Choice:
        """A name, a text that stands for name and options, a mapping with `name`, or a Choice -> Choice.
        `more` are further options.
        """
        where = field or self.kind
        if isinstance(given, Choice) and given.entry.axis is self:
            if not more:
                return given
            given = {"name": given.name, **given.options.model_dump()}
        if isinstance(given, Mapping):
            options = dict(given)
            if "name" not in options:
                raise BadInput(f"{where}: {given!r} has no name; write {{name: ..., option: ...}}")
            name = options.pop("name")
        else:
            name, options = given, {}
        if not isinstance(name, str):
            raise BadInput(
                f"{where}: {name!r} is not accepted, it should be a name; known: {', '.join(self.entries)}"
            )
        if name not in self.entries:
            import_plugins()  # it may be one that a user's file registers
        if name not in self.entries and self.shorthand is not None:
            read = self.shorthand(name)
            if read is not None:
                no_contradiction(where, name, read, options)
                options = {k: v for k, v in read.items() if k != "name"} | options
                name = read["name"]
        if name not in self.entries:
            raise self.unknown(name, where)
        entry = self.entries[name]
        for option in (options := options | more):
            if option.partition(".")[0] not in entry.options.model_fields:
                raise no_such_option(where, entry, option)
        try:
            return Choice(entry, entry.options(**options))
        except BadInput as error:
            raise BadInput(f"{where}.{error}") from None

    def choice(self, default: str | None, help: str = "", **more: Any) -> Any:
        """The declaration of a field of type `Choice`. `None` as default: the instrument's `filled` gives it.
        `usual` are defaults of options, where this field's are not the entries' own.
        """
        extra = {"axis": self.kind, "default": default, "unit": "", "scale": "linear", "step": None} | more
        return Field(
            default=default, description=help or self.help, json_schema_extra=extra, validate_default=False
        )


def no_such_option(where: str, entry: Entry, option: str) -> BadInput:
    known = ", ".join(entry.options.model_fields)
    others = [e.name for e in entry.axis.entries.values() if option in e.options.model_fields]
    belongs = f"; it is an option of {', '.join(others)}" if others else ""
    return BadInput(f"{where}.{option}: {entry.name} has no such option ({known or 'it has none'}){belongs}")


def _module(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def _where(value: Any) -> str:
    return f"{_module(value)}.{getattr(value, '__qualname__', type(value).__name__)}"


def axis(kind: str) -> Axis:
    """The axis of this kind."""
    if kind not in AXES:
        import_families()
    if kind not in AXES:
        raise unknown_name("axis", kind, AXES)
    return AXES[kind]


def axes() -> dict[str, Axis]:
    """Every axis by kind."""
    import_families()
    return dict(AXES)


def axis_of(info: FieldInfo) -> Axis | None:
    """The axis that a field chooses from, if it does."""
    extra = info.json_schema_extra
    return axis(str(extra["axis"])) if isinstance(extra, dict) and extra.get("axis") else None


def entries_in(fields: Fields) -> Iterator[Entry]:
    """The entries that these fields have chosen, and those that their options have."""
    for _, value in fields:
        if isinstance(value, Choice):
            yield value.entry
            yield from entries_in(value.options)


@dataclass
class Resolved:
    values: dict[str, Any]
    given: set[str]


def resolved(cls: type[Fields], given: Mapping[str, Any]) -> Resolved:
    """Field values from what somebody wrote: old names, dotted options (`saliency.damp`),
    and flat ones of one release ago.

    Every field on an axis becomes a Choice; those not given come from `filled`, then from their defaults.
    """
    values, options, old = _sorted_out(cls, given)
    fields = {name: found for name, info in cls.model_fields.items() if (found := axis_of(info)) is not None}
    named = set(values)
    mine = named | set(options)
    plain = {name: _name_of(value) if name in fields else value for name, value in values.items()}
    for home_of in [n for n, value in values.items() if n in fields and isinstance(value, Mapping)]:
        plain |= {f"{home_of}.{option}": v for option, v in values[home_of].items() if option != "name"}
    for home_of, more in (*options.items(), *old.items()):
        plain |= {f"{home_of}.{option}": value for option, value in more.items()}
    values = dict(cls.filled(plain)) | values
    for name, home in fields.items():
        default = cls.model_fields[name].default
        start = values.get(name, default)
        if start is None:
            raise BadInput(f"{name}: is missing; known: {', '.join(home.entries)}")
        said = home.said_by(start) if name in named else {}
        more = options.pop(name, {})
        if name in named:
            no_contradiction(name, start, said, more)
        values[name] = _with_usual(home.chosen(start, name, **more), cls.model_fields[name])
        for option in sorted(old.get(name, {}), key=lambda path: path.count(".")):
            placed = None if option in said else _placed(values[name], option, old[name][option], name)
            if placed is None:
                warn(f"{name}.{option}: has no effect with {name} {values[name]}; it is left out")
            else:
                values[name] = placed
                mine.add(name)
    for name in [n for n in values if n not in cls.model_fields]:
        mine.discard(name)
        mine |= _place_flat(cls, fields, values, name)
    return Resolved(values, mine & set(cls.model_fields))


def no_contradiction(field: str, text: str, said: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Raise `BadInput` for an option that a text such as `nf4` says otherwise."""
    for option, value in more.items():
        if option in said and said[option] != value:
            raise BadInput(
                f"{field}.{option}: {value} contradicts {field} {text}, which says {said[option]}; "
                "leave one of them out"
            )


def _name_of(value: Any) -> Any:
    if isinstance(value, Choice):
        return str(value)
    return value["name"] if isinstance(value, Mapping) and "name" in value else value


def _sorted_out(
    cls: type[Fields], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(field or flat name -> value, field -> option -> value, the same of options given by an old name)"""
    values: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}
    old: dict[str, dict[str, Any]] = {}
    renamed = cls.renamed()
    for name, value in given.items():
        home = options
        new = None if name.partition(".")[0] in cls.model_fields else new_name(name, renamed)
        if new is not None:
            home = options if "." in name else old
            warn(f"{name}: is called {new} now; the old name goes with the next release")
            if new in given:
                raise BadInput(f"{name}: is the old name of {new}, which is given as well; leave it out")
            name = new
        if "." in name:
            field, option = name.split(".", 1)
            if field not in cls.model_fields or axis_of(cls.model_fields[field]) is None:
                raise BadInput(
                    f"{name}: {field} has no options; fields with options: {', '.join(_with_options(cls))}"
                )
            home.setdefault(field, {})[option] = value
        elif value == "preset" and name in cls.model_fields and axis_of(cls.model_fields[name]) is not None:
            warn(f"{name}: 'preset' is what leaving it out means; leave it out")
        else:
            values[name] = value
    return values, options, old


def new_name(name: str, renamed: Mapping[str, str]) -> str | None:
    """Today's name of a field or of an option of a field that is called otherwise now."""
    field, dot, option = name.partition(".")
    if name in renamed or field not in renamed:
        return renamed.get(name)
    return f"{renamed[field]}{dot}{option}"


def _placed(choice: Choice, path: str, value: Any, where: str) -> Choice | None:
    """The choice with an option (`format.bits` is one of its option `format`) set; None when it has none
    such. The name of what an option has chosen already leaves that choice as it is.
    """
    head, _, rest = path.partition(".")
    if head not in choice.entry.options.model_fields:
        return None
    inner = getattr(choice.options, head)
    if rest:
        value = _placed(inner, rest, value, f"{where}.{head}") if isinstance(inner, Choice) else None
        if value is None:
            return None
    elif isinstance(inner, Choice) and value == inner.name:
        value = inner
    return choice.entry.axis.chosen(choice, where, **{head: value})


def _with_usual(choice: Choice, info: FieldInfo) -> Choice:
    """The choice with the defaults that its field gives to options instead of the entry's own."""
    extra = info.json_schema_extra
    usual: Any = extra.get("usual") if isinstance(extra, dict) else None
    known = choice.entry.options.model_fields.keys() - choice.options.model_fields_set
    mine = {option: value for option, value in (usual or {}).items() if option in known}
    return choice.with_options(**mine) if mine else choice


def _with_options(cls: type[Fields]) -> list[str]:
    return [name for name, info in cls.model_fields.items() if axis_of(info) is not None]


def _place_flat(cls: type[Fields], fields: Mapping[str, Axis], values: dict[str, Any], name: str) -> set[str]:
    """Give a flat option of one release ago to every chosen entry that has it; the fields it went to."""
    homes = [f for f in fields if name in values[f].entry.options.model_fields]
    if homes:
        value = values.pop(name)
        for home in homes:
            values[home] = fields[home].chosen(values[home], home, **{name: value})
        new = " and ".join(f"{home}.{name}" for home in homes)
        warn(f"{name}: is an option of a choice now, write {new}; the flat name goes with the next release")
        return set(homes)
    known = [
        f for f, home in fields.items() if any(name in e.options.model_fields for e in home.entries.values())
    ]
    if known:
        values.pop(name)
        chosen = ", ".join(f"{f} {values[f]}" for f in known)
        warn(f"{name}: has no effect with {chosen}; it is left out")
    return set()


def warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=2)
