"""What a checkpoint's folder says of itself, read and checked before anything is built from it.

A local folder stays local: nothing that it names is fetched, and its files lie inside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import BadInput
from workbench.storage.writing import settle, told_of

#: bytes of one number, by the name that safetensors gives its dtype
SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
OURS = ("splits.safetensors", "changes.safetensors", "arrays.safetensors")
CONFIG_BYTES, HEADER_BYTES = 16 * 2**20, 100 * 2**20
#: attention kernels that transformers brings itself
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: ways to compute experts that transformers brings itself
EXPERTS = ("eager", "batched_mm", "grouped_mm")
#: fields of a config that count the blocks of a stack
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_blocks",
    "num_hidden_groups",
)
#: the endings of the tensors that quantized checkpoints hold instead of weights
PACKED = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".W_q",
    "_blocks",
)

#: what peft puts into the names of tensors, a part of its own
ADAPTED = re.compile(
    r"(^base_model\.model\.)|(^|\.)(base_layer|modules_to_save|lora_(A|B|E|ga|embedding_A|embedding_B"
    r"|magnitude_vector)|ia3_l|oft_[RrSs]|boft_[RrSs]|hada_[wt][12]\w*|lokr_\w+|vera_lambda_\w+"
    r"|prompt_embeddings|original_module|token_adapter)(\.|$)"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, by its header."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `BadInput` naming the file for anything else."""
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, more than {CONFIG_BYTES}")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"subject: {file.name} could not be read: {one_line(error)}; copy or save it again"
        ) from None
    if not isinstance(found, dict):
        raise BadInput(
            f"subject: {file.name} holds {type(found).__name__}, an object is needed; copy or save it again"
        )
    return found


def one_line(error: BaseException) -> str:
    """The first line of what an error says (and the one that it announces), or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if isinstance(error, KeyError) or not said:
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= 300 else f"{said[:297]}..."


def check_folder(folder: Path) -> None:
    """Refuse, before anything is built, a folder that is not a complete safetensors checkpoint, or one whose
    weights are an adapter's or no floats. A save into it that was interrupted is finished first.
    """
    with told_of(folder, "subject"):
        settle(folder)
    check_adapter(folder)
    if not (folder / "config.json").is_file() and not (folder / "workbench.json").is_file():
        raise BadInput(
            f"subject: folder {str(folder)!r} has no config.json; "
            "give a folder written by save_pretrained or by the workbench"
        )
    weights = [s for s in sorted(folder.glob("*.safetensors")) if s.name not in OURS]
    if not weights and not (folder / "model.safetensors.index.json").is_file():
        pickles = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in folder.glob(pattern)
        )
        if pickles:
            raise BadInput(
                f"subject: {str(folder)!r} holds only pickle weights ({pickles[0]}), "
                "which can run code when opened and are refused; "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise BadInput(
            f"subject: {str(folder)!r} holds no *.safetensors weights; save the model with save_pretrained"
        )
    tensors = tensors_in(folder)
    if part := adapter_in(sorted(tensors)):
        raise BadInput(f"subject: {str(folder)!r} holds an adapter ({part}), {one_whole()}")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        check_local(config)
        check_quantized(folder, config, tensors)
        check_depth(config, tensors)


def tensors_in(folder: Path) -> dict[str, Stored]:
    """name -> what the headers of a folder's weights say; every file is complete and every tensor in one."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        files = shards(folder, index)
    else:
        found = [s.name for s in sorted(folder.glob("*.safetensors")) if s.name not in OURS]
        raise BadInput(
            f"subject: {str(folder)!r} holds {found[0]}, but neither model.safetensors nor "
            "model.safetensors.index.json; rename the one file, or save the model with save_pretrained"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in header_of(file).items():
            if name in tensors:
                raise BadInput(
                    f"subject: {name} is in {tensors[name].file} and in {file.name}; copy one checkpoint only"
                )
            tensors[name] = stored
    if len(files) > 1 or files[0].name != "model.safetensors":
        check_index(index, tensors)
    for name in OURS:
        if (folder / name).is_file():
            header_of(folder / name)
    return tensors


def shards(folder: Path, index: Path) -> list[Path]:
    """The files of a sharded checkpoint: all that its index names, in its folder, and no others."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise BadInput(
            f"subject: {index.name}: weight_map must map names of tensors to files; copy or save it again"
        )
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise BadInput(
                f"subject: {index.name}: weight_map names {name!r}, which is no file of its own folder; "
                "put the shards beside their index"
            )
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise BadInput(
            f"subject: {index.name} names {missing[0]}, which is not in {str(folder)!r} ({len(missing)} "
            "missing in all); "
            "copy the whole checkpoint"
        )
    more = sorted({s.name for s in folder.glob("model-*-of-*.safetensors")} - set(names))
    if more:
        raise BadInput(
            f"subject: {str(folder)!r} holds {more[0]}, which {index.name} does not name; "
            "keep the files of one checkpoint in the folder"
        )
    return [folder / name for name in names]


def check_index(index: Path, tensors: dict[str, Stored]) -> None:
    """The index and the headers speak of the same tensors."""
    placed: dict[str, str] = read_json(index)["weight_map"]
    for name in sorted(placed.keys() | tensors.keys()):
        if name not in tensors:
            raise BadInput(
                f"subject: {index.name} promises {name}, which is in no file; copy the whole checkpoint"
            )
        if placed.get(name) != tensors[name].file:
            raise BadInput(
                f"subject: {name} is in {tensors[name].file}, but {index.name} says "
                f"{placed.get(name, 'nothing')}; copy or save the checkpoint again"
            )


def header_of(file: Path) -> dict[str, Stored]:
    """Compare the header's promise with the file's size:
    a truncated file is named before any tensor is read.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is cut off")
            if length > HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes, more than {HEADER_BYTES}")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        found = {name: entry(file, name, value) for name, value in header.items()}
        end = 0
        for name in sorted(header, key=lambda n: header[n]["data_offsets"]):
            start, stop = header[name]["data_offsets"]
            if start != end or stop - start != found[name].numel * SIZES[found[name].dtype]:
                raise ValueError(f"the bytes {start} to {stop} of {name} are not those of its shape")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"its header promises {end} bytes of tensors and it holds {size - 8 - length}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"subject: {file.name} is not a complete safetensors file: {one_line(error)}; "
            "copy or save it again"
        ) from None
    return found


def entry(file: Path, name: str, value: Any) -> Stored:
    """One line of a header, checked."""
    if not isinstance(value, dict):
        raise ValueError(f"what it says of {name} is no object")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    place: Any = value.get("data_offsets")
    if dtype not in SIZES:
        raise ValueError(f"{name} has the dtype {dtype!r}")
    for numbers, what in ((shape, "shape"), (place, "data_offsets")):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has the {what} {str(numbers)[:60]}")
    if len(place) != 2:
        raise ValueError(f"{name} has the data_offsets {str(place)[:60]}")
    return Stored(file.name, dtype, tuple(shape))


def check_adapter(folder: Path) -> None:
    """An adapter is a change of another model, no model."""
    file = folder / "adapter_config.json"
    if not file.is_file() and not (folder / "adapter_model.safetensors").is_file():
        return
    said = read_json(file) if file.is_file() else {}
    base = said.get("base_model_name_or_path")
    raise BadInput(
        f"subject: {str(folder)!r} holds an adapter ({str(said.get('peft_type') or 'of unknown kind')[:40]}"
        + (f" of {base[:80]!r}" if isinstance(base, str) and base else "")
        + f"), {one_whole()}"
    )


def one_whole() -> str:
    """What an adapter is not, and what to do with it."""
    return (
        "which is no whole model; merge it into its base (peft: merge_and_unload) and save that, "
        "or give the base"
    )


def adapter_in(names: list[str]) -> str:
    """The first name of a tensor that an adapter's program gave it; "" for none."""
    return next((name for name in names if ADAPTED.search(name)), "")


def walk(config: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """(path, field, value) of every field of a config, those inside others included."""
    if depth > 20:
        raise BadInput(f"subject: config.json: {path} is nested more than 20 deep; copy or save it again")
    if isinstance(config, dict):
        for field, value in config.items():
            yield f"{path}{field}", str(field), value
            yield from walk(value, f"{path}{field}.", depth + 1)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from walk(value, f"{path}{index}.", depth + 1)


def check_local(config: dict[str, Any]) -> None:
    """`BadInput` for a config that names what would be fetched from elsewhere."""
    for path, field, value in walk(config):
        names = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
        if field == "backbone" and value:
            raise BadInput(
                f"subject: config.json: {path} is {str(value)[:80]!r}, another model that would be fetched; "
                "a local folder is opened as it is: give a checkpoint that holds all of its weights"
            )
        if field.strip("_") in ("attn_implementation", "experts_implementation"):
            for name in names:
                if (
                    not isinstance(name, str)
                    or "/" in name
                    or (field.strip("_")[0] == "a" and name not in ATTENTIONS)
                ):
                    raise BadInput(
                        f"subject: config.json: {path} is {str(name)[:80]!r}, code that would be fetched; "
                        f"accepted: {', '.join(ATTENTIONS if field.strip('_')[0] == 'a' else EXPERTS)}; "
                        "or leave it out"
                    )
        if field in ("kernel_config", "fusion_config", "distributed_config", "custom_generate") and value:
            raise BadInput(f"subject: config.json: {path} is not accepted from a folder; leave it out")
        if field == "transformers_weights" and value is not None and value != "model.safetensors":
            raise BadInput(
                f"subject: config.json: {path} is {str(value)[:80]!r}; "
                "the weights are read from model.safetensors or its index: leave it out"
            )


def check_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """`BadInput` for weights that are codes of a quantizer of other programs, said or seen.
    compressed-tensors are opened (see `checkpoints`).
    """
    method = method_of(config)
    if method == "compressed-tensors":
        return
    packed = sorted(n for n in tensors if n.endswith(PACKED))
    narrow = sorted(n for n, s in tensors.items() if s.dtype.startswith(("I8", "U8", "F8")))
    if method is None and (folder / "quantize_config.json").is_file():
        method = "gptq"
    seen = (packed or narrow or [""])[0]
    if method is None and seen and (narrow or not seen.endswith("_blocks")):
        method = "an unnamed method"
    if method is not None:
        raise BadInput(
            f"subject: {str(folder)!r} is quantized by {method}"
            + (f" (it holds {seen})" if seen else " (config.json: quantization_config)")
            + ", and the bench needs weights that are numbers; give the checkpoint it was made from, or save "
            "it dequantized (transformers: model.dequantize(), save_pretrained)"
        )


def method_of(config: dict[str, Any]) -> str | None:
    """The quantizer that a config names: gptq, awq, bitsandbytes, hqq, fp8, compressed-tensors, ..."""
    for found in (config, config.get("text_config")):
        said = found.get("quantization_config") if isinstance(found, dict) else None
        if said:
            named = said.get("quant_method") if isinstance(said, dict) else None
            if (
                named is None
                and isinstance(said, dict)
                and (said.get("load_in_4bit") or said.get("load_in_8bit"))
            ):
                return "bitsandbytes"
            return str(named or "an unnamed method")[:60]
    return None


def check_depth(config: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """`BadInput` where a config promises more blocks than there are tensors: building them would not end."""
    for path, field, value in walk(config):
        if field in DEPTHS and type(value) is int and not 0 < value <= max(len(tensors), 1):
            raise BadInput(
                f"subject: config.json: {path} is {value}, but the weights are {len(tensors)} tensors; "
                "give the number of blocks that the weights hold"
            )
