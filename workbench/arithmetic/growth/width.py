"""Width: hidden channels, heads and neurons become `times` as many, copies of those that are there.

With k copies of every channel a matrix is k copies of its rows, and its columns are divided by k; norms see
the mean and the variance that they saw. Heads are copied whole, so their size and the positions stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.arithmetic.growth.growth import GROWTH, built, config_of
from workbench.arithmetic.sources import block_of
from workbench.axis import Options, parameter
from workbench.errors import BadInput
from workbench.subjects.structure.skeleton import skeleton

#: Fields of configurations that a width multiplies.
FIELDS = (
    *("hidden_size", "n_embd", "d_model", "dim"),
    *("num_attention_heads", "n_head", "num_heads", "n_heads", "num_key_value_heads"),
    *("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim"),
)
#: Matrices that hold several side by side: queries, keys and values, or gates and values.
PARTS = {"c_attn": 3, "gate_up_proj": 2}


class Cloned(Options):
    noise: float = parameter(
        0.0,
        "signal-to-noise ratio of what is added to one copy and taken from the next; 0: none",
        ge=0,
        le=200,
        unit="dB",
    )


@GROWTH.add(
    "hypercloning",
    formula="W -> (1/k) [[W, W], [W, W]], x -> [x; x]; with noise W + N and W - N side by side",
    source="Samragh et al. 2024, HyperCloning, section 3; the authors' code",
    title="HyperCloning",
    options=Cloned,
    traits=("preserving", "width"),
)
def hypercloning(model: nn.Module, times: int, options: Cloned) -> nn.Module:
    """Tile every weight; the noise that may be added cancels at the start."""
    return widened(model, times, options.noise)


@GROWTH.add(
    "fpi",
    formula="W -> W[g_out, :][:, g_in] / copies of each input, g(i) = i mod n",
    source="Chen et al. 2022, bert2BERT, eqs. 4 to 6",
    title="bert2BERT: function-preserving initialization",
    traits=("preserving", "width"),
)
def fpi(model: nn.Module, times: int, options: Options) -> nn.Module:
    """Rows and columns by one map of new to old units: the same weights as HyperCloning without noise."""
    return widened(model, times)


@GROWTH.add(
    "aki",
    formula="rows of block l, then for the new units the rows of block l + 1; columns as in fpi",
    source="Chen et al. 2022, bert2BERT, eqs. 7 to 9",
    title="bert2BERT: advanced knowledge initialization",
    traits="width",
)
def aki(model: nn.Module, times: int, options: Options) -> nn.Module:
    """What the block above knows breaks the symmetry of the copies; the function does not stay."""
    return widened(model, times, next_block=True)


@torch.no_grad()
def widened(model: nn.Module, times: int, noise: float = 0.0, next_block: bool = False) -> nn.Module:
    """The class at `times` the width, every tensor made of copies.

    noise : dB, see `Cloned`;  next_block : the copies beyond the first are those of the block above
    """
    config = config_of(model)
    named = config.to_dict()
    for field in FIELDS:
        if isinstance(named.get(field), int):
            setattr(config, field, times * named[field])
    tied = tied_head(model)
    if tied:
        config.tie_word_embeddings = False
    shapes = skeleton(model, config)
    state: dict[str, Tensor] = {}
    held = model.state_dict()
    for name, value in held.items():
        if name not in shapes:
            raise BadInput(
                f"method: {type(model).__name__} at another width has no {name}; it cannot grow so"
            )
        above = held.get(name_above(name)) if next_block else None
        grown = tiled(model, name, value, shapes[name], value if above is None else above, noise)
        state[name] = grown * head_scale(model, times) if name == tied else grown
    return built(model, config, state)


def tiled(
    model: nn.Module, name: str, value: Tensor, shape: tuple[int, ...], above: Tensor, noise: float
) -> Tensor:
    """A tensor at its new shape: inputs first, divided by their copies, then outputs."""
    inward = input_axis(model, name, value)
    rows = [value, above]
    if inward is not None and (count := copies(name, value.shape[inward], shape[inward])) > 1:
        rows = [torch.cat([each] * count, inward) / count for each in rows]
    else:
        count = 1
    first, other = rows
    for axis, size in enumerate(value.shape):
        if axis == inward or (times := copies(name, size, shape[axis])) == 1:
            continue
        parts = parts_of(name)
        pairs = zip(first.chunk(parts, axis), other.chunk(parts, axis), strict=True)
        first = torch.cat([piece for own, upper in pairs for piece in (own, *[upper] * (times - 1))], axis)
    if noise and inward is not None and count > 1 and block_of(name):
        first = first + cancelling(first, inward, count, noise)
    return first


def parts_of(name: str) -> int:
    """How many matrices a tensor holds side by side along its outputs."""
    return PARTS.get(name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2], 1)


def copies(name: str, before: int, after: int) -> int:
    if after % before:
        raise BadInput(f"method: {name} would be {after} for {before}; widths grow by whole multiples")
    return after // before


def cancelling(weight: Tensor, axis: int, count: int, noise: float) -> Tensor:
    """Noise that a sum over copies of the inputs does not see: added to one copy, taken from the next."""
    pieces = weight.chunk(count, axis)
    found = []
    for which in range(0, count - 1, 2):
        drawn = torch.randn(pieces[which].shape)
        size = (pieces[which].square().mean() / 10 ** (noise / 10) / drawn.square().mean()).sqrt()
        found += [size * drawn, -size * drawn]
    found += [torch.zeros_like(pieces[-1])] * (count % 2)
    return torch.cat(found, axis)


def input_axis(model: nn.Module, name: str, value: Tensor) -> int | None:
    """The axis that a product sums over; None for what is looked up, added or multiplied."""
    path, _, tensor = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding) or value.ndim < 2:
        return None
    if isinstance(module, Conv1D):
        return 0
    if value.ndim == 3 and "experts" in type(module).__name__.lower():
        return 1 if getattr(module, "is_transposed", False) else 2
    return 1 if value.ndim == 2 and tensor == "weight" else None


def tied_head(model: nn.Module) -> str:
    """The name of a head whose weight is the embeddings' too; "" where it has its own, or there is none."""
    asked: Any = getattr(model, "get_output_embeddings", lambda: None)()
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if asked is None or embedding is None or asked.weight is not embedding.weight:
        return ""
    return next(f"{path}.weight" for path, module in model.named_modules() if module is asked)


def head_scale(model: nn.Module, times: int) -> float:
    """What a head has to make up for where its input is divided by the root of the width (T5)."""
    return times**0.5 if getattr(config_of(model), "scale_decoder_outputs", False) else 1.0


def name_above(name: str) -> str:
    """The name of the same tensor in the next block; its own outside of blocks."""
    block = block_of(name)
    if not block:
        return name
    path, _, number = block.rpartition(".")
    return f"{path}.{int(number) + 1}{name.removeprefix(block)}"
