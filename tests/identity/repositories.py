"""Code that others published in a repository and not in a package: read from checkouts, never copied here.

`IDENTITY_REPOSITORIES` names a folder that holds `owner+name` for each of them, at the commit below.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

COMMITS = {
    "AGI-Arena/MARS": "4831e28eba863a4e69d7e9474ff8e73bc1b410fe",
    "CASIA-IVA-Lab/FLAP": "3bb57db3449dd2fa04a5c2192de80e87e33be2b1",
    "DeepWok/mase": "6ff398cf4c01a008540fd5ff2431f6e0740b4c5b",
    "ECoLab-POSTECH/NIPQ": "b0da822793625047378a9b9f25b35939383a0e9e",
    "EleutherAI/gpt-neox": "ea7aefd8f8e183256992d9fede4d7c71a46d67a5",
    "FasterDecoding/BitDelta": "ecbee1e28f6b02444d535e0a165b48cba3fe217a",
    "IBM/dolomite-engine": "d0ee186128e8b8dfff7c1f90390398fdabc75be7",
    "IST-DASLab/DarwinLM": "3596da3973224da83255363a4fbe6757d569dc8c",
    "IST-DASLab/HALO": "d8c1dc9b669ba80fcc95f1e5ff0fde301604a65a",
    "IST-DASLab/OBC": "9b7979bfc9ee20d87db553823a32ee9890beaa99",
    "JarvisPei/PreMoe": "22780f107ed3ec7469fb76941f3de4e01371077d",
    "LIONS-EPFL/scion": "f58a393e010395a5913176be5673d8839caa6285",
    "LLIKKE/HEAPr": "9c101aa96e3f222cd5109eb884eee614f479550b",
    "LiqunMa/FBI-LLM": "ec98ddd29eb450014f9381ac1cbe6936bf44a3a9",
    "Mohammad-Mozaffari/mkor": "3a0e3bb2df346851569e98799d0f340556bad811",
    "Mohammad-Mozaffari/slope": "451f0bc5fd29db9b3fe0f17893d653f66f6ca40c",
    "Sense-X/AGVM": "b60d59813d238f4c7a37cf85ac51203f408c85e4",
    "Shiweiliuiiiiiii/In-Time-Over-Parameterization": "1b6a89e6a467c8fc09f5c9571927ca5ad7c7ef00",
    "Xingrun-Xing/BiPFT": "63ec0a0a63ddb8838c66f5acb121c58fc2c068ed",
    "ZIB-IOL/PERP": "0d4554b512cbd3c71225bf917e7886dccdbaabfe",
    "alibaba/AliceMind": "a6d5afe5c272960ce61dc73adb0877bc94b5d664",
    "amazon-science/icbs": "7d50aab905d68645f35e1db902e1c17e237911ee",
    "apple/ml-hypercloning": "7c4e80bfc5329980c50946cd9baab0bb3109cc68",
    "arcee-ai/PruneMe": "faee6c9dfb70841e8355908ecded2b25298cffc0",
    "arcee-ai/mergekit": "a6e402884ba9bc30da7f23e8304a35f19485de95",
    "asteroidhouse/self-tuning-networks": "3c4204993343b09a413588e063ebcf0cff3d64fd",
    "duguodong7/pcb-merging": "5897888b5d24adfcd33e124793d113746e00f3ff",
    "facebookresearch/SpinQuant": "8f47aa3f00e8662caf1a484153920a07e5281c3a",
    "ganguli-lab/Synaptic-Flow": "9dfa57aa4012c34028ee646d367f18e32f0e3bc7",
    "horseee/LLM-Pruner": "128a07d977f9b205d60ab14cfbc6a78f8a8e39d2",
    "htqin/BiBERT": "91fd347eefc490a87275e66be68bfceb27837aee",
    "huggingface/nn_pruning": "0cef2b2435d575f141feb12885f632b173df8f93",
    "huggingface/transformers-research-projects": "fccd0cdab03c1407bb7def05e1b48528fc817078",
    "intel/neural-compressor": "9b47d09b8d135cdc73ea206e225892825ad700ca",
    "itayhubara/CalibTIP": "8bffbe450fd48351b23bf873c59fb60ece5143d7",
    "jdinalt/forgather": "f92f8b8b0940451edcd5642f516514e96aa2dd7e",
    "joe-siyuan-qiao/pytorch-classification": "e6355f829e85ac05a71b8889f4fff77b9ab95d0b",
    "kriskrisliu/PAT": "25cce191cb08feaead91355ee68e2054fb832d90",
    "landskape-ai/Progressive-Pruning": "784063343566284ddcee79dd0d239344a8d1ecad",
    "microsoft/DeepSpeed": "38327e07f6cd39b63418f60cedd1651b0be3e7c3",
    "mit-han-lab/llm-awq": "d6e797a42b9ef7778de8ee2352116e0f48a78d61",
    "mit-han-lab/smoothquant": "c61476d728e42ae0d8a35e7e78494edcac3237b5",
    "neuralmagic/sparseml": "1c04a016c830b0ccfbb0402e291405a2252c19a6",
    "nikhilvyas/SOAP": "a1e553530fde97d0e6b307d7c82ac6d38b072340",
    "phess2/lipschitz-transformers": "9173461c4a0fc8c78c0deb76c0b0a6d593b95eb2",
    "research4pan/AdaptPruner": "56658762e72461a3be05e210e83464c685422cd6",
    "ruikangliu/FlatQuant": "9d88ffcb7d2c6bda59fb5c44dad36adc101aadb1",
    "shuyao-wang/DSL": "a93cc5d6cc343222b42f18811a6777c76187e312",
    "spcl/QuaRot": "5008669b08c1f11f9b64d52d16fddd47ca754c5a",
    "sramshetty/ShortGPT": "78d9615fdcae6d90368832bd0a86c49c323549b9",
    "step-law/steplaw": "32a8f4cc50247695fb56cc6c9117abdf67c97763",
    "talswisa/SubTuning": "68b64c24ad0b5053d4ad2b79d0c6c459c327c5a4",
    "thu-ml/Adaptive-Sparse-Trainer": "723d742db507af47316043306f9797dca7af8ba2",
    "timlautk/AdAdaGrad": "cc126fba4b57c8ea1ffcd5ff5d30dc8891bf9f17",
    "utkarsh-dmx/project-resq": "cb87d0d059455858daaa66f7410da4afebee978a",
    "yhhhli/BRECQ": "e455d62e93c70351961f8991c913b59435bd165f",
    "yule-BUAA/MergeLM": "6d49ad96fd69c92013654b837041b868aa806564",
    "yxli2123/LoftQ": "ae33fd4fd05fd4ba146555cd77c13d307eb4e9b3",
    "zhutmost/lsq-net": "1f644e9b45925354503f2e2d070c56ae8b552202",
    "zjq0455/PTQ1.61": "4561118843d4f042ce8918c364f962b54dcd2aa1",
}


#: Modules that `absent` has made, until the file that asks for them has been read.
STANDING_IN: list[str] = []


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


def absent(name: str, **holding: Any) -> None:
    """Put a module in the place of one that a file imports, and of which nothing here needs more."""
    if name not in sys.modules and not holding and importlib.util.find_spec(name.split(".")[0]) is not None:
        return
    if name not in sys.modules:
        STANDING_IN.append(name)
    made = sys.modules.setdefault(name, types.ModuleType(name))
    for key, value in holding.items():
        setattr(made, key, value)


def loaded(
    name: str, module: str, root: str = "", packages: Iterable[str] = (), without: Iterable[str] = ()
) -> Any:
    """A module of a repository, found from the folder `root` in it. `packages` are those of its packages
    whose own start is passed by, `without` what it imports and nothing here needs: a CUDA extension, its own
    training scripts. Its modules are known by their names only while it is read, as several repositories use
    the same ones.
    """
    return read(repository(name) / root, module, packages, repository(name), without)


def part_of(package: str, module: str, packages: Iterable[str]) -> Any:
    """A module of an installed package, past the start of its `packages`, which may ask for others."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations))).parent
    return read(folder, module, packages, folder / package)


def read(
    folder: Path, module: str, packages: Iterable[str], within: Path, without: Iterable[str] = ()
) -> Any:
    before = {name: found for name, found in sys.modules.items() if name not in STANDING_IN}
    own = {file.stem for file in folder.iterdir()} - {*sys.stdlib_module_names}
    for name in before:  # another repository's module of the same name
        if name.partition(".")[0] in own:
            sys.modules.pop(name)
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
        while STANDING_IN:
            sys.modules.pop(STANDING_IN.pop(), None)
        for key, found in list(sys.modules.items()):
            file = getattr(found, "__file__", None) or ""
            if key in without or key in packages or str(file).startswith(str(within)):
                sys.modules.pop(key)
        sys.modules |= {name: found for name, found in before.items() if name not in sys.modules}
