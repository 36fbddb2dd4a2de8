"""The command line: lists of arguments made of the words that it knows, wrong ones, and wrong values."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workbench.index
from tests.fuzz import mutation, tables
from tests.fuzz.campaign import Case, Drawing, Odd
from tests.fuzz.models import RANDOM, checkpoint
from workbench import reports
from workbench.families import PLUGINS
from workbench.index import stored

#: Seconds until a computation is asked to end as Ctrl-C does, and between two such wishes.
PATIENCE = 1.0
ODD = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "7",
        "1e3",
        "1e-9",
        "0.5",
        "99999999999",
        "1e400",
        "nan",
        "inf",
        "1:30",
        "0b11",
        "1_000",
    ),
    *(
        "",
        " ",
        "x",
        "[]",
        "[1]",
        "[1, [2]]",
        "{}",
        "{a: 1}",
        "null",
        "true",
        "auto",
        "cuda:9",
        "cpu",
        "é",
        "\ufeff",
        "a" * 400,
    ),
    *(
        "-",
        "--",
        "=",
        "/",
        "/dev/null",
        "/proc/self/mem",
        ".",
        "..",
        "~",
        "*",
        "[",
        "{",
        "'",
        '"',
        "1,2",
        "a: 1, a: 2",
        "%s",
    ),
    *(
        "[" * 30,
        "blocks",
        "*layers.0.*",
        "magnitude",
        "wanda",
        "int4",
        "2:4",
        "--subject",
        "hf:",
        "org/name",
        "x.py:f",
        "x.gguf",
    ),
)
Words = Callable[[random.Random], list[str]]


class Sentences:
    """Draws lists of arguments; `place` holds what they name."""

    def __init__(self, place: Path) -> None:
        self.index = stored()
        self.place = place
        on = workbench.subject(checkpoint(place, "bert"), **RANDOM)
        on.save(place / "subject", private=True)
        tables.table().to_csv(place / "runs.csv", index=False)
        (place / "file").write_text("a file")
        (place / "own.py").write_text("x = 1\n")
        (place / "parameters.yaml").write_text("subject: digits-softmax\nsteps: 3\n")
        self.reports = {name: reports.parameters_of(name) for name in reports.available()}

    def one(self, draw: random.Random) -> list[str]:
        kind = draw.choices(
            [
                self.run,
                self.listing,
                self.show,
                self.report,
                self.results,
                self.evidence,
                self.kernels,
                self.odd,
            ],
            [60, 5, 8, 12, 4, 4, 5, 5],
        )[0]
        words = kind(draw)
        what = draw.random()
        if words and what < 0.06:
            words.pop(draw.randrange(len(words)))
        elif words and what < 0.12:
            place = draw.randrange(len(words))
            words[place] = mutation.text(draw, words[place])
        elif what < 0.16:
            words.insert(draw.randrange(len(words) + 1), draw.choice(ODD))
        elif what < 0.18:
            draw.shuffle(words)
        return [w.encode("utf-8", "replace").decode().replace("\0", "") for w in words]

    def run(self, draw: random.Random) -> list[str]:
        names = [*self.index["instruments"]] * 3 + [*self.index["methods"]]
        name = draw.choice(names)
        steps = self.index["methods"][name]["steps"] if name in self.index["methods"] else [name]
        note = self.index["instruments"][steps[0]]
        words = ["run", name]
        runs = note["on"] == "runs"
        where = draw.random()
        if runs:
            words += (
                []
                if where < 0.1
                else ["--runs", draw.choice([str(self.place / "runs.csv"), "nothing.csv", *ODD[:9]])]
            )
            if draw.random() < 0.2:
                words += [
                    "--columns",
                    draw.choice(["params=params", "loss=nothing", "=", "a=b", "tokens=params*20"]),
                ]
        elif where < 0.86:
            words += [
                "--subject",
                draw.choice(["nothing", "digits-softmx", str(self.place / "file"), "no/such/folder"]),
            ]
        elif where < 0.93:
            words += ["--subject", str(self.place / "subject")]
        elif where < 0.95:
            words += ["--subject", "digits-softmax"]
        fields = note["fields"]
        for _ in range(draw.choice([0, 1, 2, 3, 5])):
            words += self.field(draw, draw.choice(fields))
        if not runs and where >= 0.86:  # nothing that takes long on purpose
            words += [f for f in ("--device", "cpu") if draw.random() < 0.5]
        for option, values in {
            "--out": [str(self.place / "out"), str(self.place / "file"), "/proc/x", "~"],
            "--plugins": [str(self.place / "own.py"), "nothing.py", ","],
            "--data": ["random", "nothing.csv", str(self.place / "runs.csv")],
            "--max-length": ["8", "x", "-1", "1e3"],
            "--help": [""],
            "--no-cache": [""],
            "--fresh": [""],
            "--memory": ["4GB", "1kB", "-1", "2 apples"],
            "--dry-run": [""],
            "--export": ["gguf", "onnx"],
            "--overwrite": [""],
            "--nothing": ["1"],
        }.items():
            if draw.random() < 0.05:
                words += [option, *filter(None, [draw.choice(values)])]
        return words

    def field(self, draw: random.Random, note: dict[str, Any]) -> list[str]:
        option = f"--{note['name'].replace('_', '-')}"
        values = [
            note.get("default", ""),
            *note.get("choices", []),
            draw.choice(ODD),
            draw.choice(mutation.TOKENS),
        ]
        if "axis" in note and note["axis"] in self.index["axes"]:
            entries = self.index["axes"][note["axis"]]["entries"]
            entry = draw.choice([*entries])
            values += [entry, entry]
            if entries[entry]["options"] and draw.random() < 0.4:
                inner = draw.choice(entries[entry]["options"])
                values = [f"{{name: {entry}, {inner['name']}: {draw.choice(ODD)}}}"]
                if draw.random() < 0.5:
                    return [option, entry, f"{option}.{inner['name'].replace('_', '-')}", draw.choice(ODD)]
        value = str(draw.choice(values))
        if draw.random() < 0.15:
            value = mutation.text(draw, value)
        return [f"{option}={value}"] if draw.random() < 0.4 else [option, value]

    def listing(self, draw: random.Random) -> list[str]:
        return [
            "list",
            *draw.choices(
                ["instruments", "methods", "subjects", "axes", "x", "--help", *ODD[:9]],
                k=draw.choice([0, 1, 1, 2]),
            ),
        ]

    def show(self, draw: random.Random) -> list[str]:
        entries = [name for axis in self.index["axes"].values() for name in axis["entries"]]
        names = [*self.index["methods"], *entries, *self.index["instruments"], *self.index["axes"], *ODD]
        return ["show", *draw.choices(names, k=draw.choice([0, 1, 1, 1, 2]))]

    def report(self, draw: random.Random) -> list[str]:
        """Asked to write where it cannot, so that no kernel starts."""
        name = draw.choice([*self.reports, "nothing", str(self.place / "file"), str(self.place / "x.ipynb")])
        words = ["report", name, "--out", str(self.place / "file")]
        for _ in range(draw.choice([0, 1, 2, 4])):
            known = self.reports.get(name, self.reports["compress"])
            parameter = draw.choice([*known])
            value = draw.choice([str(known[parameter].default), *draw.choices(ODD, k=2)])
            words += [f"--{parameter.replace('_', '-')}", value]
        if draw.random() < 0.2:
            words += [
                "--parameters",
                draw.choice([str(self.place / "parameters.yaml"), str(self.place / "runs.csv"), "no"]),
            ]
        return [*words, *(["--help"] if draw.random() < 0.1 else [])]

    def results(self, draw: random.Random) -> list[str]:
        return [
            "results",
            *draw.choices(["--clear", "stale", "damaged", "all", "--help", "x"], k=draw.choice([0, 1, 2, 3])),
        ]

    def evidence(self, draw: random.Random) -> list[str]:
        words = [
            "evidence",
            "--out",
            str(self.place / "evidence"),
            draw.choice(["nothing", "--family", "--nothing"]),
        ]
        return [*words, draw.choice(["nothing", "x", *ODD])]

    def kernels(self, draw: random.Random) -> list[str]:
        words = ["kernels", draw.choice(["list", "list", "check", "bench", "x", "--help", ""])]
        return [
            *words,
            "--only",
            draw.choice(["nothing", "[", "", "x*"]),
            *draw.choices(["--target", "90", "x", "--record"], k=draw.choice([0, 0, 1, 2])),
        ]

    def odd(self, draw: random.Random) -> list[str]:
        return draw.choices(
            [*ODD, "run", "list", "show", "report", "--version", "--help"], k=draw.randrange(5)
        )


def judged(code: Any, said: str) -> str | None:
    """What the end of a command is: nothing for one that did what it was asked, text for a refusal."""
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in said:
        raise Odd("traceback", said)
    if code not in (0, 1, 2, 128 + signal.SIGINT):
        raise Odd("traceback", f"exit code {code}: {said}")
    told = [line for line in lines if line.startswith("workbench: ")]
    if code == 2 and not told:
        raise Odd("long", f"exit code 2 without a line that says why: {said}")
    if code == 2 and len(told) < len(lines):
        raise Odd("long", f"more than lines of the command: {said}")
    return said if code == 2 else None


def in_process(root: Path) -> Drawing:
    """`main(argv)`; what computes is asked to end after a moment, as Ctrl-C does."""
    import workbench.evidence
    from workbench.cli import main

    sentences = Sentences(root / "place")
    with contextlib.redirect_stdout(io.StringIO()):  # everything is imported before anything is interrupted
        workbench.index.made()
        for words in (["list", "methods"], ["show", "wanda"], ["results"], ["kernels", "list"]):
            main(words)
        for name in ("digits-softmax", str(root / "place" / "subject")):
            main(["run", "trace", "--subject", name, "--products", "8"])
        main(["run", "scaling-fit", "--runs", str(root / "place" / "runs.csv"), "--resamples", "20"])

    def opened(words: list[str]) -> str | None:
        out, ended = io.StringIO(), threading.Event()

        def impatient() -> None:
            while not ended.wait(PATIENCE):
                os.kill(os.getpid(), signal.SIGINT)

        before = os.environ.pop(PLUGINS, None)
        asking = threading.Thread(target=impatient, daemon=True)
        try:
            with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
                asking.start()
                try:
                    code = main(words)
                except SystemExit as error:  # as --help ends
                    code = error.code or 0
                finally:
                    ended.set()
                    asking.join()
        except KeyboardInterrupt:  # the wish came a moment too late
            code = 128 + signal.SIGINT
        finally:
            os.environ.pop(PLUGINS, None)
            if before is not None:
                os.environ[PLUGINS] = before
        return judged(code, out.getvalue())

    def draw_case(draw: random.Random) -> Case:
        words = sentences.one(draw)
        return json.dumps(words), lambda: opened(words)

    return draw_case


def in_processes(root: Path) -> Drawing:
    """The same as commands of a shell."""
    sentences = Sentences(root / "place")

    def opened(words: list[str]) -> str | None:
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        said, waited = "", 0
        while True:
            try:
                said = process.communicate(timeout=20)[1]
                break
            except subprocess.TimeoutExpired:
                waited += 1
                if waited > 5:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise Odd("hang", "killed after 120 s") from None
                process.send_signal(signal.SIGINT)
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            late = waited and process.returncode == -signal.SIGINT  # asked to end when it was about to
            return judged(128 + signal.SIGINT if late else process.returncode, said)
        os.killpg(process.pid, signal.SIGKILL)
        raise Odd("traceback", "processes were left behind")

    def draw_case(draw: random.Random) -> Case:
        words = sentences.one(draw)
        return json.dumps(words), lambda: opened(words)

    return draw_case


LOADERS: dict[str, Callable[[Path], Drawing]] = {"command-line": in_process, "processes": in_processes}
