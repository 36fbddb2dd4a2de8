"""Code that others published in a repository and not in a package: read from checkouts, never copied here.

`IDENTITY_REPOSITORIES` names a folder that holds `owner+name` for each of them, at the commit below.
"""

from __future__ import annotations

import os
from pathlib import Path

COMMITS = {
    "AGI-Arena/MARS": "4831e28eba863a4e69d7e9474ff8e73bc1b410fe",
    "EleutherAI/gpt-neox": "ea7aefd8f8e183256992d9fede4d7c71a46d67a5",
    "IBM/dolomite-engine": "d0ee186128e8b8dfff7c1f90390398fdabc75be7",
    "LIONS-EPFL/scion": "f58a393e010395a5913176be5673d8839caa6285",
    "Mohammad-Mozaffari/mkor": "3a0e3bb2df346851569e98799d0f340556bad811",
    "Sense-X/AGVM": "b60d59813d238f4c7a37cf85ac51203f408c85e4",
    "asteroidhouse/self-tuning-networks": "3c4204993343b09a413588e063ebcf0cff3d64fd",
    "jdinalt/forgather": "f92f8b8b0940451edcd5642f516514e96aa2dd7e",
    "joe-siyuan-qiao/pytorch-classification": "e6355f829e85ac05a71b8889f4fff77b9ab95d0b",
    "microsoft/DeepSpeed": "38327e07f6cd39b63418f60cedd1651b0be3e7c3",
    "nikhilvyas/SOAP": "a1e553530fde97d0e6b307d7c82ac6d38b072340",
    "phess2/lipschitz-transformers": "9173461c4a0fc8c78c0deb76c0b0a6d593b95eb2",
    "step-law/steplaw": "32a8f4cc50247695fb56cc6c9117abdf67c97763",
    "timlautk/AdAdaGrad": "cc126fba4b57c8ea1ffcd5ff5d30dc8891bf9f17",
}


def repository(name: str) -> Path:
    """The folder of a checkout."""
    return Path(os.environ.get("IDENTITY_REPOSITORIES", "")) / name.replace("/", "+")


def checked_out(name: str) -> bool:
    return bool(os.environ.get("IDENTITY_REPOSITORIES")) and repository(name).is_dir()


def source(name: str) -> dict[str, str]:
    """What a pair says of a repository as its peer."""
    return {"peer": name, "version": COMMITS[name][:12]}
