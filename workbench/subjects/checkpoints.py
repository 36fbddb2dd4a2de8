"""Opening checkpoints: validated safetensors, GGUF files and hub ids, never pickle, never remote code.

Every tensor of a checkpoint is accounted for: see `contents.every_tensor`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import BadInput
from workbench.subjects import gguf_files
from workbench.subjects.checkpoint_files import Stored, method_of, one_line, tensors_in
from workbench.subjects.contents.every_tensor import account
from workbench.subjects.stored import commonest, in_float32

#: parts of a name that wrappers put there: torch.compile, FSDP, activation checkpointing, DeepSpeed
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


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


@contextlib.contextmanager
def local_only(local: bool) -> Iterator[None]:
    """Inside, what a local folder names is not looked for on the hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_config(source: str | Path, local: bool) -> Any:
    """transformers' config of a folder, GGUF file or hub id."""
    import transformers

    if gguf_files.is_gguf(source):
        return gguf_files.gguf_config(Path(source))
    try:
        with quiet_transformers(), local_only(local):
            config = transformers.AutoConfig.from_pretrained(
                source, local_files_only=local, trust_remote_code=False
            )
            inner = config.get_text_config()
    except Exception as error:  # a stranger's file in another library: anything can be raised
        raise BadInput(
            f"subject: {str(source)!r} could not be opened: its config.json: {one_line(error)}"
        ) from None
    if not isinstance(inner, transformers.PreTrainedConfig):
        raise BadInput(
            f"subject: {str(source)!r} could not be opened: its config.json: the part for text (text_config, "
            f"text_encoder, decoder or generator) is a {type(inner).__name__} and no configuration that "
            f"{config.model_type} has; take it out"
        )
    return config


def open_model(
    source: str | Path,
    *,
    local: bool,
    head: str | None = None,
    labels: list[str] | None = None,
    outputs: int | None = None,
) -> tuple[nn.Module, list[str]]:
    """Build the model of a folder, GGUF file or hub id in float32; returns it with notes of what was
    renamed, is new or was left over.

    `head` names the auto class for a checkpoint whose own class has no head for the task, e.g.
    "SequenceClassification", "" for none, None for the checkpoint's own; `labels` are the classes of a new
    one, `outputs` the numbers that it predicts.
    """
    import transformers

    config = read_config(source, local)
    cls, new = class_of(config, head)
    if new and labels is not None:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    elif new and outputs is not None:
        config.num_labels, config.problem_type = outputs, "regression"
    packed = gguf_files.is_gguf(source)
    stored = tensors_in(Path(source)) if local and not packed else None
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if packed:
        options |= gguf_files.unpacked(Path(source))
    elif method_of(config.to_dict()) == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    elif stored is not None:
        check_size(cls, config, stored)
    model, report, notes = loaded(source, cls, config, local, stored, options)
    told = account(str(source), model, report, new)
    if packed:
        model = gguf_files.plain(model)
    elif "quantization_config" in options:
        model = plain_linears(model)
        notes.append("decompressed from compressed-tensors: weights are numbers, inputs are not rounded")
    if stored is not None and any(each.dtype == "F64" for each in stored.values()):
        notes.append("float64 weights of the file are opened, and saved, in float32")
    model.stored_dtype = format_of(stored, config)  # type: ignore[assignment]
    return model.eval(), [*notes, *told]


#: endings of the classes without a head
TRUNKS = ("Model", "Encoder")


def architecture(config: Any) -> str:
    """The class that a config names; "" for none."""
    named = getattr(config, "architectures", None)
    first = named[0] if isinstance(named, (list, tuple)) and named else ""
    return first if isinstance(first, str) else ""


def class_of(config: Any, head: str | None) -> tuple[Any, bool]:
    """The class to build, and whether its head is new: the checkpoint's own, if it has the head wanted."""
    import transformers
    from transformers.models.auto import modeling_auto

    name = architecture(config)
    cls = getattr(transformers, name, None) if name else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        cls = None
    if head is None:
        return (cls or transformers.AutoModel), False
    if head == "":
        return (cls if cls is not None and name.endswith(TRUNKS) else transformers.AutoModel), False
    auto = getattr(transformers, f"AutoModelFor{head}")
    known = set()
    for classes in getattr(modeling_auto, MAPPINGS[head]).values():
        known |= set(classes if isinstance(classes, (list, tuple)) else [classes])
    if cls is not None and (name in known or head in name):
        return cls, False
    return auto, True


#: head -> the table of transformers' classes that have it
MAPPINGS = {
    "SequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "ImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "SemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
}


def has_class(name: str, head: str) -> bool:
    """Whether transformers lists the class `name` among those with this head."""
    from transformers.models.auto import modeling_auto

    return any(
        name == each or (isinstance(each, (list, tuple)) and name in each)
        for each in getattr(modeling_auto, MAPPINGS[head]).values()
    )


def check_size(cls: Any, config: Any, stored: dict[str, Stored]) -> None:
    """`BadInput` before memory is taken for a model that its weights cannot be: built without numbers, its
    tensors have the shapes of the files', and there are not many more numbers than those.
    """
    try:
        with torch.device("meta"), quiet_transformers():
            skeleton = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except Exception as error:  # another library's code on a stranger's numbers
        raise BadInput(
            f"subject: config.json does not describe a {getattr(cls, '__name__', cls)}: {one_line(error)}; "
            "compare it with the original"
        ) from None
    held = {unwrapped(name): each for name, each in stored.items()}
    numbers = 0
    for name, tensor in skeleton.state_dict().items():
        numbers += tensor.numel()
        if name in held and held[name].shape != tuple(tensor.shape):
            raise BadInput(
                f"subject: {name} is {list(held[name].shape)} in {held[name].file} and {list(tensor.shape)} "
                "by config.json; give the config that the weights were saved with"
            )
    total = sum(each.numel for each in stored.values())
    if numbers > 8 * total + 2**24:
        raise BadInput(
            f"subject: config.json describes {numbers} numbers and the weights hold {total}; "
            "give the config that the weights were saved with"
        )


def loaded(
    source: str | Path,
    cls: Any,
    config: Any,
    local: bool,
    stored: dict[str, Stored] | None,
    options: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """(model, transformers' report, notes). Prefixes of wrappers are stripped: the known ones by name,
    others when that makes the names the model's.
    """
    notes: list[str] = []
    mapping = {}
    if stored is not None:
        names = [unwrapped(name) for name in stored]
        if len(set(names)) < len(names):
            double = Counter(names).most_common(1)[0][0]
            raise BadInput(
                f"subject: two tensors are {double} without the prefixes of wrappers; save the model "
                "unwrapped"
            )
        if names != list(stored):
            mapping = wrapper_patterns(stored)
    model, report = load(source, cls, config, local, options, mapping)
    if report["missing_keys"] and report["unexpected_keys"]:
        wanted = {*model.state_dict(), *(base_names(model))}
        more = wrapper_patterns(report["unexpected_keys"]) | common_prefix(
            [unwrapped(name) for name in report["unexpected_keys"]], wanted
        )
        if more:
            mapping |= more
            model, report = load(source, cls, config, local, options, mapping)
    if mapping:
        forget(model, mapping)
        shown = ", ".join(dict.fromkeys(re.findall(r"\w+(?=\\\.)", " ".join(mapping))))
        notes.append(f"names were stripped of a wrapper's {shown}")
    return model, report, notes


def load(
    source: str | Path, cls: Any, config: Any, local: bool, options: dict[str, Any], mapping: dict[str, str]
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        packed = gguf_files.is_gguf(source)
        quiet = gguf_files.quiet_tensors() if packed else contextlib.nullcontext()
        with (
            quiet_transformers(),
            local_only(local),
            warnings.catch_warnings(),
            quiet,
            in_float32(source, local and not packed and "quantization_config" not in options) as folder,
        ):
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, report = cls.from_pretrained(
                Path(source).parent if packed else folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({"key_mapping": mapping} if mapping else {}),
                **options,
            )
    except Exception as error:  # a stranger's file in another library: anything can be raised
        raise BadInput(
            f"subject: {str(source)!r} could not be loaded as {getattr(cls, '__name__', cls)}: "
            f"{one_line(error)}"
        ) from None
    if str(folder) != str(source):
        model.config.name_or_path = model.name_or_path = str(source)
    return model, report


def forget(model: nn.Module, mapping: dict[str, str]) -> None:
    """Saving applies a model's renamings backwards; these are not its own."""
    held: Any = getattr(model, "_weight_conversions", None) or []
    patterns = set(mapping)
    vars(model)["_weight_conversions"] = [
        each for each in held if not patterns & set(getattr(each, "_original_source_patterns", []))
    ]


def unwrapped(name: str) -> str:
    """The name of a tensor without the parts that wrappers put there."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts)


def wrapper_patterns(names: Iterable[str]) -> dict[str, str]:
    """Regular expression -> nothing, for the wrappers' parts that occur in the names. Each is applied once to
    a name, so one that occurs several times is there as often, spelled differently.
    """
    times = Counter[str]()
    for name in names:
        times |= Counter(part for part in name.split(".") if part in WRAPPERS)
    return {
        rf"(?:^|(?<=\.)){re.escape(part)}\." + "(?:)" * number: ""
        for part in sorted(times)
        for number in range(times[part])
    }


def common_prefix(names: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """The parts that all names begin with and the model's names do not: {pattern: ""}, or nothing."""
    given = [name.split(".") for name in names]
    for length in (1, 2, 3):
        first = given[0][:length]
        if any(len(parts) <= length or parts[:length] != first for parts in given):
            break
        if 2 * sum(".".join(parts[length:]) in wanted for parts in given) >= len(given):
            return {rf"^{re.escape('.'.join(first))}\.": ""}
    return {}


def base_names(model: nn.Module) -> set[str]:
    """The names of a model's trunk without its prefix, as a checkpoint without a head has them."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return {name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)}


def format_of(stored: dict[str, Stored] | None, config: Any) -> torch.dtype:
    """The dtype that most of a checkpoint's numbers have on disk."""
    if stored is None:
        named = getattr(config, "dtype", None)
        return named if isinstance(named, torch.dtype) else torch.float32
    counts = Counter[str]()
    for each in stored.values():
        counts[each.dtype] += each.numel
    return commonest(counts)


def plain_linears(model: nn.Module) -> nn.Module:
    """A decompressed model without the traces of its quantizer: plain weights in plain modules."""
    for module in model.modules():
        for name in [*module._parameters, *module._buffers]:
            if TRACES.fullmatch(name):
                delattr(module, name)
        for name in ("quantization_scheme", "quantization_status", "quantization_enabled", "forward"):
            vars(module).pop(name, None)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    return model.float()


TRACES = re.compile(r"(weight|input|output)_(scale|zero_point|shape|g_idx|packed|global_scale)")


def open_tokenizer(source: str | Path, local: bool, needed: bool = False) -> Any | None:
    """The checkpoint's tokenizer or image processor, or None when it has neither; `BadInput` where one is
    needed and its files cannot be read.
    """
    import transformers

    reasons = []
    place, options = source, dict[str, Any]()
    if gguf_files.is_gguf(source):
        place, options = Path(source).parent, {"gguf_file": Path(source).name}
    for cls in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            with quiet_transformers(), local_only(local):
                return cls.from_pretrained(place, local_files_only=local, trust_remote_code=False, **options)
        except Exception as error:  # a stranger's file in another library: anything can be raised
            reasons.append(one_line(error))
    files = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    there = [name for name in files if local and (Path(source) / name).is_file()]
    if needed and there:
        reason = reasons[1 if there[0].startswith("pre") else 0]
        raise BadInput(f"subject: {there[0]} could not be opened: {reason}; copy or save it again")
    return None
