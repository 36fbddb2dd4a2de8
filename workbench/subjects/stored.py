"""The number format that a checkpoint's weights have on disk: computing is float32, saving goes back to it
wherever no weight would be rounded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.storage.resident import cloned, disk

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def commonest(counts: Counter[str]) -> torch.dtype:
    """The format of most numbers: counts of safetensors' names for dtypes."""
    known = Counter({name: count for name, count in counts.items() if name in FLOATS})
    return FLOATS[known.most_common(1)[0][0]] if known else torch.float32


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The format a model was opened from; float32 for one that was made here."""
    found = getattr(model, "stored_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def dense_size(model: nn.Module) -> int:
    """Bytes of one weight of the checkpoint a model was opened from, 4 where it was made here."""
    return min(4, stored_dtype(model).itemsize)


def survives(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number of the weight is one of the narrower format."""
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)


def bytes_of_weights(model: nn.Module, weights: Iterable[Tensor]) -> int:
    """Bytes that one of these weights takes in a saved checkpoint."""
    dtype = stored_dtype(model)
    if dtype.itemsize < 4 and all(survives(weight.detach(), dtype) for weight in weights):
        return dtype.itemsize
    return 4


@torch.no_grad()
def narrow(model: nn.Module) -> bool:
    """Put the parameters that would not be rounded into the format the model was opened from, in place;
    True when some had to stay as they are.
    """
    dtype = stored_dtype(model)
    if dtype.itemsize >= 4:
        return False
    left = False
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and survives(parameter, dtype):
            narrow = parameter.data.to(dtype)
            parameter.data = narrow if disk() is None else cloned(narrow)
        elif parameter.is_floating_point():
            left = True
    return left


def declare_wide(folder: Path) -> None:
    """Say float32 in a saved config, so that others read every tensor without rounding it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
