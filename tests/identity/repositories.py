"""Code that others published in a repository and not in a package: read from checkouts, never copied here.

`IDENTITY_REPOSITORIES` names a folder that holds `owner+name` for each of them, at the commit below.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

COMMITS = {
    "DeepWok/mase": "6ff398cf4c01a008540fd5ff2431f6e0740b4c5b",
    "ECoLab-POSTECH/NIPQ": "b0da822793625047378a9b9f25b35939383a0e9e",
    "IST-DASLab/HALO": "d8c1dc9b669ba80fcc95f1e5ff0fde301604a65a",
    "LiqunMa/FBI-LLM": "ec98ddd29eb450014f9381ac1cbe6936bf44a3a9",
    "Xingrun-Xing/BiPFT": "63ec0a0a63ddb8838c66f5acb121c58fc2c068ed",
    "facebookresearch/SpinQuant": "8f47aa3f00e8662caf1a484153920a07e5281c3a",
    "htqin/BiBERT": "91fd347eefc490a87275e66be68bfceb27837aee",
    "intel/neural-compressor": "9b47d09b8d135cdc73ea206e225892825ad700ca",
    "itayhubara/CalibTIP": "8bffbe450fd48351b23bf873c59fb60ece5143d7",
    "mit-han-lab/llm-awq": "d6e797a42b9ef7778de8ee2352116e0f48a78d61",
    "mit-han-lab/smoothquant": "c61476d728e42ae0d8a35e7e78494edcac3237b5",
    "ruikangliu/FlatQuant": "9d88ffcb7d2c6bda59fb5c44dad36adc101aadb1",
    "spcl/QuaRot": "5008669b08c1f11f9b64d52d16fddd47ca754c5a",
    "utkarsh-dmx/project-resq": "cb87d0d059455858daaa66f7410da4afebee978a",
    "yhhhli/BRECQ": "e455d62e93c70351961f8991c913b59435bd165f",
    "yxli2123/LoftQ": "ae33fd4fd05fd4ba146555cd77c13d307eb4e9b3",
    "zhutmost/lsq-net": "1f644e9b45925354503f2e2d070c56ae8b552202",
    "zjq0455/PTQ1.61": "4561118843d4f042ce8918c364f962b54dcd2aa1",
}


def repository(name: str) -> Path:
    """The folder of a checkout."""
    return Path(os.environ.get("IDENTITY_REPOSITORIES", "")) / name.replace("/", "+")


def checked_out(name: str) -> bool:
    return bool(os.environ.get("IDENTITY_REPOSITORIES")) and repository(name).is_dir()


def source(name: str) -> dict[str, str]:
    """What a pair says of a repository as its peer."""
    return {"peer": name, "version": COMMITS[name][:12]}


class Unneeded(MagicMock):
    """A module of which nothing is needed; what it would decorate stays as it is."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        if len(given) == 1 and isinstance(given[0], types.FunctionType) and not named:
            return given[0]
        return super().__call__(*given, **named)


def loaded(
    name: str, module: str, root: str = "", packages: Iterable[str] = (), without: Iterable[str] = ()
) -> Any:
    """A module of a repository, found from the folder `root` in it. `packages` are those of its packages
    whose own start is passed by, `without` what it imports and nothing here needs: a CUDA extension, its own
    training scripts. Its modules are known by their names only while it is read, as several repositories use
    the same ones.
    """
    folder = repository(name) / root
    before = dict(sys.modules)
    for unneeded in without:
        sys.modules[unneeded] = Unneeded(name=unneeded, __path__=[], __spec__=None)
    for package in packages:
        made = types.ModuleType(package)
        made.__path__ = [str(folder / package.replace(".", "/"))]
        sys.modules[package] = made
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
        for key, found in list(sys.modules.items()):
            file = getattr(found, "__file__", None) or ""
            if key in without or key in packages or str(file).startswith(str(repository(name))):
                sys.modules.pop(key)
                if key in before:
                    sys.modules[key] = before[key]
