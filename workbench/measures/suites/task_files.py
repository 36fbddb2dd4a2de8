"""Task files of the lm-evaluation-harness: which tasks a word means, what each reads, and that none of them
runs code or goes to the network.

A task file is data: its prompts are Jinja templates, which are rendered in a sandbox. Python that a file
names (`!function`) runs only where it is part of the installed harness; of other files it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import exists, isdir, isfile  # no error where a name is longer than any file's
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import BadInput, did_you_mean, one_line
from workbench.measures.fidelity import stamp
from workbench.measures.suites import docstring_items
from workbench.measures.suites.harness_limits import quiet
from workbench.storage import cache_folder
from workbench.version import version_of

PACKAGE = "lm-eval"
INSTALL = "pip install 'model-workbench[eval]'"
#: Requests that a probability answers.
ANSWERED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
#: Readers of `datasets` for files that hold data only: no pickles, no archives, no databases.
READERS = ("json", "csv", "parquet", "arrow", "text")
#: Values in a task file.
MOST = 100_000
#: The tasks that the workbench makes itself.
OWN = "docstrings"


class Code(str):
    """A function that a task file names, and the folder of that file."""

    home: Path


@dataclass(frozen=True)
class TaskFile:
    """One task as its files say it, `include`d ones merged.

    file : where it is written
    dataset : the name under which its data is published; "" for files that it names
    """

    name: str
    file: Path
    settings: dict[str, Any]
    data: Path

    @property
    def dataset(self) -> str:
        path = str(self.settings.get("dataset_path", ""))
        return "" if path in READERS else path

    @property
    def folder(self) -> Path:
        """Where the data set has to lie."""
        beside = self.file.parent / self.dataset
        return beside if isdir(beside) else self.data / self.dataset

    @property
    def prepared(self) -> Path | None:
        """Where `datasets` has prepared it before, this part of it."""
        from datasets import config

        place = Path(config.HF_DATASETS_CACHE) / self.dataset.replace("/", "___")
        if not isdir(place):
            return None
        return next(iter(sorted(place.glob(f"{self.settings.get('dataset_name') or 'default'}*"))), None)

    @property
    def place(self) -> Path:
        """What its data is read from."""
        if not self.dataset:
            return self.file.parent
        prepared = None if isdir(self.folder) else self.prepared
        return self.folder if prepared is None else prepared

    @property
    def files(self) -> list[Path]:
        """The data files that it names."""
        found: list[Path] = []
        for name in leaves((self.settings.get("dataset_kwargs") or {}).get("data_files")):
            if "://" in name or "::" in name:
                raise BadInput(
                    f"tasks: {self.name!r} reads {name}, and nothing is fetched; give a file on this disk in "
                    f"{self.file}"
                )
            beside = self.file.parent / name
            found.append(beside if exists(beside) or not exists(name) else Path(name))
        return found

    def stamped(self) -> list[Any]:
        """What tells that the task or its data is another one now."""
        places = [str(file) for file in self.files] or ([str(self.place)] if self.dataset else [])
        return [self.name, repr(sorted(self.settings.items())), *[stamp(place) for place in places]]


def check_installed() -> None:
    """`BadInput` with the command that installs the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput(f"tasks: need the package {PACKAGE}, which is not installed; run: {INSTALL}")


def harness_version() -> str:
    return version_of(PACKAGE)


def usual_data() -> Path:
    """The folder that data sets are looked for in where no other is given."""
    return cache_folder() / "task-data"


def task_files(tasks: str, data: str = "") -> list[TaskFile]:
    """The tasks that a line means: names of the harness's tasks, groups and tags, task files, folders of
    them, and `docstrings`, separated by commas; each once, in their order.
    """
    check_installed()
    place = Path(data).expanduser() if data.strip() else usual_data()
    if data.strip() and not isdir(place):
        raise BadInput(f"task-data: {data!r} is no folder; give the folder that the data sets lie in")
    found: dict[str, TaskFile] = {}
    for word in [part.strip() for part in tasks.split(",") if part.strip()]:
        for task in meant(word, place):
            known = found.setdefault(task.name, task)
            if known.file != task.file:
                raise BadInput(
                    f"tasks: {task.name!r} is in {known.file} and in {task.file}; give one of them, or "
                    "rename a task"
                )
    if not found:
        raise BadInput(
            f"tasks: is empty; give names of the harness's tasks, task files (.yaml), folders or {OWN}"
        )
    for task in found.values():
        check_answerable(task)
    return list(found.values())


def meant(word: str, data: Path) -> list[TaskFile]:
    """The tasks that one word means."""
    path = Path(word).expanduser()
    if word == OWN:
        return in_folder(docstring_items.kept(), data)
    if isdir(path):
        return in_folder(path, data)
    if path.suffix in (".yaml", ".yml") or isfile(path):
        if not isfile(path):
            raise BadInput(f"tasks: {word!r} is not a file; give a task file (.yaml) or a folder of them")
        return [task_in(path, data)]
    return named(word, data)


def in_folder(folder: Path, data: Path) -> list[TaskFile]:
    """The files of a folder that hold a task; those that are only included have no `task`."""
    files = sorted(file for ending in ("yaml", "yml") for file in folder.rglob(f"*.{ending}"))
    found = [task_in(file, data) for file in files if isinstance(read(file).get("task"), str)]
    if not found:
        raise BadInput(f"tasks: {str(folder)!r} holds no task file (.yaml with a `task`)")
    return found


def task_in(file: Path, data: Path, **overrides: Any) -> TaskFile:
    settings = read(file) | overrides
    name = settings.get("task")
    if not isinstance(name, str):
        raise BadInput(f"tasks: {file} says no `task`; give a file of one task, with its name")
    return TaskFile(name, file, settings, data)


def named(word: str, data: Path) -> list[TaskFile]:
    """The tasks that a name of the harness means: itself, or the members of a group or a tag."""
    index = harness_index()
    if word not in index:
        hint = did_you_mean(word, index)
        raise BadInput(
            f"tasks: {word!r} is no task of the harness, no file and no folder; {hint + ' ' if hint else ''}"
            f"give one of its {len(index):,} names (lm-eval ls tasks), a task file (.yaml), a folder of "
            f"them, or {OWN}"
        )
    found: list[TaskFile] = []
    for entry, overrides in members(word, index, {}):
        found.append(task_in(Path(entry.yaml_path), data, **overrides))
    return found


@functools.lru_cache(1)
def harness_index() -> dict[str, Any]:
    """Name -> entry of every task, group and tag of the installed harness; takes seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        index: dict[str, Any] = TaskManager().task_index
    return index


def members(word: str, index: dict[str, Any], above: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(entry of a task, what the groups above it set) of all tasks under a name."""
    from lm_eval.config.group import GroupConfig

    of_groups = {field.name for field in dataclasses.fields(GroupConfig)}
    entry = index[word]
    kind = entry.kind.name
    if kind == "TAG":
        for name in sorted(entry.tags):
            yield from members(name, index, above)
    elif kind == "GROUP":
        said = entry.cfg or {}
        above = {key: value for key, value in said.items() if key not in of_groups} | above
        children = said.get("task", [])
        for child in children if isinstance(children, list) else [children]:
            name = child if isinstance(child, str) else child.get("task") or child.get("group")
            if not isinstance(name, str) or name not in index:
                raise BadInput(
                    f"tasks: the group {word!r} defines tasks of its own; give their names instead"
                )
            more = child if isinstance(child, dict) else {}
            yield from members(name, index, above | {k: v for k, v in more.items() if k not in of_groups})
    else:
        yield entry, above


def loader(home: Path) -> type[yaml.SafeLoader]:
    """Reads functions as their names."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> Code:
        found = Code(str(node.value))
        found.home = home
        return found

    Loader.add_constructor("!function", function)
    return Loader


def read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a task file says, with what it includes; its own words come before those."""
    file = Path(os.path.realpath(file))
    if file in above:
        raise BadInput(f"tasks: {file} includes itself; take the `include` out")
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=loader(file.parent))  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadInput(f"tasks: {file} cannot be read: {one_line(str(error))[:200]}") from None
    if not isinstance(found, dict):
        raise BadInput(f"tasks: {file} is no task file: it holds no names with values")
    included = found.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        part = read(file.parent / str(name), (*above, file))
        part.pop("task_list", None)
        merged |= part
    merged |= {str(key): value for key, value in found.items()}
    if (code := next(iter(sorted(codes(merged, file))), "")) and not within_harness(file):
        raise BadInput(
            f"tasks: {file} names the function {code}, whose code would run with your rights; task files are "
            "read as data: write it as a template ({{...}}) or prepare the data beforehand"
        )
    return merged


def codes(value: Any, file: Path) -> Iterator[str]:
    """The functions that are named anywhere in it; `BadInput` where references make it endless."""
    left, seen = [value], 0
    while left:
        found, seen = left.pop(), seen + 1
        if seen > MOST:
            raise BadInput(f"tasks: {file} unfolds to more than {MOST:,} values; write it without references")
        if isinstance(found, Code):
            yield str(found)
        elif isinstance(found, (dict, list)):
            left += found.values() if isinstance(found, dict) else found


def leaves(value: Any) -> Iterator[str]:
    """The texts in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


def within_harness(file: Path) -> bool:
    spec = importlib.util.find_spec("lm_eval")
    roots = spec.submodule_search_locations if spec is not None else None
    return any(file.is_relative_to(os.path.realpath(root)) for root in roots or ())


def check_answerable(task: TaskFile) -> None:
    """`BadInput` for what is asked otherwise than by probabilities, for what would fetch or run code, and for
    data that is not there.
    """
    if "class" in task.settings or "custom_dataset" in task.settings or task.settings.get("unsafe_code"):
        raise BadInput(f"tasks: {task.name!r} is a program of its own; give tasks that are written as data")
    kind = task.settings.get("output_type", "generate_until")
    if kind not in ANSWERED:
        raise BadInput(
            f"tasks: {task.name!r} asks for {kind}, and texts are not generated here; tasks that work are "
            f"{', '.join(ANSWERED)}"
        )
    if task.settings.get("use_prompt"):
        raise BadInput(
            f"tasks: {task.name!r} takes its prompt from elsewhere (use_prompt); write it as doc_to_text"
        )
    listed = task.settings.get("metric_list") or []
    for metric in listed if isinstance(listed, list) else [listed]:
        check_metric(task.name, metric)
    check_data(task)


def check_metric(name: str, said: Any) -> None:
    """What is not among the harness's own metrics it looks for elsewhere, as code."""
    import lm_eval.api.metrics  # noqa: F401 (registers them)
    from lm_eval.api.registry import metric_registry

    metric = said.get("metric") if isinstance(said, dict) else said
    known = isinstance(metric, Code) or (isinstance(metric, str) and metric in metric_registry)
    if not known or (isinstance(said, dict) and said.get("hf_evaluate")):
        raise BadInput(
            f"tasks: {name!r} has the metric {metric!r}, which is none of the harness's own and would be "
            "loaded as code; give it acc or acc_norm, perplexity, word_perplexity, bits_per_byte"
        )


def check_data(task: TaskFile) -> None:
    if not isinstance(task.settings.get("dataset_kwargs") or {}, dict):
        raise BadInput(
            f"tasks: {task.file}: dataset_kwargs is {task.settings['dataset_kwargs']!r}; "
            "give a mapping, such as {data_files: items.jsonl}"
        )
    if not task.settings.get("dataset_path"):
        raise BadInput(f"tasks: {task.file} says no dataset_path; give json with data_files, or a name")
    if not task.dataset:
        missing = [str(file) for file in task.files if not isfile(file)]
        if not task.files or missing:
            wrong = f"reads {missing[0]}, which is not there" if missing else "names no data_files"
            raise BadInput(f"tasks: {task.name!r} {wrong}; put the file into {task.file.parent}")
    elif remote := next((name for name in described(task.folder) if "://" in name), ""):
        raise BadInput(
            f"tasks: the README.md of {task.folder} names {remote}, and nothing is fetched; remove it"
        )
    elif not isdir(task.folder) and task.prepared is None:
        raise BadInput(
            f"tasks: the data set {task.dataset} of {task.name!r} is not on this disk, and nothing is "
            f"fetched; put its files into {task.folder}, or give as task-data the folder that holds "
            f"{task.dataset}"
        )


def described(folder: Path) -> Iterator[str]:
    """The files that the head of a data set's README names."""
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace").split("---") if isfile(readme) else []
    if len(head) < 3 or head[0].strip():
        return
    try:
        said = yaml.safe_load(head[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    yield from leaves(said.get("configs")) if isinstance(said, dict) else ()
