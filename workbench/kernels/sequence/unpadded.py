"""Drop-in unpadded execution of Hugging Face BERT and Llama models:
same weights, same call, same outputs, no work on padding.

`unpad(model)` changes how the model's trunk runs: tokens are packed by the attention mask (sorted by length),
embeddings, linears and norms see (1, tokens, hidden), attention runs per sequence (`varlen_attention`),
and the result is unpacked to the padded shape with zeros at the padding. The heads on top are untouched. Zeng
et al. (2022); prepacked prompts with the key-value cache handed back per sequence: Zhao et al. (2024).

Where this departs from them: one kernel runs over all lengths, in place of a stream for each group of
lengths; a batch is one packed row, in place of bins under block-diagonal masks (`packing.bin_pack` makes
those); sequences are exchanged between processes by no loader (`packing.balance` says how they would be);
linears, norms and activations are the model's own, unfused.

>>> from transformers import BertConfig, BertModel
>>> sizes = {"hidden_size": 32, "intermediate_size": 64}
>>> config = BertConfig(vocab_size=50, num_hidden_layers=2, num_attention_heads=4, **sizes)
>>> model = BertModel(config).eval()
>>> ids, mask = torch.randint(0, 50, (2, 6)), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
>>> padded = model(ids, attention_mask=mask).last_hidden_state
>>> packed = unpad(model)(ids, attention_mask=mask).last_hidden_state
>>> bool(torch.allclose(packed, padded * mask[..., None], atol=1e-5))
True
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from workbench.errors import BadInput
from workbench.kernels.backend import HAS_TRITON
from workbench.kernels.sequence.attention import varlen_attention
from workbench.kernels.sequence.packing import Packing, pack, pack_mask, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=torch.nn.Module)

#: Trunks whose attention goes through the transformers attention interface with nothing but q, k, v,
#: scaling and dropout.
TRUNKS = ("BertModel", "RobertaModel", "LlamaModel", "MistralModel", "Qwen2Model")
_ATTENTION = "workbench_packed"
_REPLACED = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)  # all of these compute the same function


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface of transformers: q, k, v (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    if packing is None:
        raise BadInput(
            "attention without a packing: this attention is set by `unpad` for the packed forward only"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", False))
    window = None if sliding_window is None else sliding_window - 1
    out = varlen_attention(
        q, k, v, packing, left=window, right=0 if causal else None, scale=scaling, dropout=dropout
    )
    return out.unsqueeze(0), None


@functools.lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _packed_attention)


def trunk_of(model: torch.nn.Module) -> torch.nn.Module:
    """The one BERT-like or Llama-like trunk inside `model`;
    `BadInput` when there is none, or a decoder BERT.
    """
    found = [module for module in model.modules() if type(module).__name__ in TRUNKS]
    if len(found) != 1:
        raise BadInput(
            f"{type(model).__name__}: has {len(found)} trunks that can be unpadded; "
            f"exactly one of {', '.join(TRUNKS)} is needed"
        )
    config = found[0].config
    if type(found[0]).__name__ in TRUNKS[:2] and (
        getattr(config, "is_decoder", False)
        or getattr(config, "position_embedding_type", "absolute") != "absolute"
    ):
        raise BadInput(f"{type(model).__name__}: only encoders with absolute positions can be unpadded")
    return found[0]


@contextlib.contextmanager
def _attention_set(trunk: Any, name: str) -> Iterator[None]:
    configs = {id(m.config): m.config for m in trunk.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


def _positions(trunk: Any, packing: Packing, input_ids: torch.Tensor | None) -> torch.Tensor:
    """Position ids as the padded model would give them, packed: (1, tokens)."""
    if type(trunk).__name__ == "RobertaModel" and input_ids is not None:
        real = input_ids.ne(trunk.embeddings.padding_idx)
        positions = real.long().cumsum(1) * real + trunk.embeddings.padding_idx
        return pack(positions, packing).unsqueeze(0)
    offset = trunk.embeddings.padding_idx + 1 if type(trunk).__name__ == "RobertaModel" else 0
    return (packing.columns + offset).unsqueeze(0)


def _unpack_cache(cache: Any, packing: Packing) -> Any:
    """Each layer's keys and values (1, heads, tokens, dim) -> (batch, heads, length, dim),
    as decoding expects them.
    """
    for layer in cache.layers:
        for name in ("keys", "values"):
            packed = getattr(layer, name).squeeze(0).transpose(0, 1)  # (tokens, heads, dim)
            setattr(layer, name, unpack(packed, packing).transpose(1, 2).contiguous())
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = packing.length
    return cache


def _packed_forward(trunk: Any, padded: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
    call = dict(signature.bind_partial(*args, **kwargs).arguments)
    call.update(call.pop("kwargs", {}))
    mask, cache, return_dict = (
        call.pop("attention_mask", None),
        call.get("past_key_values"),
        call.pop("return_dict", True),
    )
    grid = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    decoding = cache is not None and cache.get_seq_length() > 0
    if grid is None or decoding or call.get("encoder_hidden_states") is not None:
        return padded(*args, **kwargs)  # one new token per sequence has no padding to leave out
    if call.get("output_attentions") or getattr(trunk.config, "output_attentions", False):
        raise BadInput(
            "output_attentions = True: unpadded attention never forms the attention matrices; "
            "call repad(model) first"
        )
    if mask is None:
        mask = torch.ones(grid.shape[:2], dtype=torch.long, device=grid.device)
    if mask.ndim != 2 or mask.shape != grid.shape[:2]:
        raise BadInput(
            f"attention_mask.shape = {tuple(mask.shape)}: a {tuple(grid.shape[:2])} mask of 0 and 1 is "
            "needed to unpad"
        )
    packing = pack_mask(mask)
    if not packing.tokens:
        return padded(*args, **kwargs)
    positions = call.pop("position_ids", None)
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if call.get(name) is not None:
            call[name] = pack(call[name].expand(*grid.shape[:2], *call[name].shape[2:]), packing).unsqueeze(0)
    if positions is None:
        call["position_ids"] = _positions(trunk, packing, grid if grid.ndim == 2 else None)
    else:
        call["position_ids"] = pack(positions.expand(grid.shape[:2]), packing).unsqueeze(0)
    with _attention_set(trunk, _ATTENTION):
        outputs = padded(**call, packing=packing, return_dict=True)
    outputs.last_hidden_state = unpack(outputs.last_hidden_state.squeeze(0), packing)
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(unpack(h.squeeze(0), packing) for h in outputs.hidden_states)
    if (
        outputs.get("pooler_output") is not None
    ):  # the trunk pooled the first packed token; pool each sequence's
        outputs.pooler_output = trunk.pooler(outputs.last_hidden_state)
    if outputs.get("past_key_values") is not None:
        outputs.past_key_values = _unpack_cache(outputs.past_key_values, packing)
    return outputs if return_dict else outputs.to_tuple()


def unpad(model: Model) -> Model:
    """Make `model` skip its padding from now on, in place; returns it. `repad` undoes it.

    Outputs equal the padded model's at every valid token to rounding (fp32: 1e-5) and are zero at
    the padding. Training works (dropout draws different random numbers than the padded model). Prefill fills
    the key-value cache in the padded layout; decoding steps run as before. Raises `BadInput` for other
    architectures, for an attention of one's own (quantized operands, say) and for attention matrices.
    """
    trunk: Any = trunk_of(model)
    if "_padded_forward" in trunk.__dict__:
        return model
    if (attention := trunk.config._attn_implementation) not in _REPLACED:
        raise BadInput(
            f"attention {attention!r} is not the library's own and would be left out; "
            f"unpad a model whose attention is one of {_REPLACED[1:]}"
        )
    _register()
    padded = trunk.forward
    signature = inspect.signature(type(trunk).forward)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    @functools.wraps(padded)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _packed_forward(trunk, padded, signature, *args, **kwargs)

    trunk.__dict__["_padded_forward"] = padded
    trunk.forward = forward
    return model


def repad(model: Model) -> Model:
    """Undo `unpad`."""
    trunk: Any = trunk_of(model)
    if trunk.__dict__.pop("_padded_forward", None) is not None:
        del trunk.__dict__["forward"]
    return model


def is_unpadded(model: torch.nn.Module | PreTrainedModel) -> bool:
    """Whether `unpad` is in force."""
    return any("_padded_forward" in module.__dict__ for module in model.modules())


def worthwhile(model: torch.nn.Module) -> bool:
    """Whether leaving padding out is faster here: the model is on a GPU that Triton has kernels for."""
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.is_cuda and HAS_TRITON


@contextlib.contextmanager
def unpadded(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model skips its padding where that is possible and `worthwhile`; elsewhere nothing changes.

    For forward passes whose outputs at the padding nobody reads.
    """
    possible = worthwhile(model) and not is_unpadded(model)
    try:
        if possible:
            unpad(model)
    except BadInput:  # another architecture, an attention of one's own
        possible = False
    try:
        yield
    finally:
        if possible:
            repad(model)
