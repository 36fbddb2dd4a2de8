"""What a GGUF file says of a model besides its numbers, and the names of its tensors: llama.cpp's, for the
architectures that `transformers` reads back to the same configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import BadInput, notice
from workbench.subjects.changes import original_of, stacks_of
from workbench.subjects.gguf_files import gguf_config


@dataclass(frozen=True)
class Target:
    """An architecture of llama.cpp.

    paired : rows of the query and key projections go in the order in which a rotation pairs neighbours;
        transformers' classes pair the halves of a head
    """

    name: str
    paired: bool = False


#: transformers' model type -> the architecture that computes the same.
TARGETS = {
    "llama": Target("llama", paired=True),
    "mistral": Target("llama", paired=True),
    "qwen2": Target("qwen2"),
    "qwen3": Target("qwen3"),
}
#: Settings that change no output, and the ones that a file says in another way.
ASIDE = {
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_window_layers",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "sliding_window",
    "tie_word_embeddings",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}


def target_of(model: nn.Module) -> Target:
    """llama.cpp's architecture of a model; `BadInput` names the accepted ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in TARGETS or type(model).__name__ != CLASSES[kind]:
        accepted = ", ".join(str(CLASSES[name]) for name in TARGETS)
        raise BadInput(f"gguf: the model is a {type(model).__name__}; accepted are {accepted}")
    return TARGETS[kind]


def base_of_rotation(config: Any) -> float:
    """The base of the rotary angles; `BadInput` where they are scaled."""
    rotary = config.rope_parameters or {}
    kind = rotary.get("rope_type", "default")
    if kind != "default":
        raise BadInput(
            f"gguf: rotary angles are scaled ({kind}), which transformers does not read from a GGUF file; "
            "accepted are plain ones"
        )
    return float(rotary.get("rope_theta", 10000.0))


def context_of(config: Any) -> int:
    """Tokens that a reader may give; those that a window of attention does not cut, for there is no place
    for a window.
    """
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window is None or window >= length:
        return length
    notice(f"gguf: the file has no place for the attention's window; it is for up to {window} tokens")
    return int(window)


def add_metadata(writer: Any, config: Any, name: str, file_type: int, length: int) -> None:
    """The configuration in a `gguf.GGUFWriter`, for a context of `length` tokens."""
    from gguf.constants import GGML_QUANT_VERSION

    head = head_size(config)
    writer.add_type("model")
    writer.add_name("Mistral" if name == "mistral" else name)  # the one name that transformers acts upon
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(base_of_rotation(config))


def head_size(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def check_header(header: Path, config: Any) -> None:
    """`BadInput` for a setting that `transformers` reads otherwise from the file, or not at all."""
    mine, theirs = config.to_dict(), gguf_config(header).to_dict()
    for name in sorted((mine.keys() & theirs.keys()) - ASIDE - {"max_position_embeddings"}):
        if not same(mine[name], theirs[name]):
            raise BadInput(
                f"gguf: the model's {name} is {shown(mine[name])}, which has no place in a GGUF file: "
                f"it is read as {shown(theirs[name])}; save the subject, or export another"
            )


def same(mine: Any, theirs: Any) -> bool:
    """Equal, floats up to the rounding of float32, in which a file has them."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, float) or isinstance(theirs, float):
        numbers = all(isinstance(v, (int, float)) for v in (mine, theirs))
        return numbers and abs(mine - theirs) <= 1e-6 * abs(mine)
    return bool(mine == theirs)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, its tensor's name) of every weight as it was before anything was put on it; one that
    several modules share once.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for name in (*own, *stacks_of(module)):
            held = original_of(module, name)
            if id(held) not in seen:
                seen.add(id(held))
                yield f"{path}.{name}" if path else name, module, name


def tensor_names(target: Target, blocks: int, names: Iterable[str]) -> dict[str, str]:
    """transformers' name -> llama.cpp's; `BadInput` for a weight that has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == target.name)
    known, found = get_tensor_name_map(architecture, blocks), dict[str, str]()
    for name in names:
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise BadInput(f"gguf: {name} has no name in the architecture {target.name}; save the subject")
        found[name] = theirs
    return found


def row_order(target: Target, name: str, config: Any) -> Tensor | None:
    """The order in which a tensor's rows are written, by llama.cpp's name; None as they are."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if not target.paired or part not in heads:
        return None
    size = head_size(config)
    return torch.arange(heads[part] * size).view(heads[part], 2, size // 2).mT.reshape(-1)
