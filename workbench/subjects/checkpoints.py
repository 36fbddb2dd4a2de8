"""Opening checkpoints: validated safetensors, GGUF files and hub ids, never pickle, never remote code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import BadInput
from workbench.subjects import gguf_files


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading and saving without transformers' own bars and notices;
    a new head is said in the subject's data note.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Refuse, before anything is built, a folder that is not a complete safetensors checkpoint."""
    if not (folder / "config.json").is_file() and not (folder / "workbench.json").is_file():
        raise BadInput(
            f"subject: folder {str(folder)!r} has no config.json; "
            "give a folder written by save_pretrained or by the workbench"
        )
    shards = sorted(folder.glob("*.safetensors"))
    weights = [
        s for s in shards if s.name not in ("splits.safetensors", "changes.safetensors", "arrays.safetensors")
    ]
    if not weights:
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
    for shard in shards:
        check_safetensors(shard)
    for index in folder.glob("*.safetensors.index.json"):
        missing = sorted(
            {s for s in json.loads(index.read_text())["weight_map"].values() if not (folder / s).is_file()}
        )
        if missing:
            raise BadInput(
                f"subject: {index.name} names {missing[0]}, which is not in {str(folder)!r} ({len(missing)} "
                "missing in all); "
                "copy the whole checkpoint"
            )


def check_safetensors(file: Path) -> None:
    """Compare the header's promise with the file's size:
    a truncated file is named before any tensor is read.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if end != size - 8 - length:
            raise ValueError(f"its header promises {end} bytes of tensors and it holds {size - 8 - length}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"subject: {file.name} is not a complete safetensors file: {error}; copy or save it again"
        ) from None


def open_model(
    source: str | Path, *, local: bool, head: str | None = None, labels: int | None = None
) -> tuple[nn.Module, str | None]:
    """Build the model of a folder, GGUF file or hub id in float32; returns it with a note when a head had to
    be created.

    `head` names the auto class for a checkpoint whose own class has no head for the task, e.g.
    "SequenceClassification".
    """
    import transformers

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    packed = Path(source) if gguf_files.is_gguf(source) else None
    try:
        config = (
            transformers.AutoConfig.from_pretrained(source, **options)
            if packed is None
            else gguf_files.gguf_config(packed)
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"subject: {str(source)!r} could not be opened: {reason}") from None
    name = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    note = None
    if head is not None and (cls is None or head not in (name or "")):
        cls = getattr(transformers, f"AutoModelFor{head}")
        if labels is not None:
            config.num_labels = labels
        note = f"the {head} head is new and untrained"
    elif cls is None:
        cls = transformers.AutoModel
    if (
        labels is not None
        and note is None
        and head == "SequenceClassification"
        and config.num_labels != labels
    ):
        raise BadInput(
            f"label-column: holds {labels} labels but the checkpoint's head has {config.num_labels}; "
            "give data with its labels, or a checkpoint trained on yours"
        )
    quiet: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if packed is not None:
        options |= gguf_files.unpacked(packed)
        quiet = gguf_files.quiet_tensors()
    try:
        with quiet_transformers(), quiet:
            model, report = cls.from_pretrained(
                source if packed is None else packed.parent,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"subject: {str(source)!r} could not be loaded as {cls.__name__}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    if note is None and cls is not transformers.AutoModel and report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BadInput(
            f"subject: {str(source)!r} lacks {missing[0]} ({len(missing)} missing in all), "
            f"which {cls.__name__} needs; copy or save it again"
        )
    return (model if packed is None else gguf_files.plain(model)).eval(), note


def open_tokenizer(source: str | Path, local: bool) -> Any | None:
    """The checkpoint's tokenizer or image processor, or None when it has neither."""
    import transformers

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if gguf_files.is_gguf(source):
        source, options = Path(source).parent, options | {"gguf_file": Path(source).name}
    for cls in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            return cls.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):
            continue
    return None
