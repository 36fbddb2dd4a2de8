"""Damaged checkpoint folders: `python -m tests.fuzz.checkpoint_folders COUNT [SEED]` opens COUNT of them and
prints how many opened, how many were refused in one line, and the traceback of every other end.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workbench
from tests.conftest import tiny
from workbench import BadInput

ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**6,
    10**12,
    2**63,
    -(10**9),
    0.0,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "gelu",
    "../x",
    "org/name",
    "a" * 500,
    "\u0000",
    "32",
    [],
    [1],
    [0, -1],
    {},
    {"a": 1},
    [[]],
    {"rope_type": "yarn"},
    {"": None},
    "float8_e4m3fn",
    "int8",
    "bert",
    "t5",
    "auto",
)


def odd(draw: random.Random) -> Any:
    """One of its own: what it is put into may be changed further."""
    return copy.deepcopy(draw.choice(ODD))


def value(draw: random.Random, before: Any) -> Any:
    kind = draw.random()
    if isinstance(before, bool) or kind < 0.5:
        return odd(draw)
    if isinstance(before, int):
        return draw.choice(
            [before + 1, before - 1, before * 2, -before, before * 1000, before // 2, str(before)]
        )
    if isinstance(before, dict) and before:
        key = draw.choice(list(before))
        return before | {key: value(draw, before[key])}
    if isinstance(before, list) and before:
        return [*before[:-1], value(draw, before[-1])]
    return [before] if draw.random() < 0.5 else odd(draw)


def fields(draw: random.Random, file: Path) -> None:
    """Change, drop or add a few fields of a JSON file."""
    said = json.loads(file.read_text())
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        where = said
        keys = list(where)
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(where[key], dict) and where[key] and draw.random() < 0.5:
            where = where[key]
            key = draw.choice(list(where))
        what = draw.random()
        if what < 0.15:
            where.pop(key)
        elif what < 0.25:
            where[draw.choice(MORE)] = odd(draw)
        else:
            where[key] = value(draw, where[key])
    file.write_text(json.dumps(said))


MORE = (
    "quantization_config",
    "text_config",
    "rope_scaling",
    "rope_parameters",
    "auto_map",
    "backbone",
    "num_labels",
    "id2label",
    "problem_type",
    "attn_implementation",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "is_decoder",
    "pruned_heads",
    "sliding_window",
    "layer_types",
    "head_dim",
    "num_experts",
    "architectures",
    "is_encoder_decoder",
    "vision_config",
    "encoder",
    "decoder",
    "transformers_version",
    "use_cache",
)


def text(draw: random.Random, file: Path) -> None:
    """Cut, double or overwrite a part of a file's bytes."""
    found = bytearray(file.read_bytes())
    if not found:
        return
    place, length = draw.randrange(len(found)), draw.choice([1, 2, 8, 100])
    what = draw.randrange(4)
    if what == 0:
        del found[place:]
    elif what == 1:
        del found[place : place + length]
    elif what == 2:
        found[place : place + length] = bytes(draw.randrange(256) for _ in range(length))
    else:
        found[place:place] = found[place : place + length]
    file.write_bytes(found)


def header(draw: random.Random, file: Path) -> None:
    """Change an entry of a safetensors header, which keeps its length in front."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + length])
    names = [n for n in said if n != "__metadata__"]
    if not names:
        return
    name = draw.choice(names)
    what = draw.randrange(6)
    if what == 0:
        said[draw.choice(["x", "lm_head.weight", name + "_orig", "_orig_mod." + name])] = said.pop(name)
    elif what == 1:
        said[name]["shape"] = value(draw, said[name]["shape"])
    elif what == 2:
        said[name]["dtype"] = draw.choice(["I8", "F16", "BF16", "F8_E4M3", "X", None, 3, "I64", "BOOL"])
    elif what == 3:
        said[name]["data_offsets"] = value(draw, said[name]["data_offsets"])
    elif what == 4:
        said[name] = draw.choice(ODD)
    else:
        said[name]["shape"] = said[name]["shape"][::-1]
    new = json.dumps(said).encode()
    data = len(new).to_bytes(8, "little") + new + data[8 + length :]
    file.write_bytes(data)


def drop(draw: random.Random, file: Path) -> None:
    file.unlink()


def damage(draw: random.Random, folder: Path) -> str:
    """Change one file of the folder; says what was done."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file()]
    weights = [1 + 8 * (f.name == "config.json") + 3 * (f.suffix == ".safetensors") for f in files]
    file = draw.choices(files, weights)[0]
    kinds: list[Callable[[random.Random, Path], None]] = [text, text, drop]
    kinds += (
        [fields] * 12 if file.suffix == ".json" else [header] * 8 if file.suffix == ".safetensors" else []
    )
    kind = draw.choice(kinds)
    kind(draw, file)
    return f"{kind.__name__} of {file.name}"


def originals(root: Path) -> list[Path]:
    """Folders to damage: checkpoints of six architectures, one in shards, and two saved subjects."""
    found = []
    for name in ARCHITECTURES:
        tiny(name).save_pretrained(root / name)
        found.append(root / name)
    tiny("llama").save_pretrained(root / "shards", max_shard_size="20KB")
    found.append(root / "shards")
    for name in ("bert", "llama"):
        workbench.subject(root / name, data="random", max_length=8).save(root / f"saved-{name}")
        found.append(root / f"saved-{name}")
    return found


def attempt(folder: Path, note: str) -> tuple[str, str]:
    """(how opening ended, what it said)."""
    options = {} if note.startswith("saved") else {"data": "random", "max_length": 8}
    began = time.perf_counter()
    try:
        on = workbench.subject(folder, **options)
        on.evaluate("test", limit=2)
        end, said = "opened", ""
    except BadInput as error:
        end, said = "refused", str(error)
        if "\n" in said or len(said) > 700:
            end = "long"
    except Exception:  # what is looked for
        end, said = "traceback", traceback.format_exc()
    return ("slow" if time.perf_counter() - began > 20 else end), said


def campaign(count: int, seed: int, show: bool = True) -> Counter[str]:
    ends = Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = originals(root)
        for index in range(count):
            draw = random.Random(f"{seed}-{index}")
            original = draw.choice(folders)
            folder = Path(shutil.copytree(original, root / "damaged"))
            done = damage(draw, folder)
            end, said = attempt(folder, original.name)
            ends[end] += 1
            if show and end not in ("opened", "refused"):
                print(f"--- {index}: {end}: {original.name}: {done}\n{said[-1500:]}")
            elif show and count <= 40:
                print(f"{original.name}: {done}: {end} {said}")
            shutil.rmtree(folder)
    return ends


if __name__ == "__main__":
    print(dict(campaign(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
