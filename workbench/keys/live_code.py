"""A user's own code as it is loaded: a loss, a module's class, a metric, an entry of an axis.

Three owners are told apart. Code of the package counts by its import closure, installed libraries by
their version, and everything else, the user's, twice: as it is loaded (byte code, defaults, closure cells
and the globals it names, followed to whatever they name in turn) and as it is written (its file and the
files that one imports). Neither alone is enough: a file that was edited after it was imported says what will
be computed next time, and byte code does not see what is looked up by name.
The same code and the same values give the same text in every process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import pickle
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.keys.imports import PACKAGE, closure, definitions, digest, source_of
from workbench.version import version_of

PLAIN = (type(None), bool, int, float, complex, str, bytes)
#: What Python and the libraries write on a class, which computes nothing.
ABOUT = re.compile(
    r"__(module|doc|dict|weakref|annotations|qualname|firstlineno|static_attributes|abstractmethods|"
    r"parameters|orig_bases|dataclass_fields|dataclass_params|class_vars|private_attributes|signature|"
    r"pydantic.*)__|_abc_impl|model_.*"
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


def digest_of(values: object, root: Path = PACKAGE) -> str:
    """Hash of live values and of the code behind them. `root` is the package's folder."""
    return hashlib.sha256(Reader(root).text(values).encode()).hexdigest()


class Reader:
    """Writes values as text; what was written before is referred to by its number."""

    def __init__(self, root: Path = PACKAGE) -> None:
        self.root = root
        self.numbers: dict[int, int] = {}
        self.kept: list[object] = []

    def text(self, value: Any) -> str:
        kind = type(value)
        if kind in PLAIN:
            return f"{kind.__name__} {value!r}"
        if kind in (tuple, frozenset, types.CodeType):
            return self._compound(value)
        if id(value) in self.numbers:
            return f"as {self.numbers[id(value)]}"
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)  # a number belongs to what lives
        return self._compound(value)

    def _compound(self, value: Any) -> str:
        kind = type(value)
        if kind in (tuple, list):
            return f"{kind.__name__}({', '.join(self.text(part) for part in value)})"
        if kind in (set, frozenset):
            return f"{kind.__name__}({', '.join(sorted(self.text(part) for part in value))})"
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Mapping) and owner(kind) == "library":
            parts = sorted(f"{self.text(key)}: {self.text(part)}" for key, part in value.items())
            return f"{kind.__name__}{{{', '.join(parts)}}}"
        if is_tensor(value) or type(value).__module__ == "numpy":
            return array_text(value)
        return self._callable(value) or self._instance(value)

    def _callable(self, value: Any) -> str:
        """Of functions and what stands for one; empty for anything else."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"method {self.text(value.__func__)} of {self.text(value.__self__)}"
        if isinstance(value, functools.partial):
            return f"partial {self.text(value.func)} {self.text(value.args)} {self.text(value.keywords)}"
        if isinstance(value, (staticmethod, classmethod)) or "__wrapped__" in own_dict(value):
            return f"{type(value).__name__} {self.text(value.__wrapped__)}"
        if isinstance(value, property):
            return f"property {self.text((value.fget, value.fset))}"
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType)):
            home = getattr(value, "__module__", "") or ""
            version = version_of(home.split(".")[0]) if home else ""
            return f"builtin {home}.{value.__qualname__} {version}"
        return ""

    def _code(self, code: types.CodeType) -> str:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return f"code {code.co_code.hex()} {names} {code.co_flags} {self.text(code.co_consts)}"

    def _function(self, function: types.FunctionType) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        cells = [cell_contents(cell) for cell in function.__closure__ or ()]
        given = (function.__defaults__, function.__kwdefaults__, cells)
        owned = owner(function)
        if owned == "library":
            return f"{name} {library(function.__module__)} {self.text(cells)}"
        if owned == "package":
            return f"{name} {closure_text(function.__module__, self.root)} {self.text(given)}"
        used = {name: function.__globals__[name] for name in names_in(function.__code__, function)}
        file = files_text(Path(function.__code__.co_filename), self.root)
        return f"{function.__qualname__} {self.text((function.__code__, given))} {self.text(used)} {file}"

    def _class(self, cls: type) -> str:
        bases = [self.text(base) for base in cls.__bases__ if base is not object]
        name, owned = f"{cls.__module__}.{cls.__qualname__}", owner(cls)
        if owned == "library":
            return f"{name} {library(cls.__module__)} {bases}"
        if owned == "package":
            return f"{name} {closure_text(cls.__module__, self.root)}"
        own = {
            key: part for key, part in sorted(vars(cls).items()) if not ABOUT.fullmatch(key) and counts(part)
        }
        file = file_of_class(cls)
        return f"{cls.__qualname__} {bases} {self.text(own)} {files_text(file, self.root) if file else ''}"

    def _module(self, module: types.ModuleType) -> str:
        file = getattr(module, "__file__", None)
        if owner_of_file(file or "", module.__name__) != "user" or file is None:
            return f"module {module.__name__} {library(module.__name__)}"
        own = {
            key: part
            for key, part in sorted(vars(module).items())
            if not key.startswith("__")
            and counts(part)
            and getattr(part, "__module__", module.__name__) == module.__name__
        }
        return f"module {module.__name__} {self.text(own)} {files_text(Path(file), self.root)}"

    def _instance(self, value: Any) -> str:
        kind = type(value)
        if owner(kind) != "library" or hasattr(kind, "named_modules"):
            return f"{self.text(kind)} {self.text(held_by(value))}"
        try:
            return f"{kind.__qualname__} {hashlib.sha256(pickle.dumps(value)).hexdigest()}"
        except Exception:  # whatever a stranger's class raises when it cannot be pickled
            return f"{kind.__qualname__} {ADDRESS.sub('', repr(value))}"


def is_tensor(value: object) -> bool:
    """By its class: an object may answer to any name."""
    return hasattr(type(value), "detach")


def own_dict(value: object) -> dict[str, Any]:
    found = getattr(type(value), "__dictoffset__", 0) and vars(value)
    return found if isinstance(found, dict) else {}


def held_by(value: Any) -> dict[str, Any]:
    """What an object of a user's class keeps: in its dictionary, in the slots of its class and of those it
    comes from, and as the number, text or collection that it is.
    """
    held: dict[str, Any] = {f".{name}": part for name, part in own_dict(value).items()}
    for cls in type(value).__mro__:
        for name, part in vars(cls).items():
            if isinstance(part, types.MemberDescriptorType):
                try:
                    held[f"slot {cls.__qualname__}.{name}"] = part.__get__(value)
                except AttributeError:  # nothing was put there yet
                    continue
    if (plain := content_of(value)) is not None:
        held["content"] = plain
    return held


def content_of(value: Any) -> Any:
    """The number, text or collection that an object is by the built-in class that its own comes from."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    if isinstance(value, list):
        return list.copy(value)
    if isinstance(value, tuple):
        return tuple(tuple.__iter__(value))
    if isinstance(value, (set, frozenset)):
        return frozenset(set.__iter__(value) if isinstance(value, set) else frozenset.__iter__(value))
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return complex.__complex__(value) if isinstance(value, complex) else None


def counts(value: object) -> bool:
    """True for what is read in a class or a module: everything but modules, which names in code lead to."""
    return not isinstance(value, types.ModuleType)


def computes_something(value: object) -> bool:
    """True for functions, and for values that a function may read."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(computes_something(part) for part in value)
    if isinstance(value, dict):
        return all(computes_something(part) for part in value.values())
    descriptors = (staticmethod, classmethod, property)
    return isinstance(value, (*PLAIN, *FUNCTIONS, *descriptors)) or is_tensor(value)


def array_text(value: Any) -> str:
    """Of a tensor or an array: its shape, type and a hash of what is in it."""
    if is_tensor(value):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""
    else:
        import numpy as np

        array = np.ascontiguousarray(value)
        data = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    shape, dtype = tuple(getattr(value, "shape", ())), getattr(value, "dtype", "")
    return f"{type(value).__name__} {shape} {dtype} {hashlib.sha256(data).hexdigest()}"


def cell_contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def names_in(code: types.CodeType, function: types.FunctionType) -> list[str]:
    """Names of its module that a function's code, and code inside of it, may read."""
    found, waiting = set[str](), [code]
    while waiting:
        inner = waiting.pop()
        found |= set(inner.co_names)
        waiting += [const for const in inner.co_consts if isinstance(const, types.CodeType)]
    return sorted(name for name in found if name in function.__globals__)


def owner(defined: Any) -> str:
    """Whose a function or class is: of the "package", an installed "library", or the "user"."""
    home = getattr(defined, "__module__", None) or ""
    if isinstance(defined, types.FunctionType):
        return owner_of_file(defined.__code__.co_filename, home)
    if isinstance(defined, type):
        return owner_of_file(str(file_of_class(defined) or ""), home)
    return owner_of_file("", home)


def owner_of_file(file: str, module: str) -> str:
    """By the file, where there is one: two modules may have one name."""
    top = module.split(".")[0]
    if top == PACKAGE.name:
        return "package"
    if not file or file.startswith("<frozen"):
        known = top in sys.stdlib_module_names or top in sys.builtin_module_names
        return "user" if top in ("__main__", "__mp_main__") or not (known or installed(top)) else "library"
    return "library" if is_installed(file) else "user"


def installed(top: str) -> bool:
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and is_installed(file)


@functools.lru_cache(4096)
def is_installed(file: str) -> bool:
    """True for files of the standard library and of installed distributions."""
    place = Path(file)
    if {"site-packages", "dist-packages"} & set(place.parts):
        return True
    return place.is_relative_to(Path(inspect.__file__).parent)


def file_of_class(cls: type) -> Path | None:
    """Where a class is written: by the code of its methods, else by its module."""
    for part in vars(cls).values():
        function = inspect.unwrap(getattr(part, "__func__", part))
        if (
            isinstance(function, types.FunctionType)
            and function.__qualname__.startswith(cls.__qualname__)
            and not function.__code__.co_filename.startswith("<")
        ):
            return Path(function.__code__.co_filename)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file) if file else None


def library(module: str) -> str:
    """Version of the distribution that a module comes from, as far as it is known."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return ""
    return version_of(top) or str(getattr(sys.modules.get(top), "__version__", ""))


def closure_text(module: str, root: Path) -> str:
    return digest(closure([module], root=root), root)


def files_text(file: Path, root: Path = PACKAGE) -> str:
    """Hash of a user's file and of his files that it imports, of the package's that they reach, and versions
    of the libraries they name. Empty where there is no Python file, as for what is typed in a notebook or
    stands in a page of text.
    """
    if not file.is_file() or file.suffix not in ("", ".py", ".pyw"):
        return ""
    total, ours, libraries = hashlib.sha256(), set[Path](), set[str]()
    found, waiting = set[Path](), [file.resolve()]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        for name, reached in imported(current):
            if reached is not None:
                waiting.append(reached)
            elif name.split(".")[0] != PACKAGE.name:
                libraries.add(f"{name.split('.')[0]} {library(name)}")
        for item in source_of(current).imports:
            for module, files in definitions(item, root):
                ours |= files | closure([module], root=root)
    for hashed in sorted(source_of(current).digest for current in found):
        total.update(hashed.encode())
    total.update(digest(ours, root).encode() + repr(sorted(libraries)).encode())
    return total.hexdigest()


@functools.lru_cache(1024)
def _imports(file: Path, changed: int, size: int) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """(level, module, names) of each import of a file."""
    found: list[tuple[int, str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    return tuple(found)


def imported(file: Path) -> Iterator[tuple[str, Path | None]]:
    """(module, its file) for each import of a file; the file is None where it is not a user's."""
    state = file.stat()
    for level, module, names in _imports(file, state.st_mtime_ns, state.st_size):
        if level:
            folder = file.parents[min(level, len(file.parents)) - 1]
            base = folder.joinpath(*module.split("."))
            for candidate in (base, *(base / name for name in names)):
                yield from ((str(candidate), found) for found in sources(candidate))
            continue
        yield module, place(module, file)
        for full in (f"{module}.{name}" for name in names):
            if (found := place(full, file)) is not None:
                yield full, found


def sources(candidate: Path) -> Iterable[Path]:
    files = (candidate.with_name(candidate.name + ".py"), candidate / "__init__.py")
    return [found.resolve() for found in files if found.is_file()]


def place(module: str, file: Path) -> Path | None:
    """The user's file of an imported module: as it is loaded, beside the file that imports it, or on the
    path; None for libraries and the package.
    """
    top = module.split(".")[0]
    if top == PACKAGE.name or top in sys.stdlib_module_names:
        return None
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is None:
        beside = next(iter(sources(file.parent.joinpath(*module.split(".")))), None)
        if beside is not None:
            return beside
        if "." not in module:
            try:
                spec = importlib.util.find_spec(module)
            except (ImportError, ValueError):
                spec = None
            loaded = spec.origin if spec is not None else None
    if loaded is None or not loaded.endswith(".py") or is_installed(loaded):
        return None
    return Path(loaded).resolve()
