"""Every loader that the campaign knows, by its name."""

from __future__ import annotations

from tests.fuzz import command_line, kept, models, tables, texts
from tests.fuzz.campaign import Loader

LOADERS: dict[str, Loader] = {
    "formulas": texts.formulas,
    "values": texts.values,
    "parameters": texts.parameters,
    "notebooks": texts.notebooks,
    "plugins": texts.plugins,
    "task-files": texts.task_files,
    **tables.LOADERS,
    **models.LOADERS,
    **kept.LOADERS,
    **command_line.LOADERS,
}
