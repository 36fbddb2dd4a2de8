"""Two hundred questions that every installation can make: which of four summaries belongs to this function?

The functions are those of packages whose text is in no training or calibration split (`library_text`): scipy
and scikit-learn, the examples before an item pandas. A model is shown a signature and the beginning of a
docstring, and says which first paragraph goes on; the three others are of other modules of the same package.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from workbench.storage import cache_folder, replacing
from workbench.subjects.builtin import library_text
from workbench.subjects.builtin.docstrings import duplicate_key, modules, versions

NAME = "docstrings"
ITEMS, SHOTS, CHOICES = 200, 16, 4
SHORTEST, LONGEST = 6, 24  # words of a summary
PER_MODULE = 4
#: Goes up when the recipe changes, so that an older one is not taken for a new one.
RECIPE = 1

TASK: dict[str, Any] = {
    "task": NAME,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl", "validation": "shots.jsonl"}},
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "test_split": "test",
    "fewshot_split": "validation",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}


@dataclass(frozen=True)
class Described:
    """A function and what its docstring says first."""

    package: str
    module: str
    signature: str
    summary: str


def docstring_tasks(folder: str | Path, items: int = ITEMS) -> Path:
    """Write the questions as a task of the lm-evaluation-harness: `docstrings.yaml`, `items.jsonl` and
    `shots.jsonl`. The same packages give the same files.
    """
    held_out = described(library_text.SPLITS["test"][1], items)
    shown = described(library_text.SPLITS["validation"][1], SHOTS)
    with replacing(folder, field="folder") as draft:
        draft.mkdir()
        for name, functions in (("items.jsonl", held_out), ("shots.jsonl", shown)):
            lines = [json.dumps(question(functions, place)) for place in range(len(functions))]
            (draft / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (draft / f"{NAME}.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False), encoding="utf-8")
    return Path(folder)


def kept() -> Path:
    """The folder in the cache with the questions of the installed packages, written when it is not there."""
    packages = [*library_text.SPLITS["test"][1], *library_text.SPLITS["validation"][1]]
    key = json.dumps([RECIPE, versions(packages)])
    folder = cache_folder() / "task-data" / f"{NAME}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / f"{NAME}.yaml").is_file():
        docstring_tasks(folder)
    return folder


def described(packages: tuple[str, ...], count: int) -> list[Described]:
    """So many functions of the packages, as many of each, in the order of a hash of what they say."""
    seen: set[str] = set()
    found: list[Described] = []
    for place, package in enumerate(packages):
        wanted = count * (place + 1) // len(packages)
        for module, path in modules(package):
            if len(found) >= wanted:
                break
            most = min(PER_MODULE, wanted - len(found))
            found += itertools.islice(functions_of(package, module, path, seen), most)
    return sorted(found, key=lambda each: digest(each.signature, each.summary))


def functions_of(package: str, module: str, path: Path, seen: set[str]) -> Iterator[Described]:
    """The public functions of a file whose first paragraph is a sentence that no other one has said."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        words, keys = summary.split(), {node.name, duplicate_key(summary)}
        if SHORTEST <= len(words) <= LONGEST and summary[0].isupper() and not keys & seen:
            seen |= keys
            yield Described(package, module, f"def {node.name}({ast.unparse(node.args)}):", summary)


def question(functions: list[Described], place: int) -> dict[str, Any]:
    """One question about `functions[place]`; what the others say are its wrong answers."""
    right = functions[place]
    others = [each for each in functions if each.package == right.package and each.module != right.module]
    others.sort(key=lambda each: digest(right.signature, each.signature))
    choices = [right.summary, *(each.summary for each in others[: CHOICES - 1])]
    choices.sort(key=lambda text: digest(right.signature, "order", text))
    return {
        "question": f'{right.signature}\n    """',
        "choices": choices,
        "answer": choices.index(right.summary),
    } | {name: value for name, value in asdict(right).items() if name in ("package", "module")}


def digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()
