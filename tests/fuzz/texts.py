"""Loaders of what people type or write: formulas, values, files of parameters, notebooks, plugins."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.fuzz import mutation
from tests.fuzz.campaign import Case, Drawing
from tests.measures.suites.speaking import speaking
from workbench import reports
from workbench.families import import_plugin, module_name
from workbench.measures import TaskSuite
from workbench.progress import Progress
from workbench.scaling.formulas.laws import Law
from workbench.scaling.run_tables.checks import mapping
from workbench.storage import cache_folder
from workbench.values import read, read_file

FORMULAS = (
    "E + A/params**alpha + B/tokens**beta",
    "r = params/tokens\nE*(1 + exp(-a*r)) + where(tokens >= knee, b, c)",
    "log(1 + softplus(a*log(params) + b)) + min(tokens, 3, e) + max(d, -2.5e-3)",
    "E + (A/params**(alpha/beta) + B/tokens)**beta",
    "sqrt(abs(a - params)) + log2(tokens) + log10(flops) + sigmoid(tanh(k))",
)
PIECES = (
    *("**", "^", "/", "*", "-", "(", ")", ",", "exp(", "log(", "where(", "min(", "sqrt(", "params", "tokens"),
    *("1e308", "1e400", "1e-320", "0", "inf", "nan", "True", "'a'", "[1]", "lambda: 0", "__import__('os')"),
    *(
        "a.b",
        "a[0]",
        "f(x)",
        "not a",
        "a if b else c",
        "a = 1\n",
        "(a := 2)",
        "params = 2\n",
        "0**0",
        "**-9999",
    ),
    *("x" * 500, "(" * 200, "-" * 400, "a**" * 100, "1/" * 80, "\n", "é", "ﬁ", "\0", "1_000", "0b11", "1j"),
)
COLUMNS = {
    "params": np.array([1e6, 1e7, 1e9]),
    "tokens": np.array([1e8, 1e9, 1e10]),
    "flops": np.array([6e14, 6e16, 6e19]),
}


def formulas(root: Path) -> Drawing:
    """A law from a formula, compiled with its derivatives and evaluated."""

    def opened(text: str) -> None:
        law = Law.from_formula(text)
        program = law.compile("linear")
        with np.errstate(all="ignore"):
            law.predict(dict.fromkeys(law.parameter_names, 0.7), COLUMNS)
            program.bind(COLUMNS, 1)(np.full((1, len(law.parameters)), 0.7))

    def draw_case(draw: random.Random) -> Case:
        text = mutation.text(draw, draw.choice(FORMULAS), draw.choice([PIECES, PIECES, mutation.TOKENS]))
        return repr(text[:200]), lambda: opened(text)

    return draw_case


VALUES: tuple[tuple[Any, str], ...] = (
    (list[float], "[0.5, 1e-3, 7]"),
    (list[float], "0.5, 1e-3"),
    (dict[str, int], "{*.q_proj: 4, a: 3}"),
    (dict[str, int], "a: 1, b: 2"),
    (int, "17"),
    (float, "1e-3"),
    (int | None, "null"),
    (bool, "true"),
    (object, "{\"a\": [1, {b: \"x\"}], c: 'it''s'}"),
    (list[list[float]], "[[0.5, 4], [0.25, 3]]"),
    (list[str], "magnitude, wanda, a.[0-3].b"),
    (str, "anything"),
)


def values(root: Path) -> Drawing:
    """Values of options, and mappings of columns."""

    def draw_case(draw: random.Random) -> Case:
        annotation, before = draw.choice(VALUES)
        text = mutation.text(draw, before)
        if draw.random() < 0.1:
            text = mutation.text(draw, "params=Model Size, tokens=D*1e9, loss=val")
            return f"columns {text[:200]!r}", lambda: mapping(text)
        return f"{annotation} {text[:200]!r}", lambda: read(text, annotation, "field")

    return draw_case


PARAMETERS = """# sent by a panel
subject: minilm-docstrings
sparsities: [0.5, 0.7]
bits:
  - 3
  - 4
combined: [[0.5, 4], [0.25, 3]]
steps: 300
layers: "*layers.0.*"
note: 'it''s'
options: {damp: 1e-3, order: true, none: null}
"""


def parameters(root: Path) -> Drawing:
    """Files of parameters, YAML and JSON, as `workbench report --parameters` reads and checks them."""
    content = read_file(_written(root / "whole.yaml", PARAMETERS.encode()))
    taken = {name: each.default for name, each in reports.parameters_of("compress").items()}
    file = root / "parameters.yaml"

    def opened() -> None:
        reports.check("compress", read_file(file))

    def draw_case(draw: random.Random) -> Case:
        what = draw.randrange(4)
        if what == 0:
            file.write_bytes(mutation.damaged(draw, PARAMETERS.encode()))
        elif what == 1:
            file.write_bytes(mutation.encoded(mutation.text(draw, PARAMETERS)))
        else:
            told = draw.choice([content, taken])
            file.write_bytes(mutation.encoded(mutation.as_json(draw, told)))
        return repr(file.read_bytes()[:200]), opened

    return draw_case


def notebooks(root: Path) -> Drawing:
    """Notebooks that are to be reports: their files and their cells of parameters."""
    original = reports.find("compress").read_text()
    whole = json.loads(original)
    cells = [i for i, c in enumerate(whole["cells"]) if "parameters" in c["metadata"].get("tags", [])]
    whole["cells"] = [whole["cells"][i] for i in {0, *cells}]
    source = "".join(whole["cells"][-1]["source"])
    file = root / "own.ipynb"
    pieces = (*PIECES, ": int", ": dict[str, ", "| None", " = ", "#", "'''", "list[list[", "float]")

    def opened() -> None:
        reports.check(file, {name: p.default for name, p in reports.parameters_of(file).items()})

    def draw_case(draw: random.Random) -> Case:
        what = draw.randrange(4)
        if what == 0:
            file.write_bytes(mutation.damaged(draw, json.dumps(whole).encode()))
        elif what == 1:
            file.write_bytes(mutation.encoded(mutation.as_json(draw, whole)))
        else:
            cell = whole["cells"][-1] | {"source": mutation.text(draw, source, pieces)}
            file.write_text(json.dumps(whole | {"cells": [*whole["cells"][:-1], cell]}))
        return repr(file.read_bytes()[-300:]), opened

    return draw_case


TASK = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl", "validation": "items.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "validation",
    "num_fewshot": 1,
    "doc_to_text": "{{question.strip()}} is",
    "doc_to_choice": "choices",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ITEMS = [{"question": f"{n} and one", "choices": [f"{n + 1}", f"{n}", "no"], "answer": 0} for n in range(4)]


def task_files(root: Path) -> Drawing:
    """Tasks of the lm-evaluation-harness with their data: built, and asked of a small model."""
    on = speaking()
    place = root / "tasks"
    place.mkdir()
    file, items = place / "own.yaml", place / "items.jsonl"
    whole = [yaml.safe_dump(TASK), "\n".join(map(json.dumps, ITEMS))]

    def opened() -> None:
        try:
            TaskSuite(tasks=str(file), limit=2).run(on, Progress(), cache=False)
        finally:
            shutil.rmtree(cache_folder() / "task-data-read", ignore_errors=True)

    def draw_case(draw: random.Random) -> Case:
        told = list(whole)
        part, what = draw.randrange(2), draw.randrange(3)
        if what == 0:
            told[part] = mutation.damaged(draw, whole[part].encode()).decode("utf-8", "surrogateescape")
        elif what == 1:
            told[part] = mutation.text(draw, whole[part])
        else:
            told = [mutation.as_json(draw, TASK), "\n".join(mutation.as_json(draw, item) for item in ITEMS)]
        for target, text in zip((file, items), told, strict=True):
            target.write_bytes(text.encode("utf-8", "surrogateescape" if what == 0 else "surrogatepass"))
        return repr(told[part][:300]), opened

    return draw_case


PLUGIN = '''"""Own entries."""

import math

from workbench.axis import Options, parameter
from workbench.scaling.formulas.lawbook import LAW
from workbench.scaling.formulas.laws import Law


class Power(Options):
    shift: float = parameter(0.5, "a constant beside E", ge=0)


@LAW.add("own-power", formula="E + A / N^alpha", source="here", options=Power)
def own_power(options: Power) -> Law:
    return Law.from_formula(f"E + {options.shift} + A / params**alpha")
'''


def plugins(root: Path) -> Drawing:
    """A user's Python file: it is run, so only its text is damaged, and what it raises is one line."""
    from workbench.scaling.formulas.lawbook import LAW

    file = root / "own.py"
    pieces = (
        *(
            "raise KeyError('x\\ny')\n",
            "import nothing\n",
            "1/0\n",
            "def f(:\n",
            "\t",
            "async ",
            "*",
            "options",
        ),
        *("raise SystemExit(3)\n", "raise SystemExit\n", "raise Exception()\n", "[][1]\n", "LAW.add()\n"),
        *(
            "raise KeyboardInterrupt\n",
            "import sys; sys.exit('bye')\n",
            "def g(): g()\ng()\n",
        ),
        *(
            "class A(Exception):\n    def __str__(self): raise self\nraise A\n",
            "del __builtins__\n",
            "é",
            "\0",
        ),
        *(
            "'",
            '"""',
            "(",
            "lambda",
            "yield",
            "return 1\n",
            "# -*- coding: nothing -*-\n",
            "int('9' * 5000)\n",
        ),
    )

    def opened() -> str | None:
        before = dict(LAW.entries)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                import_plugin(file)
        except KeyboardInterrupt:  # the command line's to tell
            return "interrupted"
        finally:
            sys.modules.pop(module_name(file.resolve()), None)
            LAW.entries.clear()
            LAW.entries.update(before)
        return None

    def draw_case(draw: random.Random) -> Case:
        text = mutation.text(draw, PLUGIN, pieces)
        if draw.random() < 0.2:
            text = "# first\n" + draw.choice(pieces) + PLUGIN
        file.write_bytes(mutation.encoded(text))
        if draw.random() < 0.1:
            file.write_bytes(mutation.damaged(draw, mutation.encoded(text)))
        return repr(file.read_bytes()[:400]), opened

    return draw_case


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file
