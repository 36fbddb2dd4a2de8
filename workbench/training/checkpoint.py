"""Training state on disk: every tensor in one safetensors file, everything else in JSON;
never pickle, never half written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import BadInput
from workbench.results import plain
from workbench.storage import replacing

TENSOR = "tensor:"


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON-able copy of a nested state; tensors move to `tensors` and leave their key behind.
    Dict keys keep their type.
    """
    if isinstance(value, Tensor):
        # the order of dimensions in memory is kept: matrix products of a transposed matrix round differently
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda d: -strides[d])
        tensors[path] = value.detach().cpu().permute(order).contiguous().clone()
        return TENSOR + ",".join(map(str, order)) + TENSOR + path
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise BadInput(
        f"checkpoint: {path} holds a {type(value).__name__}, which cannot be stored without pickle"
    )


def restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, str) and value.startswith(TENSOR):
        _, order, path = value.split(TENSOR, 2)
        inverse = {int(d): i for i, d in enumerate(order.split(","))} if order else {}
        # cloned: tensors of a mapped file are not aligned as allocated ones are,
        # and products of them may round differently
        return tensors[path].clone().permute([inverse[d] for d in range(len(inverse))])
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "dict":
            return {key: restore(item, tensors) for key, item in items}
        return (tuple if kind == "tuple" else list)(restore(item, tensors) for item in items)
    return value


def save(folder: Path, state: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Write a checkpoint folder; the one it replaces stays whole until the new one is."""
    tensors: dict[str, Tensor] = {}
    content = flatten(state, "", tensors)
    with replacing(Path(folder)) as draft:
        draft.mkdir()
        save_file(tensors, draft / "state.safetensors")
        (draft / "state.json").write_text(json.dumps({"state": content, "history": history}, default=plain))


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Read a checkpoint folder; `BadInput` when it is absent or damaged."""
    folder = Path(folder)
    try:
        content = json.loads((folder / "state.json").read_text())
        return restore(content["state"], load_file(folder / "state.safetensors")), content["history"]
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise BadInput(
            f"checkpoint: {str(folder)!r} cannot be read ({type(error).__name__}: {error}); "
            "delete it to start anew"
        ) from None


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators that dropout and stochastic rounding draw from."""
    found: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
