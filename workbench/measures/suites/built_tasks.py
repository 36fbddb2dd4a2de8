"""The harness's own tasks, built from task files; their data is read from this disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from os.path import exists, isdir
from pathlib import Path
from typing import Any

from workbench.errors import BadInput, one_line
from workbench.measures.suites.harness_limits import offline, quiet, sandboxed
from workbench.measures.suites.task_files import Code, TaskFile
from workbench.storage import cache_folder

#: What a task file cannot decide: what is fetched, what runs, and where things are written.
IGNORED = ("cache_dir", "download_config", "download_mode", "storage_options", "token", "trust_remote_code")


def build(task: TaskFile, shots: int) -> Any:
    """The harness's own task, its data read from the disk; `BadInput` when its files contradict each other.

    shots : examples before each item; -1 for as many as the task says
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    settings = {
        key: value for key, value in task.settings.items() if key not in ("tag", "group", "task_list")
    }
    settings = resolved(settings, lambda code: _import_func_in_yml(str(code), code.home))
    for file in json_files(task):
        check_objects(task.name, file)
    options = dict(settings.get("dataset_kwargs") or {})
    options = {name: value for name, value in options.items() if name not in IGNORED}
    if not task.dataset:
        options |= {"data_files": absolute(task.settings["dataset_kwargs"]["data_files"], task)}
    elif isdir(task.folder):
        settings["dataset_path"] = str(task.folder)
    if not task.dataset or isdir(task.folder):
        options["cache_dir"] = str(cache_folder() / "task-data-read")
    settings["dataset_kwargs"] = options
    if shots >= 0:
        settings["num_fewshot"] = shots
    with quiet(), offline(), sandboxed():
        try:
            return ConfigurableTask(config=settings)
        except Exception as error:
            raise BadInput(
                f"tasks: {task.name!r} of {task.file} does not open: {type(error).__name__}: "
                f"{one_line(str(error))[:300]}; its data is read from {task.place}"
            ) from None


def json_files(task: TaskFile) -> list[Path]:
    if not task.dataset:
        return task.files if task.settings["dataset_path"] == "json" else []
    return [file for file in sorted(task.folder.rglob("*")) if file.suffix in (".json", ".jsonl")]


def check_objects(name: str, file: Path) -> None:
    """`BadInput` for a file of JSON that is no object, list of objects or object a line: Arrow's reader of
    such files ends the process on some.
    """

    def told(number: int, reason: str) -> BadInput:
        return BadInput(
            f"tasks: {name!r}: line {number} of {file} {reason}; give one object with the columns a line, "
            'such as {"question": "..."}'
        )

    number = 1
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "[":
            found = json.loads(text)
            if not all(isinstance(row, dict) for row in found):
                raise told(1, "begins a list of something else than objects")
            return
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(json.loads(text), dict):
                return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not isinstance(json.loads(line), dict):
                raise told(number, "is no object")
    except UnicodeDecodeError:
        raise told(number, "is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise told(number, f"is not JSON ({one_line(str(error))})") from None


def absolute(value: Any, task: TaskFile) -> Any:
    """`data_files` with the files where they are."""
    if isinstance(value, dict):
        return {key: absolute(inner, task) for key, inner in value.items()}
    if isinstance(value, list):
        return [absolute(inner, task) for inner in value]
    beside = task.file.parent / str(value)
    return str((beside if exists(beside) else Path(str(value))).resolve())


def resolved(value: Any, function: Callable[[Code], Any]) -> Any:
    """A copy with the functions that are named put in."""
    if isinstance(value, Code):
        return function(value)
    if isinstance(value, dict):
        return {key: resolved(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner, function) for inner in value]
    return value
