"""Code of authors whose repositories are no packages: read from a folder of checkouts, never copied."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

#: Names the folder that holds a checkout OWNER+NAME of every repository, at the commit that its pair names.
FOLDER = "WORKBENCH_IDENTITY_REPOSITORIES"


def checkout(repository: str) -> Path | None:
    """The folder of `owner/name`; None where there is none."""
    root = os.environ.get(FOLDER)
    folder = Path(root) / repository.replace("/", "+") if root else None
    return folder if folder is not None and folder.is_dir() else None


def file_of(repository: str, file: str) -> Path:
    folder = checkout(repository)
    if folder is None:
        raise FileNotFoundError(f"{FOLDER} names no folder with a checkout of {repository}")
    return folder / file


def uncompiled() -> Any:
    """While entered, `torch.compile` leaves functions as they are: their decorators cost minutes here."""
    return patch.object(torch, "compile", lambda function=None, **given: function or (lambda plain: plain))


def loaded(repository: str, file: str, **stand_ins: ModuleType) -> ModuleType:
    """A file as a module. stand_ins : modules it imports and that the numbers do not need, a dot as "__"."""
    spec = importlib.util.spec_from_file_location(f"peer_{abs(hash(file))}", file_of(repository, file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with uncompiled(), patch.dict(sys.modules, {k.replace("__", "."): v for k, v in stand_ins.items()}):
        spec.loader.exec_module(module)
    return module


def taken(repository: str, file: str, *names: str, until: str = "\f", **given: Any) -> dict[str, Any]:
    """Only these functions and classes of a script that would start a run when imported; `given` is what it
    has imported by then, `until` what ends the code of a file that goes on with a log.
    """
    path = file_of(repository, file)
    tree = ast.parse(path.read_text(encoding="utf-8").split(until)[0])
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ImportFrom)
        and (getattr(node, "name", "") in names or getattr(node, "module", "") == "__future__")
    ]
    found = dict(given)
    with uncompiled():
        exec(compile(tree, str(path), "exec"), found)
    return {name: found[name] for name in names}


def without_init(package: str, *inner: str) -> None:
    """Make a package and those inside it importable without running what their `__init__` imports."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    places = sys.modules[package].__path__ if spec is None else spec.submodule_search_locations
    root = Path(next(iter(places or ())))
    for name in ("", *inner):
        module = ModuleType(f"{package}.{name}" if name else package)
        module.__path__ = [str(root / name)]
        sys.modules.setdefault(module.__name__, module)


class Torch:
    """`torch` with some names changed, for a module that rounds or draws where the numbers should not."""

    def __init__(self, **changed: Any) -> None:
        vars(self).update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
