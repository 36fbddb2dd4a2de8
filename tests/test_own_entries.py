"""A user's own saliency, rounding, transform, number format, optimizer, schedule, scaling law and instrument:
one registration each in one file, and they work from Python, the command line, a panel and a report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import widgets
import workbench
from tests.notebook import write
from widgets.settings.choices import ChoiceControl
from workbench.axis import AXES, axis_of
from workbench.cli import main
from workbench.families import PLUGINS, load_plugins, module_name
from workbench.names import entries_called, find
from workbench.results import Result
from workbench.scaling import load_runs

#: What a user writes: imports are published names only, and each entry is registered once.
FILE = '''
import pandas as pd
import torch

from workbench.axis import Options, parameter
from workbench.instruments import SubjectInstrument
from workbench.pruning import SALIENCY
from workbench.quantization import NUMBER_FORMAT, ROUNDING, TRANSFORM, Codebook, Format, Transform
from workbench.scaling import LAW, Law
from workbench.training import LEARNING_RATE_SCHEDULE, OPTIMIZER


class Center(Options):
    center: float = parameter(0.02, "magnitude that costs least", ge=0, le=9)


@SALIENCY.add("own-saliency", formula="(|w| - c)^2", source="a user 2026", options=Center)
def own_saliency(layer, calibration, pattern, options):
    return (layer.weight.detach().abs() - options.center) ** 2


@ROUNDING.add("own-rounding", formula="s trunc(w / s)", source="a user 2026")
def own_rounding(problem, options):
    grid = problem.grid()
    scale, _ = grid.columns(problem.weight.shape[1])
    return problem.masked(torch.trunc(problem.weight / scale) * scale), grid


class Factor(Options):
    factor: float = parameter(2.0, "of every second input", gt=0, le=100)


@TRANSFORM.add("own-transform", formula="T = diag(1, f, 1, f, ...)", source="a user 2026", options=Factor)
def own_transform(problem, options):
    scale = torch.ones(problem.weight.shape[1])
    scale[1::2] = options.factor
    return Transform(scale=scale)


@NUMBER_FORMAT.add("own-format", formula="{-1, -1/3, 1/3, 1}", source="a user 2026")
def own_format(options):
    return Format("own-format", Codebook(2, (-1.0, -1 / 3, 1 / 3, 1.0)))


class Pull(Options):
    pull: float = parameter(0.1, "to zero", ge=0, le=1)


@OPTIMIZER.add("own-optimizer", formula="w <- w - lr (g + a w)", source="a user 2026", options=Pull)
def own_optimizer(model, learning_rate, weight_decay, options):
    return torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=options.pull)


class Pieces(Options):
    pieces: int = parameter(2, "of equal length", ge=1, le=50)


@LEARNING_RATE_SCHEDULE.add("own-schedule", formula="2^-floor(k p)", source="a user 2026", options=Pieces)
def own_schedule(p, options):
    return 0.5 ** int(options.pieces * p)


@LAW.add("own-law", formula="L = E + A / sqrt(N)", source="a user 2026")
def own_law(options):
    return Law.from_formula("E + A / params**0.5")


class OwnInstrument(SubjectInstrument):
    """The largest weight of every layer."""

    power: float = parameter(1.0, "exponent", gt=0, le=9)

    def _run(self, on, progress):
        rows = [
            {"layer": layer.name, "largest": float(layer.weight.detach().abs().max()) ** self.power}
            for layer in progress.track(on.layers(), "layers")
        ]
        table = pd.DataFrame(rows)
        return self.result(table, {"largest": float(table["largest"].max())})
'''


@dataclass(frozen=True)
class Own:
    """Where an entry is chosen, with what beside it, and what shows in the facts that it was."""

    name: str
    instrument: str
    place: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    fact: str = ""
    plain: str = ""  # another entry of the axis: its fact is another

    @property
    def settings(self) -> dict[str, Any]:
        chosen = {self.place: {"name": self.name, **self.options}} if self.place else self.options
        return {**self.beside, **chosen}

    @property
    def arguments(self) -> list[str]:
        """As they are typed: `--field own --field.option value --other-field value`."""
        typed = {self.place: self.name} if self.place else {}
        typed |= {f"{self.place}.{k}".lstrip("."): v for k, v in self.options.items()} | self.beside
        texts = {k.replace("_", "-"): v if isinstance(v, str) else json.dumps(v) for k, v in typed.items()}
        return [part for option, text in texts.items() for part in (f"--{option}", text)]


PRUNE = {"compensation": "none", "sparsity": 0.3, "predict_examples": 0, "calibration_examples": 4}
QUANTIZE = {
    "calibration_examples": 4, "predict_examples": 0, "test_examples": 16, "group_size": 16,
    "layers": "*.0.*",
}  # fmt: skip
TRAIN = {"steps": 4, "batch_size": 10, "learning_rate": 0.01, "warmup": 0.0}
FIT = {"starts": 16, "checks": False, "resamples": 20, "against": []}
OWN = (
    Own("own-saliency", "prune", "saliency", {"center": 0.05}, PRUNE, "loss", "magnitude"),
    Own("own-rounding", "quantize", "rounding", {}, {"format": "int4", **QUANTIZE}, "loss", "nearest"),
    Own("own-transform", "quantize", "transform", {"factor": 4.0}, QUANTIZE, "loss", "none"),
    Own("own-format", "quantize", "format", {}, QUANTIZE, "loss", "int4"),
    Own("own-optimizer", "train", "optimizer", {"pull": 0.5}, TRAIN, "train_loss", "adamw"),
    Own("own-schedule", "train", "schedule", {"pieces": 3}, TRAIN, "train_loss", "constant"),
    Own("own-law", "scaling-fit", "law", {}, FIT, "E", "chinchilla"),
    Own("own-instrument", "own-instrument", "", {"power": 2.0}, {}, "largest"),
)
each = pytest.mark.parametrize("own", OWN, ids=lambda own: own.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the user's file and a table of runs; nothing is loaded."""
    made = tmp_path_factory.mktemp("own")
    (made / "own.py").write_text(FILE)
    size = np.logspace(7, 9.5, 8)
    pd.DataFrame({"params": size, "tokens": 20 * size, "loss": 1.7 + 900 / np.sqrt(size)}).to_csv(
        made / "runs.csv", index=False
    )
    return made


@pytest.fixture
def known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file is loaded in this process; what it registered is taken off again."""
    monkeypatch.setenv(PLUGINS, "")
    before = {kind: dict(home.entries) for kind, home in AXES.items()}
    load_plugins([folder / "own.py"])
    yield
    for kind, entries in before.items():
        AXES[kind]._entries.clear()
        AXES[kind]._entries.update(entries)
    del sys.modules[module_name((folder / "own.py").resolve())]


@pytest.fixture(scope="module")
def subject() -> Any:
    return workbench.subject("digits-vit")


def opened(own: Own, subject: Any, folder: Path) -> Any:
    return load_runs(folder / "runs.csv") if find(own.instrument).on == "runs" else subject


def run(own: Own, on: Any, **changes: Any) -> Result:
    return find(own.instrument)(**{**own.settings, **changes}).run(on, cache=False)


@each
def test_from_python(own: Own, known: None, folder: Path, subject: Any) -> None:
    kind, on = find(own.instrument), opened(own, subject, folder)
    made = kind(**own.settings)
    assert kind(**json.loads(json.dumps(made.model_dump(mode="json")))) == made
    result = run(own, on)
    if own.place:
        assert getattr(made, own.place).options.model_dump() == own.options
        assert result.facts[own.fact] != run(own, on, **{own.place: own.plain}).facts[own.fact]
        with pytest.raises(workbench.BadInput, match=f"did you mean {own.name}"):
            kind(**{**own.beside, own.place: own.name + "s"})
    if own.options:  # they are used, and they are part of what a result is stored under
        option = next(iter(own.options))
        changed = {f"{own.place}.{option}".lstrip("."): 1}
        again = kind(**{**own.beside, **({own.place: own.name} if own.place else {}), **changed})
        assert again.key(on) != made.key(on)
        assert again.run(on, cache=False).facts != result.facts


@each
def test_in_a_panel(own: Own, known: None, folder: Path, subject: Any) -> None:
    on = opened(own, subject, folder)
    panel = widgets.panel(find(own.instrument), on, **own.beside)
    if own.place:
        choice = panel.controls.controls[own.place].widget
        assert isinstance(choice, ChoiceControl) and own.name in choice.name.options
        choice.name.value = own.name
        shown = set(choice.options.controls) if choice.options is not None else set()
        assert shown == set(own.options)
        if own.options:
            choice.options.values = own.options
    else:
        panel.controls.values = own.options
    panel.job.run.click()
    assert panel.job.wait(60) and panel.result is not None, panel.job.note.value
    assert panel.result.facts[own.fact] == run(own, on).facts[own.fact]
    assert find(own.instrument)(**panel.parameters["settings"]) == find(own.instrument)(**own.settings)


def test_from_the_command_line(folder: Path, subject: Any, request: pytest.FixtureRequest) -> None:
    """In a process that knows of the file by `--plugins` alone."""
    commands = []
    for own in OWN:
        on = (
            ["--runs", str(folder / "runs.csv")]
            if own.instrument == "scaling-fit"
            else ["--subject", "digits-vit"]
        )
        more = ["--plugins", str(folder / "own.py"), "--no-cache", "--out", str(folder / own.name)]
        commands.append(["run", own.instrument, *own.arguments, *on, *more])
    code = (
        "import sys, json, os\nfrom workbench.cli import main\n"
        "for command in json.load(sys.stdin):\n"
        "    os.environ.pop('WORKBENCH_PLUGINS', None)\n"
        "    assert main(command) == 0, command"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(commands), capture_output=True, text=True, timeout=300,
        env={name: value for name, value in os.environ.items() if name != PLUGINS},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    request.getfixturevalue("known")
    for own in OWN:
        found = Result.load(folder / own.name)
        expected = run(own, opened(own, subject, folder)).facts[own.fact]
        assert found.facts[own.fact] == pytest.approx(expected, rel=1e-9), own.name


REPORT = """\
from workbench import names, overview, reports
import pandas as pd

rows = []
for instrument, source, settings in runs:
    kind = names.find(instrument)
    tool = kind(**settings)
    on = reports.reopen(kind, source)
    result = tool.run(on, cache=False)
    rows += [{"instrument": instrument, **{k: v for k, v in result.facts.items() if k in facts}}]
    display(overview.settings(tool, on))
pd.DataFrame(rows).to_csv(table, index=False)
"""


@pytest.mark.long
def test_in_a_report(
    folder: Path,
    subject: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """All of them in one, whose kernel knows of the file by `--plugins` alone."""
    monkeypatch.setenv(PLUGINS, "")
    book = write(
        tmp_path / "own.ipynb",
        REPORT,
        parameters="runs: list = []  # instrument, subject and settings\nfacts: list = []\ntable: str = ''",
    )
    parameters = {
        "runs": [
            [own.instrument, str(folder / "runs.csv") if own.place == "law" else "digits-vit", own.settings]
            for own in OWN
        ],
        "facts": sorted({own.fact for own in OWN}),
        "table": str(tmp_path / "facts.csv"),
    }
    (tmp_path / "given.json").write_text(json.dumps(parameters))
    request.getfixturevalue("known")  # removes what the command registers here
    given = ["--parameters", str(tmp_path / "given.json"), "--plugins", str(folder / "own.py")]
    assert main(["report", str(book), *given, "--out", str(tmp_path / "reports")]) == 0
    table = pd.read_csv(tmp_path / "facts.csv")
    page = (tmp_path / "reports" / "own.html").read_text()
    for own, (_, row) in zip(OWN, table.iterrows(), strict=True):
        expected = run(own, opened(own, subject, folder)).facts[own.fact]
        assert row[own.fact] == pytest.approx(expected, rel=1e-9), own.name
        assert own.name in page and (not own.place or "a user 2026" in page)


@each
def test_by_its_name(own: Own, known: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`workbench show`, `list` and `--help` know it, with formula, source and options."""
    plugins = ["--plugins", str(folder / "own.py")]
    assert main(["show", own.name, *plugins]) == 0
    shown = capsys.readouterr().out
    assert "own.py:" in shown and all(f"{own.place}.{option}" in shown for option in own.options if own.place)
    assert main(["list", "axes" if own.place else "instruments", *plugins]) == 0
    assert own.name in capsys.readouterr().out
    assert main(["run", own.name, "--help", *plugins]) == 0
    helped = capsys.readouterr().out
    assert own.name in helped and all(option in helped for option in own.options)
    if own.place:
        entry = entries_called(own.name)[0]
        assert entry.formula in shown and entry.source in shown
        assert axis_of(find(own.instrument).model_fields[own.place]) is entry.axis
