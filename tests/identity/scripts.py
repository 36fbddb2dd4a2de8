"""Files of a checkout that are no modules of a package, or only in part: read where they lie."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from tests.identity.repositories import repository


def uncompiled() -> Any:
    """While entered, `torch.compile` leaves functions as they are: their decorators cost minutes here."""
    return patch.object(torch, "compile", lambda function=None, **given: function or (lambda plain: plain))


def loaded(name: str, file: str, **stand_ins: ModuleType) -> ModuleType:
    """A file as a module. stand_ins : modules it imports and that the numbers do not need, a dot as "__"."""
    spec = importlib.util.spec_from_file_location(f"peer_{abs(hash(file))}", repository(name) / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with uncompiled(), patch.dict(sys.modules, {k.replace("__", "."): v for k, v in stand_ins.items()}):
        spec.loader.exec_module(module)
    return module


def taken(owner: str, file: str, *names: str, until: str = "\f", **given: Any) -> dict[str, Any]:
    """Only these functions and classes of a script that would start a run when imported; `given` is what it
    has imported by then, `until` what ends the code of a file that goes on with a log.
    """
    path = repository(owner) / file
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


class Torch:
    """`torch` with some names changed, for a module that rounds or draws where the numbers should not."""

    def __init__(self, **changed: Any) -> None:
        vars(self).update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
