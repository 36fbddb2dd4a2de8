"""GGUF files (llama.cpp's format) as subjects: checked before anything is built, dequantized to float32.

A file holds the model's configuration, its tokenizer and its tensors, most of them in blocks of 32 or 256
numbers with a scale (and a minimum) each. `transformers` maps names and shapes, the package `gguf` expands
the blocks; the weights are then ordinary float32 numbers that lie on the file's grid.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.errors import BadInput

MAGIC = b"GGUF"
#: What the reader raises for bytes that are not what the header promises.
DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError, struct.error)


def is_gguf(source: str | Path) -> bool:
    return str(source).lower().endswith(".gguf") and not os.path.isdir(source)


def check_gguf(file: Path) -> None:
    """Refuse, before anything is built, what is not a whole GGUF file: missing, another format, cut off, or
    no package that reads it.
    """
    if not os.path.isfile(file):
        raise BadInput(f"subject: {str(file)!r} is not a file; give the path of a GGUF file")
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start != MAGIC:
        raise BadInput(
            f"subject: {file.name} does not begin with {MAGIC.decode()!r} but with {start!r}; "
            "it is another format, or the download went wrong"
        )
    if importlib.util.find_spec("gguf") is None:
        raise BadInput(f"subject: {file.name} needs the package gguf, which reads it; pip install gguf")
    try:
        content = bounded(file)
        if not content.tensors:
            raise ValueError("it holds no tensors")
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or ["its header is cut off"])[0]
        raise BadInput(
            f"subject: {file.name} is not a complete GGUF file ({reason}); copy or download it again"
        ) from None
    for name, field in content.fields.items():
        if name.endswith(".block_count") and field.contents() > len(content.tensors):
            raise BadInput(
                f"subject: {file.name} says {name} {field.contents()} and holds {len(content.tensors)} "
                "tensors, fewer than the blocks; copy or download it again"
            )


def bounded(file: Path) -> Any:
    """`opened`, whose header is read no further than the file goes: a list in it may say any length."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"its header goes on to byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    return Bounded(file)


def opened(file: Path) -> Any:
    """The header, with the tensors' bytes mapped and not read."""
    from gguf import GGUFReader

    return GGUFReader(file)


def formats(file: Path) -> dict[str, int]:
    """Tensor type (Q4_1, F32, ...) -> number of weights stored in it, most first."""
    counts: Counter[str] = Counter()
    for tensor in opened(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counts.most_common())


def gguf_config(file: Path) -> Any:
    """The model's configuration, with the class of its task, which the file does not name."""
    import transformers
    from transformers.models.auto import modeling_auto

    try:
        config = transformers.AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a stranger's file in another library: anything can be raised
        field = opened(file).get_field("general.architecture")
        named = repr(field.contents()) if field is not None else "none"
        raise BadInput(
            f"subject: {file.name} has the architecture {named}, which transformers does not read "
            f"from a GGUF file ({str(error).strip().splitlines()[0]}); give the model's safetensors folder"
        ) from None
    if not config.architectures:
        for known in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ):
            if config.model_type in known:
                config.architectures = [known[config.model_type]]
                break
    if config.model_type == "qwen3":  # whose head size transformers takes for 128, whatever the file says
        config.head_dim = field_of(file, "attention.key_length") or config.head_dim
    return config


def field_of(file: Path, key: str) -> Any:
    """A number or text that the file says of its architecture; None when it does not."""
    content = opened(file)
    architecture = content.get_field("general.architecture")
    field = content.get_field(f"{architecture.contents()}.{key}") if architecture is not None else None
    return None if field is None else field.contents()


def unpacked(file: Path) -> dict[str, Any]:
    """The arguments that make `from_pretrained(file.parent, ...)` expand the file's blocks."""
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name}
    packed = getattr(transformers, "GgufConfig", None)
    return options if packed is None else options | {"quantization_config": packed(dequantize=True)}


@contextlib.contextmanager
def quiet_tensors() -> Iterator[None]:
    """Without the bar that transformers draws over the tensors whatever it was told about bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def plain(model: nn.Module) -> nn.Module:
    """The model without the notes of where it came from: its weights are float32 tensors like any other's."""
    held: Any = model
    if hasattr(held.config, "quantization_config"):
        del held.config.quantization_config
    for note in ("hf_quantizer", "quantization_method"):
        if note in vars(held):
            delattr(held, note)
    if getattr(held, "is_quantized", False):
        held.is_quantized = False
    held.config.dtype = torch.float32
    return model
